"""Paged attention on a GPU: single queries by the bytes that they read a second, prompts by their arithmetic.

Single queries are compared with what a copy moves, and with peers, where they are installed. How many parts the keys
are divided into is tried out beside the rule that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

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
    """Inputs of one step's attention."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    query_starts: Tensor
    seq_lens: Tensor

    def gathered(self, cache: Tensor) -> Tensor:
        """[batch, kv_heads, keys, head_dim], in one stretch."""
        return cache[self.block_tables].transpose(1, 2).flatten(2, 3)


def decode_inputs(shape: Heads, batch: int, context: int, dtype: torch.dtype = torch.bfloat16) -> Decode:
    """Random numbers in blocks that lie in random order."""
    blocks = batch * context // BLOCK_SIZE
    cache = torch.randn(2, blocks, shape.kv_heads, BLOCK_SIZE, shape.head_dim, dtype=dtype, device="cuda")
    tables = torch.randperm(blocks, device="cuda").view(batch, -1)
    q = torch.randn(batch, shape.heads, shape.head_dim, dtype=dtype, device="cuda")
    starts = torch.arange(batch + 1, device="cuda")
    return Decode(q, cache[0], cache[1], tables, starts, torch.full((batch,), context, device="cuda"))


Runs = list[Callable[[], object]]
"""The same work on each of several copies of its inputs."""


def sdpa_on_gathered(copies: list[Decode]) -> Runs:
    """PyTorch's fused attention over keys and values that lie in one stretch already (the gathering is not timed)."""
    runs: Runs = []
    for one in copies[:8]:
        k, v = one.gathered(one.k_cache), one.gathered(one.v_cache)
        runs.append(partial(F.scaled_dot_product_attention, one.q[:, :, None], k, v, enable_gqa=True))
    return runs


def flash_attn(copies: list[Decode]) -> Runs:
    """The kernel of Dao et al. (2023), split keys, on pages of 256, the smallest that it takes."""
    from flash_attn import flash_attn_with_kvcache  # type: ignore[import-not-found]

    runs: Runs = []
    for one in copies:
        _, kv_heads, _, head_dim = one.k_cache.shape
        k, v = (cache.view(-1, 256, kv_heads, head_dim) for cache in one[1:3])  # other numbers; of the same size
        tables = torch.randperm(len(k), dtype=torch.int32, device=k.device).view(len(one.q), -1)
        lengths = {"cache_seqlens": one.seq_lens.int(), "block_table": tables}
        runs.append(partial(flash_attn_with_kvcache, one.q[:, None], k, v, **lengths))
    return runs


def flashinfer(copies: list[Decode]) -> Runs:
    """FlashInfer's paged decode (Ye et al. 2025) on the same blocks."""
    import flashinfer  # type: ignore[import-not-found]

    one = copies[0]
    batch, heads, head_dim = one.q.shape
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(2**28, dtype=torch.uint8, device="cuda"), "HND")
    edges = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * one.block_tables.shape[1]
    last = torch.full((batch,), BLOCK_SIZE, dtype=torch.int32, device="cuda")
    kinds = (heads, one.k_cache.shape[1], head_dim, BLOCK_SIZE)
    wrapper.plan(edges, one.block_tables.flatten().int(), last, *kinds, data_type=one.q.dtype)
    return [partial(wrapper.run, each.q, (each.k_cache, each.v_cache)) for each in copies]


PEERS = {"SDPA, gathered": sdpa_on_gathered, "flash_attn": flash_attn, "FlashInfer": flashinfer}


class Row(NamedTuple):
    """One measurement; bandwidths in bytes a second."""

    shape: Heads
    batch: int
    context: int
    kv_bytes: int
    ours: float
    peers: dict[str, float]


def measure(shape: Heads, batch: int, context: int, failed: dict[str, str] | None = None) -> Row:
    """Time one size: ours, and where `failed` is given the peers; why one could not is put there, and it rests."""
    kv_bytes = 2 * batch * context * shape.kv_heads * shape.head_dim * 2
    copies = [decode_inputs(shape, batch, context) for _ in range(min(64, -(-LEAST_BYTES // kv_bytes)))]
    ours = graph_seconds([partial(paged_attention_of, one) for one in copies])
    peers = {}
    for name, runs in PEERS.items():
        if failed is not None and name not in failed:
            try:
                peers[name] = kv_bytes / graph_seconds(runs(copies))
            except Exception as error:  # whatever a peer dies of is no reason to lose the table
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return Row(shape, batch, context, kv_bytes, kv_bytes / ours, peers)


def paged_attention_of(one: Decode, max_query_len: int = 1) -> Tensor:
    """Ours."""
    from minillm.kernels.gpu.paged_attention import paged_attention

    return paged_attention(*one, max_query_len=max_query_len, scale=one.q.shape[-1] ** -0.5)


def sizes() -> Iterator[tuple[Heads, int, int]]:
    """All that fit."""
    for shape in SHAPES:
        for batch in BATCHES:
            for context in CONTEXTS:
                if 4 * batch * context * shape.kv_heads * shape.head_dim <= MOST_BYTES:
                    yield shape, batch, context


QUERIES = {
    "1 prompt of 4,096": ([4096], [4096]),
    "8 prompts of 1,024": ([1024] * 8, [1024] * 8),
    "32 prompts of 64 to 498": ([64 + 14 * n for n in range(32)],) * 2,
    "512 after 8,192": ([512], [8704]),
    "255 single after 2,048, 512 of a prompt": ([1] * 255 + [512], [2049] * 255 + [512]),
}
"""Steps with prompts: new tokens of each sequence, and its keys."""


class PromptRow(NamedTuple):
    """One measurement, in seconds; `sdpa` where all sequences are alike and have no keys before."""

    name: str
    flops: float
    ours: float
    sdpa: float | None


def prompt_inputs(shape: Heads, new: list[int], keys: list[int]) -> Decode:
    """Random numbers in blocks that lie in random order; `new` tokens of sequences with so many `keys`."""
    width = -(-max(keys) // BLOCK_SIZE)
    one = decode_inputs(shape, len(new), width * BLOCK_SIZE)
    q = torch.randn(sum(new), shape.heads, shape.head_dim, dtype=one.q.dtype, device="cuda")
    starts = torch.tensor([0, *new], device="cuda").cumsum(0)
    return one._replace(q=q, query_starts=starts, seq_lens=torch.tensor(keys, device="cuda"))


def measure_prompts(name: str, shape: Heads) -> PromptRow:
    """Time a step of `QUERIES`; its arithmetic is two products for each query and each key that it sees."""
    new, keys = QUERIES[name]
    one = prompt_inputs(shape, new, keys)
    seen = sum(n * (k - n) + n * (n + 1) // 2 for n, k in zip(new, keys, strict=True))
    ours = graph_seconds([partial(paged_attention_of, one, max(new))] * 3)
    sdpa = None
    if new == keys and len(set(new)) == 1:
        q = one.q.unflatten(0, (len(new), -1)).transpose(1, 2)
        k, v = (one.gathered(cache).contiguous() for cache in one[1:3])
        run = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
        sdpa = graph_seconds([run] * 3)
    return PromptRow(name, 4.0 * seen * shape.heads * shape.head_dim, ours, sdpa)


SPLITS = (1, 2, 4, 8, 16, 32, 64)


def measure_splits(shape: Heads, batch: int, context: int) -> tuple[int, list[float]]:
    """How many parts the keys are divided into by our rule; seconds for each number in `SPLITS`."""
    from minillm.kernels.gpu import paged_attention as kernel

    copies = [decode_inputs(shape, batch, context) for _ in range(8)]
    chosen = kernel.num_splits(
        batch * shape.kv_heads, context, torch.cuda.get_device_properties(0).multi_processor_count
    )
    found = []
    for splits in SPLITS:
        with patch.object(kernel, "num_splits", lambda *_, splits=splits: splits):
            found.append(graph_seconds([partial(paged_attention_of, one) for one in copies]))
    return chosen, found


def main(csv: Path | None = None) -> None:
    """Measure single queries, prompts and numbers of splits; print three tables; write the first to `csv` too.

    Raises:
        ConfigError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ConfigError("this needs an NVIDIA GPU")
    torch.manual_seed(0)
    copy = copy_bandwidth()
    failed: dict[str, str] = {}
    rows = [measure(*size, failed) for size in sizes()]
    if csv is not None:
        _write(csv, rows, copy)
    console = Console(width=120)
    console.print(_splits_table(), _prompts_table(), _decode_table(rows, copy))
    for name, why in failed.items():
        console.print(f"{name}: not compared ({why})", markup=False)


def _decode_table(rows: list[Row], copy: float) -> Table:
    title = f"{torch.cuda.get_device_name()}: a copy moves {copy / 1e12:.2f} TB/s; bfloat16, blocks of {BLOCK_SIZE}"
    table = Table("heads", "batch", "context", "KV", "ours, µs", "TB/s", "of a copy", *PEERS, title=title)
    for row in rows:
        table.add_row(
            f"{row.shape.heads}/{row.shape.kv_heads}×{row.shape.head_dim}",
            f"{row.batch}",
            f"{row.context:,}",
            f"{row.kv_bytes / 2**20:,.1f} MiB",
            f"{row.kv_bytes / row.ours * 1e6:,.0f}",
            f"{row.ours / 1e12:.2f}",
            f"{row.ours / copy:.0%}",
            *(f"{row.peers[name] / copy:.0%}" if name in row.peers else "" for name in PEERS),
        )
    return table


def _prompts_table() -> Table:
    shape = SHAPES[0]
    title = f"Steps with prompts, {shape.heads}/{shape.kv_heads} heads of {shape.head_dim}, bfloat16"
    table = Table("step", "ours, µs", "TFLOP/s", "SDPA, not paged, µs", title=title)
    for name in QUERIES:
        row = measure_prompts(name, shape)
        sdpa = "" if row.sdpa is None else f"{row.sdpa * 1e6:,.0f}"
        table.add_row(name, f"{row.ours * 1e6:,.0f}", f"{row.flops / row.ours / 1e12:.0f}", sdpa)
    return table


def _splits_table() -> Table:
    shape = SHAPES[0]
    title = f"µs by parts of the keys, {shape.heads}/{shape.kv_heads} heads of {shape.head_dim}"
    table = Table("batch", "context", *map(str, SPLITS), "our rule takes", title=title)
    for batch, context in ((1, 512), (1, 2048), (1, 8192), (1, 65536), (4, 8192), (16, 2048), (16, 8192), (64, 2048)):
        chosen, found = measure_splits(shape, batch, context)
        table.add_row(f"{batch}", f"{context:,}", *(f"{seconds * 1e6:.0f}" for seconds in found), f"{chosen}")
    return table


SIZES = ("heads", "kv_heads", "head_dim", "batch", "context", "kv_bytes")
SPEEDS = ("microseconds", "bytes_per_second", "copy_bytes_per_second")
PEER_SPEEDS = {
    "SDPA, gathered": "sdpa_bytes_per_second",
    "flash_attn": "flash_attn_bytes_per_second",
    "FlashInfer": "flashinfer_bytes_per_second",
}


def _write(path: Path, rows: list[Row], copy: float) -> None:
    """A line for each row; a peer that was not measured has an empty field."""
    lines = [f"# {torch.cuda.get_device_name()}, torch {torch.__version__}"]
    lines.append(",".join((*SIZES, *SPEEDS, *PEER_SPEEDS.values())))
    for row in rows:
        sizes = (*row.shape, row.batch, row.context, row.kv_bytes)
        speeds = (round(row.kv_bytes / row.ours * 1e6, 2), round(row.ours), round(copy))
        peers = (round(row.peers[name]) if name in row.peers else "" for name in PEER_SPEEDS)
        lines.append(",".join(map(str, (*sizes, *speeds, *peers))))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
