"""The contiguous store: one reserved stretch of memory a sequence, as systems did before paging.

Every sequence gets room for `max_len` tokens up front, whether it comes to need them or not: what that wastes is the
starting point of Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention",
§3.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minillm.errors import CacheFullError, ConfigError, InvalidRequestError, OutOfMemoryError
from minillm.transformer.attention import attend, attention_mask
from minillm.transformer.kv import AttentionSpec, CachedConfig, CachedModel, PaddedBatch


class ContiguousCache:
    """Keys and values as ``[batch, kv_heads, max_len, head_dim]`` a layer; a token's slot is its position.

    Args:
        config: of the model that will use it.
        batch_size: rows.
        max_len: tokens reserved for each row.
        dtype: of keys and values; the model's.
    """

    remembers = True

    def __init__(
        self,
        config: CachedConfig,
        batch_size: int,
        max_len: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1 or max_len < 1:
            raise ConfigError(f"a cache needs at least one row and one token, not {batch_size} x {max_len}")
        self.specs = config.attention_specs
        if not all(spec.causal for spec in self.specs):
            raise ConfigError("a cache keeps what later tokens see of earlier ones: every layer must be causal")
        self.batch_size = batch_size
        self.max_len = max_len
        self.device = torch.device(device)
        shape = (batch_size, config.num_kv_heads, max_len, config.head_dim)
        try:
            self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in self.specs]
            self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in self.specs]
        except RuntimeError as error:
            size = batch_size * max_len * config.kv_bytes_per_token(dtype) / 2**30
            raise OutOfMemoryError(
                f"{size:.1f} GiB of keys and values do not fit on {device}: reserve fewer rows or a smaller max_len"
            ) from error
        self._batch = PaddedBatch((), ())
        self._real: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._masks: dict[AttentionSpec, Bool[Tensor, "batch 1 queries keys"] | None] = {}

    @classmethod
    def for_decoder(cls, decoder: CachedModel, batch_size: int = 1, max_len: int | None = None) -> ContiguousCache:
        """A store that fits `decoder`: its dtype, its device, by default its whole context."""
        config = decoder.config
        max_len = config.max_position_embeddings if max_len is None else max_len
        return cls(config, batch_size, max_len, dtype=decoder.dtype, device=decoder.device)

    @property
    def num_bytes(self) -> int:
        """Memory reserved for keys and values."""
        return sum(tensor.nbytes for tensor in (*self.k, *self.v))

    def begin(self, batch: PaddedBatch) -> None:
        if len(batch.starts) != self.batch_size:
            raise InvalidRequestError(f"this cache was made for {self.batch_size} rows, not {len(batch.starts)}")
        if batch.end > self.max_len:
            raise CacheFullError(
                f"a sequence of {batch.end} tokens does not fit the {self.max_len} reserved: make the cache with "
                f"max_len={batch.end} or more"
            )
        self._batch = batch
        self._masks = {}
        self._real = self._real_tokens(batch) if self._scattered(batch) else None

    def reorder(self, rows: Int[Tensor, "rows"]) -> None:
        """Row i goes on from a copy of row ``rows[i]``: beams that share a beginning.

        Raises:
            InvalidRequestError: when `rows` does not name one row for each.
        """
        if len(rows) != self.batch_size:
            raise InvalidRequestError(
                f"say for each of the {self.batch_size} rows which one it copies: got {len(rows)}"
            )
        end = self._batch.end if self._batch.starts else 0
        for store in (*self.k, *self.v):
            store[:, :, :end] = store[rows, :, :end]

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "batch queries heads head_dim"],
        k: Float[Tensor, "batch queries kv_heads head_dim"],
        v: Float[Tensor, "batch queries kv_heads head_dim"],
    ) -> Float[Tensor, "batch queries heads head_dim"]:
        self._write(self.k[layer], k)
        self._write(self.v[layer], v)
        spec, end = self.specs[layer], self._batch.end
        if spec not in self._masks:
            self._masks[spec] = self._mask(spec)
        seen_k, seen_v = self.k[layer][:, :, :end], self.v[layer][:, :, :end]
        mask = self._masks[spec]
        out = attend(q.transpose(1, 2), seen_k, seen_v, mask, scale=spec.scale, soft_cap=spec.soft_cap)
        return out.transpose(1, 2)

    def _write(
        self,
        store: Float[Tensor, "rows kv_heads max_len head_dim"],
        new: Float[Tensor, "rows queries kv_heads head_dim"],
    ) -> None:
        if self._real is None:
            start = self._batch.starts[0]
            store[:, :, start : start + self._batch.seq_len] = new.transpose(1, 2)
        else:
            row, step, slot_row, slot = self._real
            store[slot_row, :, slot] = new[row, step]

    @staticmethod
    def _scattered(batch: PaddedBatch) -> bool:
        """Whether this call's tokens do not form one rectangle of the store."""
        return batch.is_ragged or len(set(batch.starts)) > 1

    def _real_tokens(self, batch: PaddedBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row and column of every real token in the batch, and its row and slot here: padding is never written."""
        row, step = batch.is_real(self.device).nonzero(as_tuple=True)
        return row, step, row, batch.positions(self.device)[row, step]

    def _mask(self, spec: AttentionSpec) -> Bool[Tensor, "batch 1 queries keys"] | None:
        """Who sees which slots; None where `attend` needs no telling."""
        batch = self._batch
        window_hides = spec.window is not None and batch.end > spec.window
        last_positions = batch.seq_len in (1, batch.end)  # one query, or a whole prompt: a row or a triangle
        if not self._scattered(batch) and not window_hides and last_positions:
            return None
        slots = torch.arange(batch.end, device=self.device).expand(self.batch_size, -1)
        return attention_mask(batch.positions(self.device), slots, window=spec.window)[:, None]
