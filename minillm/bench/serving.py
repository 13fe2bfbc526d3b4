"""What a load on a server showed: when each request was sent, and when its answer came; metrics, named as vLLM's.

TTFT is the time from sending a request to the first piece of its answer, E2EL to the last; ITL the time between two
pieces; TPOT (E2EL − TTFT) / (tokens − 1), for answers of several tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from rich.table import Table

from minillm.errors import ConfigError

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
OBJECTIVES = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2e_s"}
"""Metrics of which a request has one value, and the attributes of a `Record` that are it."""


@dataclass
class Record:
    """One request.

    Attributes:
        start_s: when it was sent, in seconds after the start of the measurement.
        pieces_s: when the pieces of its answer came; a piece is a token, or several at once.
        input_tokens, output_tokens: as the server counted them.
        error: why it failed, where it did.
    """

    start_s: float
    pieces_s: list[float] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.pieces_s[0] - self.start_s

    @property
    def e2e_s(self) -> float:
        return self.pieces_s[-1] - self.start_s

    @property
    def itl_s(self) -> list[float]:
        return np.diff(self.pieces_s).tolist()

    @property
    def tpot_s(self) -> float:
        """0 for an answer of one token."""
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


@dataclass(frozen=True)
class ServeResult:
    """What was measured; times in seconds.

    Attributes:
        model: as the server calls it.
        records: the requests that were answered or failed, in the order in which they were sent.
        duration_s: from the start until the last answer had come.
        request_rate: requests a second that were to be sent; infinite where all were sent at once.
        max_concurrency: requests that were on their way at the same time at most, where that was limited.
    """

    model: str
    records: list[Record]
    duration_s: float
    request_rate: float = math.inf
    max_concurrency: int | None = None

    @property
    def completed(self) -> list[Record]:
        return [record for record in self.records if record.error is None]

    @property
    def errors(self) -> list[str]:
        return [record.error for record in self.records if record.error is not None]

    @property
    def num_completed(self) -> int:
        return len(self.completed)

    @property
    def num_failed(self) -> int:
        return len(self.errors)

    @property
    def input_tokens(self) -> int:
        """Of the completed requests, as are all the following."""
        return sum(record.input_tokens for record in self.completed)

    @property
    def output_tokens(self) -> int:
        return sum(record.output_tokens for record in self.completed)

    @property
    def ttft_s(self) -> Float[ndarray, "requests"]:
        return np.array([record.ttft_s for record in self.completed])

    @property
    def tpot_s(self) -> Float[ndarray, "requests_of_several_tokens"]:
        return np.array([record.tpot_s for record in self.completed if record.output_tokens > 1])

    @property
    def itl_s(self) -> Float[ndarray, "gaps"]:
        return np.array([gap for record in self.completed for gap in record.itl_s])

    @property
    def e2e_s(self) -> Float[ndarray, "requests"]:
        return np.array([record.e2e_s for record in self.completed])

    def values(self, metric: str) -> Float[ndarray, "values"]:
        """All of one of `METRICS`, in seconds.

        Raises:
            ConfigError: there is no such metric.
        """
        if metric not in METRICS:
            raise ConfigError(f"metric {metric!r} is not one of {', '.join(METRICS)}")
        return {"ttft": self.ttft_s, "tpot": self.tpot_s, "itl": self.itl_s, "e2el": self.e2e_s}[metric]

    def percentile(self, metric: str, percent: float) -> float:
        """Seconds that `percent` of a metric's values do not exceed; NaN where there are none.

        Raises:
            ConfigError: there is no such metric, or no such percentile.
        """
        values = self.values(metric)
        if not 0 <= percent <= 100:
            raise ConfigError(f"percentile {percent} is not between 0 and 100")
        return float(np.percentile(values, percent)) if len(values) else math.nan

    def mean(self, metric: str) -> float:
        """As `percentile`."""
        values = self.values(metric)
        return float(values.mean()) if len(values) else math.nan

    def std(self, metric: str) -> float:
        """As `percentile`."""
        values = self.values(metric)
        return float(values.std()) if len(values) else math.nan

    def per_second(self, count: float) -> float:
        """A count of the whole measurement as a rate."""
        return count / self.duration_s if self.duration_s > 0 else math.nan

    def goodput(self, *, ttft_s: float = math.inf, tpot_s: float = math.inf, e2e_s: float = math.inf) -> float:
        """Completed requests a second that kept to all objectives (Zhong et al. 2024, "DistServe", §2)."""
        good = [one.ttft_s <= ttft_s and one.tpot_s <= tpot_s and one.e2e_s <= e2e_s for one in self.completed]
        return self.per_second(sum(good))

    @property
    def peak_concurrency(self) -> int:
        """The most completed requests that were on their way at the same time."""
        events = [(one.start_s, 1) for one in self.completed] + [(one.pieces_s[-1], -1) for one in self.completed]
        changes = [change for _, change in sorted(events)]  # one that ends when another begins comes first
        return int(np.cumsum(changes).max(initial=0))

    def table(
        self,
        metrics: Sequence[str] = tuple(METRICS),
        percentiles: Sequence[float] = (99,),
        objectives: Mapping[str, float] | None = None,
    ) -> Table:
        """As `vllm bench serve` prints it.

        Args:
            objectives: milliseconds, by the names of `OBJECTIVES`, for the goodput.

        Raises:
            ConfigError: as `percentile`, or there is no such objective.
        """
        table = Table(title="Serving Benchmark Result", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for _, name, value in self._totals(objectives):
            if value is not None:
                table.add_row(name, str(value) if isinstance(value, int) else _shown(value))
        for metric in metrics:
            summary = self._summary(metric, percentiles)
            table.add_section()
            table.add_row(METRICS[metric], style="bold")
            for name, seconds in summary.items():
                table.add_row(f"{name} {metric.upper()} (ms)", _shown(1000 * seconds))
        return table

    def _totals(self, objectives: Mapping[str, float] | None) -> list[tuple[str, str, int | float | None]]:
        """vLLM's names in JSON and in the table, and the values."""
        tokens = self.input_tokens + self.output_tokens
        rate = None if math.isinf(self.request_rate) else self.request_rate
        goodput = self.goodput(**in_seconds(objectives)) if objectives else None
        return [
            ("completed", "Successful requests", self.num_completed),
            ("failed", "Failed requests", self.num_failed),
            ("max_concurrency", "Maximum request concurrency", self.max_concurrency),
            ("request_rate", "Request rate configured (RPS)", rate),
            ("duration", "Benchmark duration (s)", self.duration_s),
            ("total_input_tokens", "Total input tokens", self.input_tokens),
            ("total_output_tokens", "Total generated tokens", self.output_tokens),
            ("request_throughput", "Request throughput (req/s)", self.per_second(self.num_completed)),
            ("request_goodput", "Request goodput (req/s)", goodput),
            ("output_throughput", "Output token throughput (tok/s)", self.per_second(self.output_tokens)),
            ("max_concurrent_requests", "Peak concurrent requests", self.peak_concurrency),
            ("total_token_throughput", "Total token throughput (tok/s)", self.per_second(tokens)),
        ]

    def _summary(self, metric: str, percentiles: Sequence[float]) -> dict[str, float]:
        found = {"Mean": self.mean(metric), "Median": self.percentile(metric, 50)}
        return found | {f"P{percent:g}": self.percentile(metric, percent) for percent in percentiles}

    def as_json(
        self,
        metrics: Sequence[str] = tuple(METRICS),
        percentiles: Sequence[float] = (99,),
        objectives: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """As `vllm bench serve` saves it, every request's times with it; what is not known is None.

        Args and raises: as `table`.
        """
        found: dict[str, Any] = {"model_id": self.model}
        found |= {name: _known(value) for name, _, value in self._totals(objectives)}
        if math.isinf(self.request_rate):
            found["request_rate"] = "inf"
        for metric in metrics:
            summary = self._summary(metric, percentiles) | {"Std": self.std(metric)}
            found |= {f"{name.lower()}_{metric}_ms": _known(1000 * seconds) for name, seconds in summary.items()}
        return found | self._each_request()

    def _each_request(self) -> dict[str, Any]:
        return {
            "start_times": [one.start_s for one in self.records],
            "input_lens": [one.input_tokens for one in self.records],
            "output_lens": [one.output_tokens for one in self.records],
            "ttfts": [one.ttft_s if one.error is None else None for one in self.records],
            "itls": [one.itl_s for one in self.records],
            "latencies": [one.e2e_s if one.error is None else None for one in self.records],
            "errors": [one.error or "" for one in self.records],
        }


def in_seconds(objectives: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds by the names of `OBJECTIVES`, as arguments of `ServeResult.goodput`.

    Raises:
        ConfigError: there is no such objective.
    """
    if unknown := [name for name in objectives if name not in OBJECTIVES]:
        raise ConfigError(f"objective {unknown[0]!r} is not one of {', '.join(OBJECTIVES)}")
    return {OBJECTIVES[name]: milliseconds / 1000 for name, milliseconds in objectives.items()}


def _shown(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
