"""Time on a CPU and on a GPU, and what a GPU's memory can do at best."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch


def seconds_in_turn(works: Sequence[Callable[[], object]], rounds: int, *, warm_ups: int) -> list[float]:
    """Median seconds of each on the CPU, one after the other in every round; the first rounds do not count."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(warm_ups + rounds):
        for work, found in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            found.append(time.perf_counter() - start)
    return [median(found[warm_ups:]) for found in times]


def graph_seconds(works: Sequence[Callable[[], object]], repeats: int = 7) -> float:
    """Seconds of one of `works` on the GPU alone: all are recorded in a CUDA graph, one after the other, and replayed.

    Give several that read different memory, so that none finds its data in the cache that another one left.
    """
    for work in works[:2]:
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    graph.replay()
    times = [_event_seconds(graph.replay) for _ in range(repeats)]
    return median(times) / len(works)


def _event_seconds(work: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_bandwidth(num_bytes: int = 2**32) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.randint(0, 100, (num_bytes // 8,), device="cuda")
    target = torch.empty_like(source)
    seconds = median(_event_seconds(lambda: target.copy_(source)) for _ in range(9))
    return 2 * source.nbytes / seconds
