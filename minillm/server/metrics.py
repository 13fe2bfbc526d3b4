"""What `/metrics` tells Prometheus: vLLM's names, with the prefix `minillm:`."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from minillm.engine.engine import Engine
from minillm.engine.outputs import RequestOutput

PREFIX = "minillm:"
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 40.0, 160.0)
LONG = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 480.0, 1920.0)
TOKENS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))

HISTOGRAMS = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", SHORT),
    "inter_token_latency_seconds": ("From one token to the next, of streamed answers.", SHORT),
    "request_time_per_output_token_seconds": ("Mean time of a token after the first.", SHORT),
    "e2e_request_latency_seconds": ("From a request's arrival to its end.", LONG),
    "request_queue_time_seconds": ("From a request's arrival to its first step.", LONG),
    "request_prefill_time_seconds": ("From a request's first step to its first token.", LONG),
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
        self._last: dict[str, float] = {}
        self._written: dict[str, int] = {}

    def observe(self, outputs: list[RequestOutput], now: float) -> None:
        """Take a step's outputs in; called in the engine's thread.

        Args:
            now: the engine's clock.
        """
        for output in outputs:
            name = output.request_id
            written = self._written.get(name, 0) + sum(len(answer.token_ids) for answer in output.outputs)
            if name in self._last:
                self._histograms["inter_token_latency_seconds"].observe(now - self._last[name])
            if output.finished:
                self._last.pop(name, None)
                self._written.pop(name, None)
                for answer in output.outputs:
                    self._success.labels(self._model_name, answer.finish_reason).inc()
                if all(answer.finish_reason != "abort" for answer in output.outputs):
                    self._time(output, written, now)
            else:
                self._last[name], self._written[name] = now, written

    def _time(self, output: RequestOutput, written: int, now: float) -> None:
        times = output.metrics
        assert times is not None, "the engine keeps times"
        assert times.first_scheduled_time is not None, "what has ended was begun"
        seen = {
            "e2e_request_latency_seconds": now - times.arrival_time,
            "request_queue_time_seconds": times.first_scheduled_time - times.arrival_time,
            "request_inference_time_seconds": now - times.first_scheduled_time,
            "request_prompt_tokens": len(output.prompt_token_ids),
            "request_generation_tokens": written,
        }
        first = times.first_token_time
        if first is not None:  # None where no token could be chosen
            longest = max(1, written // len(output.outputs) - 1)
            seen |= {
                "time_to_first_token_seconds": first - times.arrival_time,
                "request_prefill_time_seconds": first - times.first_scheduled_time,
                "request_decode_time_seconds": now - first,
            }
            if written > len(output.outputs):
                seen["request_time_per_output_token_seconds"] = (now - first) / longest
        for name, value in seen.items():
            self._histograms[name].observe(value)
