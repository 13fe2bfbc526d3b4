"""What a machine could do at best: how fast it reads memory and multiplies matrices, and what that allows a model.

A step reads every weight once and every key and value that it looks at; it cannot be faster than its bytes over the
read bandwidth, nor than its arithmetic over the matrix rate (Williams et al. 2009, "Roofline").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F

from minillm.bench.timing import seconds_in_turn
from minillm.bench.workloads import Workload
from minillm.models.gguf import gguf_config
from minillm.models.loader import num_parameters, read_config, translate
from minillm.transformer.decoder import Decoder, DecoderConfig
from minillm.transformer.linear import packed_linear

READ_BYTES = 2**29
"""Many times what a last-level cache holds."""
MATRIX_SIZE = 2048
REPEATS = 5


class Rates(NamedTuple):
    """Of a machine: bytes a second that it reads, and operations a second of matrix products in a dtype."""

    read_bandwidth: float
    matrix_flops: float

    @classmethod
    def median(cls, found: Sequence[Rates]) -> Rates:
        """Of several measurements."""
        return cls(*map(median, zip(*found, strict=True)))


def measure_rates(dtype: torch.dtype) -> Rates:
    """Measure this machine, with PyTorch's number of threads.

    Matrix products are tried as PyTorch does them and, where it has that, as oneDNN does them on packed weights; in
    bfloat16 also as float32, which a machine without instructions for it can convert to. The fastest counts.
    """
    stream = torch.ones(READ_BYTES // 4)
    bandwidth = READ_BYTES / _seconds(stream.sum)
    del stream
    ways = [way for kind in {dtype, torch.float32} for way in _products(kind)]
    return Rates(bandwidth, 2 * MATRIX_SIZE**3 / min(map(_seconds, ways)))


def _products(dtype: torch.dtype) -> list[Callable[[], object]]:
    """Ways to multiply two square matrices."""
    x, w = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE).to(dtype)
    ways: list[Callable[[], object]] = [lambda: F.linear(x, w)]
    packed = packed_linear(w)
    if packed is not None:
        ways.append(lambda: packed(x))
    return ways


def _seconds(work: Callable[[], object]) -> float:
    """Median over a few runs after one that warms up."""
    return seconds_in_turn([work], REPEATS, warm_ups=1)[0]


@dataclass(frozen=True)
class ModelCost:
    """What a model's arithmetic and reading come from.

    Attributes:
        body: numbers in all matrices but the head.
        head: numbers in the head.
        channels: query channels over all heads and layers.
        kv_channels: key channels over all heads and layers; values have as many.
        itemsize: bytes of a number.
    """

    body: int
    head: int
    channels: int
    kv_channels: int
    itemsize: int

    @classmethod
    def of(cls, config: DecoderConfig, dtype: torch.dtype) -> ModelCost:
        with torch.device("meta"):
            parameters = num_parameters(Decoder(config))
        embedding = config.vocab_size * (config.embedding_size or config.hidden_size)
        tables = embedding if config.tied_head else 2 * embedding
        layers = len(config.layers)
        return cls(
            parameters - tables,
            embedding,
            layers * config.num_heads * config.head_dim,
            layers * config.num_kv_heads * config.head_dim,
            dtype.itemsize,
        )

    def step_seconds(self, rates: Rates, tokens: int, rows: int, pairs: int, keys: int) -> float:
        """The least time of a step.

        Args:
            tokens: that go through the layers.
            rows: of logits.
            pairs: of a query and a key that it sees.
            keys: that are read from memory.
        """
        flops = 2 * self.body * tokens + 2 * self.head * rows + 4 * self.channels * pairs
        num_bytes = self.itemsize * (self.body + self.head + 2 * self.kv_channels * keys)
        return max(flops / rates.matrix_flops, num_bytes / rates.read_bandwidth)


class Limit(NamedTuple):
    """The least seconds of a workload: until all prompts are computed, and in all."""

    first_token_seconds: float
    seconds: float


def limit(work: Workload, cost: ModelCost, rates: Rates) -> Limit:
    """All prompts in one step, a common beginning only once; then all requests together, a token each a step."""
    shared, prompts = work.shared_prefix, [len(ask.prompt) for ask in work.asks]
    tokens = shared + sum(prompts) - shared * len(prompts)
    pairs = _triangle(shared) + sum(_triangle(length) - _triangle(shared) for length in prompts)
    first = seconds = cost.step_seconds(rates, tokens, len(prompts), pairs, 0)
    for step in range(1, max(ask.output_len for ask in work.asks)):
        alive = [len(ask.prompt) + step for ask in work.asks if ask.output_len > step]
        keys = shared + sum(alive) - shared * len(alive)
        seconds += cost.step_seconds(rates, len(alive), len(alive), sum(alive), keys)
    return Limit(first, seconds)


def _triangle(length: int) -> int:
    """Pairs of a query and a key before it or itself."""
    return length * (length + 1) // 2


def model_config(path: Path) -> DecoderConfig:
    """The configuration of a GGUF file or a model folder."""
    return gguf_config(path)[1] if path.suffix == ".gguf" else translate(read_config(path))[1]
