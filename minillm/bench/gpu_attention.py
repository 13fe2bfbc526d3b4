"""Decode attention on a GPU: the bytes of keys and values that it reads a second, against what a copy moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from minillm.bench.timing import copy_bandwidth, graph_seconds
from minillm.errors import ConfigError

BLOCK_SIZE = 16
MOST_BYTES = 8 * 2**30
"""Of keys and values in one measurement."""
LEAST_BYTES = 2**29
"""Smaller ones are measured on several copies, together so large where 64 of them are: far more than any cache."""


class Heads(NamedTuple):
    """Query heads, key/value heads, channels of a head."""

    heads: int
    kv_heads: int
    head_dim: int


SHAPES = (Heads(32, 8, 128), Heads(32, 2, 128), Heads(16, 8, 128), Heads(9, 3, 64))
BATCHES = (1, 4, 16, 64, 256)
CONTEXTS = (512, 2048, 8192, 32768, 65536)


class Decode(NamedTuple):
    """Inputs of one decode step's attention."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    query_starts: Tensor
    seq_lens: Tensor


def decode_inputs(shape: Heads, batch: int, context: int, dtype: torch.dtype = torch.bfloat16) -> Decode:
    """Random numbers in blocks that lie in random order."""
    blocks = batch * context // BLOCK_SIZE
    cache = torch.randn(2, blocks, shape.kv_heads, BLOCK_SIZE, shape.head_dim, dtype=dtype, device="cuda")
    tables = torch.randperm(blocks, device="cuda").view(batch, -1)
    q = torch.randn(batch, shape.heads, shape.head_dim, dtype=dtype, device="cuda")
    starts = torch.arange(batch + 1, device="cuda")
    return Decode(q, cache[0], cache[1], tables, starts, torch.full((batch,), context, device="cuda"))


def sdpa_on_gathered(inputs: Decode, shape: Heads) -> Callable[[], Tensor]:
    """PyTorch's fused attention over keys and values that lie in one stretch already (the gathering is not timed)."""
    batch = len(inputs.q)
    k, v = (
        cache[inputs.block_tables].transpose(2, 3).reshape(batch, -1, shape.kv_heads, shape.head_dim).transpose(1, 2)
        for cache in (inputs.k_cache, inputs.v_cache)
    )
    return partial(F.scaled_dot_product_attention, inputs.q[:, :, None], k, v, enable_gqa=True)


class Row(NamedTuple):
    """One measurement; bandwidths in bytes a second, None where something was not measured."""

    shape: Heads
    batch: int
    context: int
    kv_bytes: int
    ours: float
    sdpa: float | None
    flashinfer: float | None


def measure(shape: Heads, batch: int, context: int, *, peers: bool = True) -> Row:
    """Time ours and the peers on one size."""
    from minillm.kernels.gpu.paged_attention import paged_attention

    kv_bytes = 2 * batch * context * shape.kv_heads * shape.head_dim * 2
    copies = [decode_inputs(shape, batch, context) for _ in range(min(64, -(-LEAST_BYTES // kv_bytes)))]
    scale = shape.head_dim**-0.5
    ours = graph_seconds([partial(paged_attention, *one, max_query_len=1, scale=scale) for one in copies])
    sdpa = graph_seconds([sdpa_on_gathered(one, shape) for one in copies[:8]]) if peers else None
    infer = _flashinfer_seconds(copies) if peers else None
    return Row(shape, batch, context, kv_bytes, kv_bytes / ours, sdpa and kv_bytes / sdpa, infer and kv_bytes / infer)


def _flashinfer_seconds(copies: list[Decode]) -> float | None:
    """FlashInfer's paged decode on the same blocks, where it is installed."""
    try:
        import flashinfer  # type: ignore[import-not-found]
    except ImportError:
        return None
    one = copies[0]
    batch, heads, head_dim = one.q.shape
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(2**28, dtype=torch.uint8, device="cuda"), "HND")
    edges = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * one.block_tables.shape[1]
    last = torch.full((batch,), BLOCK_SIZE, dtype=torch.int32, device="cuda")
    kinds = (heads, one.k_cache.shape[1], head_dim, BLOCK_SIZE)
    wrapper.plan(edges, one.block_tables.flatten().int(), last, *kinds, data_type=one.q.dtype)
    return graph_seconds([partial(wrapper.run, one.q, (each.k_cache, each.v_cache)) for each in copies])


def sizes() -> Iterator[tuple[Heads, int, int]]:
    """All that fit."""
    for shape in SHAPES:
        for batch in BATCHES:
            for context in CONTEXTS:
                if 4 * batch * context * shape.kv_heads * shape.head_dim <= MOST_BYTES:
                    yield shape, batch, context


def main(csv: Path | None = None) -> None:
    """Measure, and print a table last; write the numbers to `csv` too.

    Raises:
        ConfigError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ConfigError("this needs an NVIDIA GPU")
    torch.manual_seed(0)
    copy = copy_bandwidth()
    rows = [measure(*size) for size in sizes()]
    if csv is not None:
        _write(csv, rows, copy)
    title = f"{torch.cuda.get_device_name()}: a copy moves {copy / 1e12:.2f} TB/s; bfloat16, blocks of {BLOCK_SIZE}"
    columns = ("heads", "batch", "context", "KV", "ours, µs", "TB/s", "of a copy", "SDPA, gathered", "FlashInfer")
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(
            f"{row.shape.heads}/{row.shape.kv_heads}×{row.shape.head_dim}",
            f"{row.batch}",
            f"{row.context:,}",
            f"{row.kv_bytes / 2**20:,.1f} MiB",
            f"{row.kv_bytes / row.ours * 1e6:,.0f}",
            f"{row.ours / 1e12:.2f}",
            f"{row.ours / copy:.0%}",
            "" if row.sdpa is None else f"{row.sdpa / copy:.0%}",
            "" if row.flashinfer is None else f"{row.flashinfer / copy:.0%}",
        )
    Console(width=120).print(table)


COLUMNS = (
    "heads,kv_heads,head_dim,batch,context,kv_bytes,microseconds,bytes_per_second,copy_bytes_per_second,"
    "sdpa_bytes_per_second"
)


def _write(path: Path, rows: list[Row], copy: float) -> None:
    lines = [f"# {torch.cuda.get_device_name()}, torch {torch.__version__}", COLUMNS]
    for row in rows:
        sizes = (*row.shape, row.batch, row.context, row.kv_bytes)
        speeds = (round(row.kv_bytes / row.ours * 1e6, 2), round(row.ours), round(copy), round(row.sdpa or 0))
        lines.append(",".join(map(str, (*sizes, *speeds))))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
