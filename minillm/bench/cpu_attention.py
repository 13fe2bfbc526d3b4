"""Decode attention on the CPU: ours against gathering and PyTorch's fused attention, and against reading alone.

Keys and values are read cold: copies of them, together several times as large as the last cache, take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from minillm.cache import reference

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
    copies = [(one[0], one[1].clone(), one[2].clone(), *one[3:]) for _ in range(max(2, TOGETHER // work.num_bytes))]
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


def main() -> None:
    """Measure, and print a table last."""
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
