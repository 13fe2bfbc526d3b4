"""Decode steps recorded once as CUDA graphs and replayed: one launch instead of hundreds.

A step that computes one token for each sequence runs the same kernels every time; only what lies in its input tensors
differs. On a small model, asking for these kernels one by one takes longer than running them. Graphs are recorded for a
ladder of batch sizes, and a step takes the next larger one: its surplus rows have no keys, write nothing, and are cut
off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from minillm.engine.runner import ModelRunner

LARGEST = 512


def ladder(max_num_seqs: int) -> list[int]:
    """Batch sizes to record, at most twice as large as what is needed for few sequences, 8 more for many."""
    top = min(max_num_seqs, LARGEST)
    return sorted({size for size in (1, 2, 4, *range(8, top + 1, 8), top) if size <= top})


class DecodeGraphs:
    """Graphs of decode steps of a runner.

    Args:
        sizes: the batch sizes to record.
    """

    def __init__(self, runner: ModelRunner, sizes: list[int]) -> None:
        self.sizes = sizes
        shape = (max(sizes), runner.decoder.config.vocab_size)
        self.logits = torch.empty(shape, dtype=torch.float32, device=runner.device)  # of whichever graph ran last
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(runner.device)  # one for all: each keeps a workspace of its own
        for size in reversed(sizes):  # the largest first: the others then live in the memory that it needed
            self.graphs[size] = self._record(runner, size, pool, stream)

    @torch.inference_mode()
    def _record(self, runner: ModelRunner, size: int, pool: Any, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        batch = runner.empty_decode_batch(size)

        def step() -> None:
            self.logits[:size] = runner.decoder.logits(runner.run(batch))

        stream.wait_stream(torch.cuda.current_stream(runner.device))
        with torch.cuda.stream(stream):
            step()  # compiles what must be compiled, outside of the recording
        torch.cuda.current_stream(runner.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            step()
        return graph

    def size_for(self, rows: int) -> int | None:
        """The smallest recorded batch that holds so many rows."""
        return next((size for size in self.sizes if size >= rows), None)

    def replay(self, size: int) -> Float[Tensor, "rows vocab"]:
        """Run a recorded step on what lies in the runner's input tensors; valid until the next replay."""
        self.graphs[size].replay()
        return self.logits[:size]
