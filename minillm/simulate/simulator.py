"""A serving engine without a model: the real scheduler and allocator, a clock that is moved by a cost model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minillm.cache.block_pool import BlockPool
from minillm.engine.engine import Engine
from minillm.engine.outputs import RequestMetrics, TokenLogprobs
from minillm.engine.params import RequestOutputKind, SamplingParams
from minillm.engine.request import Request
from minillm.engine.runner import StepLogits
from minillm.engine.sampler import Choice
from minillm.engine.scheduler import Schedule, Scheduler, SchedulerConfig
from minillm.engine.trace import Trace
from minillm.errors import ConfigError, InvalidRequestError
from minillm.simulate.trace import Arrival


@dataclass(frozen=True)
class CostModel:
    """What a step takes, in seconds: a fixed part, one a token computed, one a stored token that is read.

    The defaults are of the order of an 8-billion-parameter model on one data-centre GPU: 16 GB of weights read at 3
    TB/s, 16 GFLOP a token at 400 TFLOP/s, 128 KiB of keys and values a token at 3 TB/s.
    """

    step: float = 5.3e-3
    token: float = 4.0e-5
    stored_token: float = 4.4e-8

    def __post_init__(self) -> None:
        if min(self.step, self.token, self.stored_token) < 0 or self.step + self.token <= 0:
            raise ConfigError("a cost model needs costs of 0 or more, and step or token above 0: time must pass")

    def seconds(self, step: Schedule) -> float:
        """Of one step."""
        stored = sum(part.start + part.count for part in step.scheduled)
        return self.step + self.token * step.num_tokens + self.stored_token * stored


class VirtualClock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimeKeeper:
    """A runner that computes nothing and takes the time that computing would."""

    def __init__(self, cost: CostModel, clock: VirtualClock) -> None:
        self.cost = cost
        self.clock = clock

    def compute(self, step: Schedule) -> StepLogits:
        self.clock.now += self.cost.seconds(step)
        return StepLogits(torch.empty(sum(part.samples for part in step.scheduled), 0), {})

    def check(self) -> None:
        """Nothing can fail."""

    def close(self) -> None:
        """Nothing to give back."""


class AnyToken:
    """A sampler that writes token 0."""

    def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> list[Choice]:
        return [Choice(0)] * len(requests)

    def logprobs(self, logits: torch.Tensor, token: int, count: int) -> TokenLogprobs:
        return {}


@dataclass(frozen=True)
class Simulation:
    """What came of it.

    Attributes:
        metrics: of each request, in order of arrival.
        trace: every step.
        seconds: from the first arrival to the last answer.
    """

    arrivals: list[Arrival]
    metrics: list[RequestMetrics]
    trace: Trace
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(arrival.output_tokens for arrival in self.arrivals) / self.seconds


def simulate(
    arrivals: Sequence[Arrival],
    *,
    num_blocks: int,
    block_size: int = 16,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 2048,
    max_model_len: int = 16_384,
    cost: CostModel | None = None,
) -> Simulation:
    """Serve a trace of requests; every prompt is different, so that no prefix is shared.

    Raises:
        InvalidRequestError: a request that is longer than `max_model_len` or could never fit.
    """
    pool = BlockPool(num_blocks, block_size, enable_prefix_caching=False)
    scheduler = Scheduler(SchedulerConfig(max_num_seqs, max_num_batched_tokens, max_model_len), pool)
    return serve(arrivals, scheduler, cost or CostModel())


def serve(arrivals: Sequence[Arrival], scheduler: Scheduler, cost: CostModel) -> Simulation:
    """Serve a trace of requests with this scheduler, on a virtual clock; request number i is called str(i).

    Raises:
        InvalidRequestError: no request, one that the engine refuses, or whose answer it would cut short.
    """
    if not arrivals:
        raise InvalidRequestError("there are no arrivals: give at least one")
    longest = scheduler.config.max_model_len
    for arrival in arrivals:
        if not math.isfinite(arrival.time):
            raise InvalidRequestError(f"a request comes at {arrival.time}: give a finite time")
        if arrival.prompt_tokens + arrival.output_tokens > longest:
            raise InvalidRequestError(
                f"a request has {arrival.prompt_tokens} prompt tokens and {arrival.output_tokens} output tokens, "
                f"together more than max_model_len={longest}: leave it out or raise max_model_len"
            )
    clock, trace = VirtualClock(), Trace()
    engine = Engine(scheduler, TimeKeeper(cost, clock), AnyToken(), vocab_size=1, clock=clock, trace=trace)
    arrivals, metrics = sorted(arrivals, key=lambda arrival: arrival.time), {}
    coming = 0
    while coming < len(arrivals) or engine.has_unfinished_requests:
        if not engine.has_unfinished_requests:
            clock.now = max(clock.now, arrivals[coming].time)
        while coming < len(arrivals) and arrivals[coming].time <= clock.now:
            _add(engine, coming, arrivals[coming])
            coming += 1
        for output in engine.step():
            assert output.metrics is not None, "the engine gives metrics"
            metrics[int(output.request_id)] = output.metrics
    return Simulation(
        arrivals, [metrics[number] for number in range(len(arrivals))], trace, clock.now - arrivals[0].time
    )


def _add(engine: Engine, number: int, arrival: Arrival) -> None:
    params = SamplingParams(
        temperature=0,
        max_tokens=arrival.output_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    engine.add_request(str(number), [0] * arrival.prompt_tokens, params, arrival_time=arrival.time)
