"""The paged store: keys and values in blocks of one shared pool, found through block tables."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minillm.cache.backends import REFERENCE, AttentionBackend
from minillm.cache.block_table import Copy
from minillm.errors import ConfigError, OutOfMemoryError
from minillm.transformer.kv import CachedConfig
from minillm.transformer.positions import Rotation


class PagedBatch(NamedTuple):
    """One call's tokens as a flat, ragged batch: all of the first sequence, then all of the second, without padding.

    Attributes:
        slot_mapping: where each token's key and value go: block × block_size + place, or `NO_SLOT`.
        query_starts: where each sequence's tokens begin, and the end of the last one's.
        seq_lens: tokens that each sequence has stored when this call's are.
        block_tables: a sequence's blocks in order, in a row; anything behind them.
        max_query_len: the most tokens that one sequence brings.
        copies: blocks to copy before this call's tokens are written.
    """

    slot_mapping: Int[Tensor, "tokens"]
    query_starts: Int[Tensor, "seqs_and_one"]
    seq_lens: Int[Tensor, "seqs"]
    block_tables: Int[Tensor, "seqs max_blocks"]
    max_query_len: int
    copies: Sequence[Copy] = ()


class PagedKVCache:
    """Keys and values as ``[num_blocks, kv_heads, block_size, head_dim]`` a layer.

    One block number stands for its slots in every layer. Who holds which block is not known here (`BlockPool`).

    Args:
        config: of the model that will use it.
        num_blocks: blocks of the pool.
        block_size: tokens of a block.
        backend: who writes and attends.
    """

    remembers = True

    def __init__(
        self,
        config: CachedConfig,
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        backend: AttentionBackend = REFERENCE,
    ) -> None:
        self.backend = backend
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(f"a cache needs at least one block of one token, not {num_blocks} of {block_size}")
        self.specs = config.attention_specs
        if not all(spec.causal for spec in self.specs):
            raise ConfigError("a cache keeps what later tokens see of earlier ones: every layer must be causal")
        shape = (2, len(self.specs), num_blocks, config.num_kv_heads, block_size, config.head_dim)
        try:
            self.store = pool_memory(shape, dtype, device)
        except (RuntimeError, OSError, OverflowError) as error:
            size = num_blocks * block_size * config.kv_bytes_per_token(dtype) / 2**30
            raise OutOfMemoryError(
                f"{size:.1f} GiB of keys and values do not fit on {device}: take fewer blocks"
            ) from error
        self.layers = [(self.store[0, layer], self.store[1, layer]) for layer in range(len(self.specs))]
        self._batch: PagedBatch | None = None
        self._plans: dict[int | None, Any] = {}  # by window

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return self.store.shape[2]

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.store.shape[4]

    @property
    def num_bytes(self) -> int:
        """Memory reserved for keys and values."""
        return self.store.nbytes

    def begin(self, batch: PagedBatch) -> None:
        self._batch, self._plans = batch, {}
        if batch.copies:
            sources, targets = (list(blocks) for blocks in zip(*batch.copies, strict=True))
            self.store[:, :, targets] = self.store[:, :, sources]

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "tokens heads head_dim"],
        k: Float[Tensor, "tokens kv_heads head_dim"],
        v: Float[Tensor, "tokens kv_heads head_dim"],
    ) -> Float[Tensor, "tokens heads head_dim"]:
        batch = self._begun()
        self.backend.write_kv(*self.layers[layer], k, v, batch.slot_mapping)
        return self._attend(layer, q, batch)

    @property
    def fuses(self) -> bool:
        return self.backend.rotate_and_write is not None

    def rotate_and_attend(
        self,
        layer: int,
        q: Float[Tensor, "tokens heads head_dim"],
        k: Float[Tensor, "tokens kv_heads head_dim"],
        v: Float[Tensor, "tokens kv_heads head_dim"],
        rotation: Rotation,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        batch, operation = self._begun(), self.backend.rotate_and_write
        assert operation is not None, "fuses is asked first"
        q = operation(
            q,
            k,
            v,
            rotation.cos,
            rotation.sin,
            *self.layers[layer],
            batch.slot_mapping,
            interleaved=rotation.interleaved,
        )
        return self._attend(layer, q, batch)

    def takes_layers(self, layers: Any) -> bool:
        takes, tokens = self.backend.takes_layers, len(self._begun().slot_mapping)
        return takes is not None and takes(layers, tokens, self._plan(None))

    def run_layers(self, layers: Any, x: Float[Tensor, "tokens hidden"], rotation: Rotation) -> None:
        batch, operation = self._begun(), self.backend.run_layers
        assert operation is not None, "takes_layers() is asked first"
        operation(
            x,
            layers,
            rotation.cos,
            rotation.sin,
            self.store,
            batch.slot_mapping,
            batch.query_starts,
            batch.seq_lens,
            self._plan(None),
            interleaved=rotation.interleaved,
            scale=self.specs[0].scale,
            windows=[spec.window for spec in self.specs],
            soft_cap=self.specs[0].soft_cap,
        )

    def _begun(self) -> PagedBatch:
        assert self._batch is not None, "begin() says which tokens these are"
        return self._batch

    def _attend(
        self, layer: int, q: Float[Tensor, "tokens heads head_dim"], batch: PagedBatch
    ) -> Float[Tensor, "tokens heads head_dim"]:
        spec, backend = self.specs[layer], self.backend
        k_cache, v_cache = self.layers[layer]
        where = (batch.block_tables, batch.query_starts, batch.seq_lens)
        if backend.attend is not None:
            plan = self._plan(spec.window)
            return backend.attend(q, k_cache, v_cache, plan, scale=spec.scale, soft_cap=spec.soft_cap)
        return backend.paged_attention(
            q,
            k_cache,
            v_cache,
            *where,
            max_query_len=batch.max_query_len,
            scale=spec.scale,
            window=spec.window,
            soft_cap=spec.soft_cap,
        )

    def _plan(self, window: int | None) -> Any:
        """What all layers with this window have in common in this step, worked out once."""
        batch, plan = self._begun(), self.backend.plan
        assert plan is not None, "backends that attend in two parts have it"
        if window not in self._plans:
            self._plans[window] = plan(
                batch.block_tables,
                batch.query_starts,
                batch.seq_lens,
                block_size=self.block_size,
                max_query_len=batch.max_query_len,
                window=window,
            )
        return self._plans[window]


def pool_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros; on a CPU in pages that the system gives when they are first written, large ones where it has them.

    A pool then takes what has been used of it, and single queries, which read here and there, wait less for the
    translation of addresses (a tenth of their time; `minillm bench cpu-attention`).

    Raises:
        RuntimeError, OSError, OverflowError: there is not so much memory.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    if sys.platform == "win32":
        pages = mmap.mmap(-1, num_bytes)
    else:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel without large pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
