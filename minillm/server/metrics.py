"""What `/metrics` tells Prometheus: vLLM's names, with the prefix `minillm:`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from minillm.engine.engine import Engine
from minillm.engine.outputs import RequestMetrics, RequestOutput

PREFIX = "minillm:"
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 40.0, 160.0)
LONG = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 480.0, 1920.0)
TOKENS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))

WHEN_FIRST = "Observed with the first token where answers are streamed, at the end otherwise."
HISTOGRAMS = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token. " + WHEN_FIRST, SHORT),
    "inter_token_latency_seconds": ("From one token of an answer to its next, of those that are streamed.", SHORT),
    "request_time_per_output_token_seconds": ("Mean time of a token after the first.", SHORT),
    "e2e_request_latency_seconds": ("From a request's arrival to its end.", LONG),
    "request_queue_time_seconds": ("From a request's arrival to its first step. " + WHEN_FIRST, LONG),
    "request_prefill_time_seconds": ("From a request's first step to its first token. " + WHEN_FIRST, LONG),
    "request_decode_time_seconds": ("From a request's first token to its end.", LONG),
    "request_inference_time_seconds": ("From a request's first step to its end.", LONG),
    "request_prompt_tokens": ("Tokens of a prompt.", TOKENS),
    "request_generation_tokens": ("Tokens of a request's answers.", TOKENS),
}

COUNTERS = {
    "prompt_tokens": "Tokens of prompts that were begun.",
    "generation_tokens": "Tokens written.",
    "prefix_cache_queries": "Tokens of prompts that were looked for in memory.",
    "prefix_cache_hits": "Tokens of prompts that were found in memory.",
    "num_preemptions": "How often a request's memory was taken, to be computed again.",
}
"""Those of `EngineCounts`, by its names."""


class EngineCollector(Collector):
    """Reads the engine's own numbers when Prometheus asks."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The gauges and counters."""
        scheduler = self._engine.scheduler
        pool = scheduler.pool
        for name, told, value in (
            ("num_requests_running", "Requests in the batch.", len(scheduler.running)),
            ("num_requests_waiting", "Requests in the queue.", len(scheduler.waiting)),
            ("kv_cache_usage_perc", "Share of the blocks that is held.", 1 - pool.num_free / pool.num_blocks),
        ):
            gauge = GaugeMetricFamily(PREFIX + name, told, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, told in COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, told, labels=["model_name"])
            counter.add_metric([self._model_name], getattr(self._engine.counts, name))
            yield counter


@dataclass
class _Unfinished:
    """What has been seen of a request.

    Attributes:
        written: tokens of all its answers.
        last: answer → when its last token came, in seconds of the engine's clock.
    """

    has_first_token: bool = False
    written: int = 0
    last: dict[int, float] = field(default_factory=dict)


class ServerMetrics:
    """Histograms over requests, and the registry that holds everything."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine, model_name))
        self._histograms = {
            name: Histogram(PREFIX + name, told, ["model_name"], registry=self.registry, buckets=buckets).labels(
                model_name
            )
            for name, (told, buckets) in HISTOGRAMS.items()
        }
        self._success = Counter(
            PREFIX + "request_success",
            "Answers that have ended, by how.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._model_name = model_name
        self._unfinished: dict[str, _Unfinished] = {}

    def observe(self, outputs: list[RequestOutput], now: float) -> None:
        """Take a step's outputs in; called in the engine's thread.

        Args:
            now: the engine's clock.
        """
        for output in outputs:
            seen = self._unfinished.setdefault(output.request_id, _Unfinished())
            self._take_tokens(seen, output, now)
            if output.finished:
                del self._unfinished[output.request_id]
                for answer in output.outputs:
                    self._success.labels(self._model_name, answer.finish_reason).inc()
                if all(answer.finish_reason != "abort" for answer in output.outputs):
                    self._take_end(seen, output, now)

    def _take_tokens(self, seen: _Unfinished, output: RequestOutput, now: float) -> None:
        times = _times(output)
        if times.first_token_time is not None and not seen.has_first_token:
            assert times.first_scheduled_time is not None, "what has a token was begun"
            seen.has_first_token = True
            self._observe(
                time_to_first_token_seconds=times.first_token_time - times.arrival_time,
                request_queue_time_seconds=times.first_scheduled_time - times.arrival_time,
                request_prefill_time_seconds=times.first_token_time - times.first_scheduled_time,
            )
        for answer in output.outputs:
            if not answer.token_ids:
                continue
            if answer.index in seen.last:
                self._observe(inter_token_latency_seconds=now - seen.last[answer.index])
            seen.last[answer.index] = now
            seen.written += len(answer.token_ids)

    def _take_end(self, seen: _Unfinished, output: RequestOutput, now: float) -> None:
        times = _times(output)
        assert times.first_scheduled_time is not None, "what has ended was begun"
        self._observe(
            e2e_request_latency_seconds=now - times.arrival_time,
            request_inference_time_seconds=now - times.first_scheduled_time,
            request_prompt_tokens=len(output.prompt_token_ids),
            request_generation_tokens=seen.written,
        )
        if times.first_token_time is None:  # no token could be chosen
            self._observe(request_queue_time_seconds=times.first_scheduled_time - times.arrival_time)
            return
        seconds, later = now - times.first_token_time, seen.written // len(output.outputs) - 1
        self._observe(request_decode_time_seconds=seconds)
        if seen.written > len(output.outputs):
            self._observe(request_time_per_output_token_seconds=seconds / max(1, later))

    def _observe(self, **values: float) -> None:
        for name, value in values.items():
            self._histograms[name].observe(value)


def _times(output: RequestOutput) -> RequestMetrics:
    assert output.metrics is not None, "the engine keeps times"
    return output.metrics
