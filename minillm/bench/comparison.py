"""What a comparison found out: every run, medians, and what the machine could do at best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from minillm.bench.limits import Limit, ModelCost, Rates, limit
from minillm.bench.processes import QUIET
from minillm.bench.worker import common_beginning
from minillm.bench.workloads import WORKLOADS, Workload
from minillm.transformer.decoder import DecoderConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
        vllm, llama_cpp: Pythons of the environments in which vllm and llama-cpp-python are installed.
        engines: only these; None for all that there are, but minillm with quantised weights.
        threads: of every engine.
        output_json: every run, and what the tables say.
        plot: a picture (.png, .svg, .pdf).
    """

    model: str = DEFAULT_MODEL
    dtypes: Sequence[str] = tuple(DTYPES)
    workloads: Sequence[str] = WORKLOADS
    engines: Sequence[str] | None = None
    vllm: Path | None = None
    llama_cpp: Path | None = None
    repeats: int = 5
    threads: int = 2
    output_json: Path | None = None
    plot: Path | None = None


class Run(NamedTuple):
    """One measurement.

    Attributes:
        peak_bytes: memory that the engine's processes held at most meanwhile.
        others: cores that other processes kept busy meanwhile.
        discarded: measurements before it that others had disturbed.
        answers: the tokens written.
    """

    first_token_seconds: float
    seconds: float
    answers: list[list[int]]
    peak_bytes: int | None
    others: float | None
    discarded: int

    @property
    def was_quiet(self) -> bool:
        return self.others is None or self.others <= QUIET


@dataclass
class Result:
    """An engine on a workload."""

    engine: str
    dtype: str
    work: Workload
    runs: list[Run] = field(default_factory=list)
    error: str | None = None

    @property
    def first_token_seconds(self) -> float:
        return median(run.first_token_seconds for run in self.runs)

    @property
    def tokens_per_second(self) -> float:
        return median(rate(self.work, run.first_token_seconds, run.seconds) for run in self.runs)

    @property
    def peak_bytes(self) -> int | None:
        peaks = [run.peak_bytes for run in self.runs if run.peak_bytes is not None]
        return max(peaks, default=None)

    def same_tokens(self, other: Result) -> float:
        """Share of the tokens that both wrote alike from the beginning of each answer."""
        pairs = zip(self.runs[-1].answers, other.runs[-1].answers, strict=True)
        return sum(common_beginning(list(pair)) for pair in pairs) / self.work.output_tokens


def rate(work: Workload, first_token_seconds: float, seconds: float) -> float:
    """Tokens a second: of a single request those after the first token, of many all, in all the time."""
    if work.is_single:
        return (work.output_tokens - 1) / (seconds - first_token_seconds)
    return work.output_tokens / seconds


@dataclass
class Comparison:
    """All that was found out."""

    options: Options
    config: DecoderConfig
    works: list[Workload]
    versions: dict[str, str] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    rates: dict[str, Rates] = field(default_factory=dict)

    def result(self, engine: str, dtype: str, work: Workload) -> Result | None:
        found = (one for one in self.results if (one.engine, one.dtype, one.work) == (engine, dtype, work))
        return next(found, None)

    def limit(self, dtype: str, work: Workload) -> Limit:
        """What the machine could do at best."""
        return limit(work, ModelCost.of(self.config, DTYPES[dtype]), self.rates[dtype])

    @property
    def runs(self) -> list[Run]:
        return [run for result in self.results for run in result.runs]

    @property
    def num_discarded(self) -> int:
        return sum(run.discarded for run in self.runs)
