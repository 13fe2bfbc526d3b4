"""Paged attention on the CPU: ours against gathering and PyTorch's fused attention, and against reading alone.

Keys and values of single queries are read cold: copies of them, together several times as large as the last cache, take
turns. Then come the measurements behind the kernel's constants: from how many queries of one sequence on matrix
products are better, from how many keys on a second thread pays, and whether PyTorch's threads and Numba's fight.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from minillm.bench.timing import seconds_in_turn
from minillm.cache import reference
from minillm.cache.paged import pool_memory

BLOCK_SIZE, KV_HEADS, GROUP, HEAD_DIM = 16, 3, 3, 64
"""SmolLM2-135M's shapes."""
TOGETHER = 5 * 2**25
"""Bytes of all copies: five times a last-level cache of 32 MiB."""
ROUNDS, IN_A_ROW = 25, 5


class Workload(NamedTuple):
    """Sequences of these lengths, each with one query."""

    name: str
    lengths: Tensor
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of keys and values that must be read."""
        return int(self.lengths.sum()) * KV_HEADS * HEAD_DIM * 2 * self.dtype.itemsize


def workloads() -> list[Workload]:
    """Those of the bars: a batch of 64, and one long sequence, in both dtypes."""
    torch.manual_seed(0)
    many, one = torch.randint(32, 513, (64,)), torch.tensor([4096])
    return [
        Workload(name, lengths, dtype)
        for name, lengths in (("64 × 32 … 512", many), ("1 × 4,096", one))
        for dtype in (torch.float32, torch.bfloat16)
    ]


def inputs(work: Workload) -> tuple[Tensor, ...]:
    """Random numbers in blocks that lie in random order."""
    counts = -(-work.lengths // BLOCK_SIZE)
    order = torch.randperm(int(counts.sum()))
    cache = torch.randn(2, len(order), KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype=work.dtype)
    tables = torch.zeros(len(counts), int(counts.max()), dtype=torch.int64)
    for row, blocks in enumerate(order.split(counts.tolist())):
        tables[row, : len(blocks)] = blocks
    q = torch.randn(len(counts), KV_HEADS * GROUP, HEAD_DIM, dtype=work.dtype)
    return q, cache[0], cache[1], tables, torch.arange(len(counts) + 1), work.lengths


def gathered_sdpa(q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, _: Tensor, lengths: Tensor) -> Tensor:
    """What one writes without a kernel: copy all blocks into one padded batch, then PyTorch's fused attention."""
    k, v = (cache[tables].transpose(1, 2).flatten(2, 3) for cache in (k_cache, v_cache))
    mask = (torch.arange(k.shape[2]) < lengths[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, enable_gqa=True)[:, :, 0]


def pool(cache: Tensor) -> Tensor:
    """A copy in memory like an engine's pool."""
    return pool_memory(cache.shape, cache.dtype, "cpu").copy_(cache)


class Row(NamedTuple):
    """Medians, in seconds; bandwidth in bytes a second."""

    work: Workload
    ours: float
    sdpa: float
    reference: float
    read_bandwidth: float


def measure(work: Workload) -> Row:
    """All of them in turn, some times in a row, so that whatever else the machine does meets all alike."""
    from minillm.kernels.cpu.paged_attention import paged_attention

    options = {"max_query_len": 1, "scale": HEAD_DIM**-0.5}
    one = inputs(work)
    copies = [(one[0], pool(one[1]), pool(one[2]), *one[3:]) for _ in range(max(2, TOGETHER // work.num_bytes))]
    stream = torch.randn(TOGETHER // 4)
    ways: dict[str, Callable[..., Tensor]] = {
        "ours": lambda *given: paged_attention(*given, **options),
        "sdpa": gathered_sdpa,
        "reference": lambda *given: reference.paged_attention(*given, **options),
        "read": lambda *_: stream.sum(),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    ways["ours"](*one)
    turn = 0
    for _ in range(ROUNDS):
        for name, way in ways.items():
            for _ in range(IN_A_ROW):
                turn += 1
                start = time.perf_counter()
                way(*copies[turn % len(copies)])
                times[name].append(time.perf_counter() - start)
    found = {name: median(each) for name, each in times.items()}
    return Row(work, found["ours"], found["sdpa"], found["reference"], stream.nbytes / found["read"])


SCALE = HEAD_DIM**-0.5


def queries_table() -> Table:
    """Many queries of one sequence: each as a sequence of its own through the kernel, or together by PyTorch's way."""
    from minillm.kernels.cpu.paged_attention import MANY_QUERIES, MANY_SCORES, paged_attention

    taken = f"taken from {MANY_QUERIES} queries and {MANY_SCORES:,} queries × keys on"
    title = f"n queries behind a prefix, ms by kernel / gather + SDPA ({taken})"
    counts = (2, 8, 16, 32, 128, 512)
    table = Table("prefix", "dtype", *map(str, counts), title=title)
    for prefix in (0, 512):
        for dtype in (torch.float32, torch.bfloat16):
            cells = []
            for n in counts:
                lengths = torch.arange(prefix + 1, prefix + n + 1)
                _, *caches, tables, _, _ = inputs(Workload("", torch.tensor([prefix + n]), dtype))
                q = torch.randn(n, KV_HEADS * GROUP, HEAD_DIM, dtype=dtype)
                alone = (q, *caches, tables.repeat(n, 1), torch.arange(n + 1), lengths)
                together = (q, *caches, tables, torch.tensor([0, n]), lengths[-1:])
                ways = [
                    partial(paged_attention, *alone, max_query_len=1, scale=SCALE),
                    partial(reference.paged_attention, *together, max_query_len=n, scale=SCALE),
                ]
                cells.append(" / ".join(f"{seconds * 1e3:.2f}" for seconds in seconds_in_turn(ways, 15, warm_ups=3)))
            table.add_row(f"{prefix}", str(dtype).removeprefix("torch."), *cells)
    return table


def threads_table() -> Table:
    """One sequence by one thread and by all of them."""
    from minillm.kernels.cpu import paged_attention as kernel

    counts = (64, 128, 256, 512, 1024, 4096)
    title = f"one sequence of n keys, µs by one thread / all (from {kernel.MIN_TILES_PER_THREAD} tiles for each on)"
    table = Table("dtype", *map(str, counts), title=title)
    for dtype in (torch.float32, torch.bfloat16):
        cells = []
        for keys in counts:
            given = inputs(Workload("", torch.tensor([keys]), dtype))

            def run(least: int, given: tuple[Tensor, ...] = given) -> None:
                with patch.object(kernel, "MIN_TILES_PER_THREAD", least):
                    kernel.paged_attention(*given, max_query_len=1, scale=SCALE)

            found = seconds_in_turn([partial(run, 2**30), partial(run, 1)], 200, warm_ups=20)
            cells.append(" / ".join(f"{seconds * 1e6:.0f}" for seconds in found))
        table.add_row(str(dtype).removeprefix("torch."), *cells)
    return table


def turns_table() -> Table:
    """PyTorch's matrix products and our attention: each alone, then one after the other, as in a step."""
    from minillm.kernels.cpu.paged_attention import paged_attention

    given = inputs(workloads()[0])
    x, weight = torch.randn(64, 576), torch.randn(1536, 576)

    def products() -> None:
        for _ in range(8):
            F.linear(x, weight)

    def attention() -> None:
        paged_attention(*given, max_query_len=1, scale=SCALE)

    alone = [seconds_in_turn([work], 200, warm_ups=20)[0] for work in (products, attention)]
    turns = seconds_in_turn([products, attention], 200, warm_ups=20)
    table = Table("", "alone, ms", "in turn, ms", title="PyTorch's threads and Numba's")
    for name, one, both in zip(("eight products of 64 rows", "attention of 64 sequences"), alone, turns, strict=True):
        table.add_row(name, f"{one * 1e3:.2f}", f"{both * 1e3:.2f}")
    return table


@torch.inference_mode()
def main() -> None:
    """Measure, and print tables; that of the bars last."""
    Console(width=120).print(turns_table(), threads_table(), queries_table())
    columns = (
        "sequences",
        "dtype",
        "ours, ms",
        "GB/s",
        "of reading",
        "gather + SDPA, ms",
        "ours is faster",
        "reference, ms",
    )
    table = Table(*columns, title=f"{torch.get_num_threads()} threads; 9/3 heads of 64, blocks of 16; medians, cold")
    for row in map(measure, workloads()):
        speed = row.work.num_bytes / row.ours
        table.add_row(
            row.work.name,
            str(row.work.dtype).removeprefix("torch."),
            f"{row.ours * 1e3:.2f}",
            f"{speed / 1e9:.1f}",
            f"{speed / row.read_bandwidth:.0%}",
            f"{row.sdpa * 1e3:.2f}",
            f"{row.sdpa / row.ours:.1f}×",
            f"{row.reference * 1e3:.2f}",
        )
    Console(width=120).print(table)
