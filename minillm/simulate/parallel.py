"""Several devices for one trace of requests: a model cut into parts over all of them, or a copy of it on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minillm.errors import ConfigError
from minillm.simulate.simulator import CostModel, Simulation, simulate
from minillm.simulate.trace import Arrival


@dataclass(frozen=True)
class Link:
    """What joins two devices.

    Attributes:
        latency: seconds until a message arrives, however short it is.
        bandwidth: bytes a second, in each direction.
    """

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        if self.latency < 0 or self.bandwidth <= 0:
            raise ConfigError("a link needs a latency of 0 or more seconds and a bandwidth above 0 bytes a second")


NVLINK = Link(2.5e-6, 450e9)
"""Between the GPUs of one machine that are made for it; of this order, likewise the others."""
PCIE = Link(5e-6, 50e9)
"""Between the cards of an ordinary machine."""
NETWORK = Link(3e-5, 12.5e9)
"""100 Gbit/s between machines."""


@dataclass(frozen=True)
class Sums:
    """The all-reduces of one pass; the defaults are those of the 8-billion-parameter model of `CostModel`.

    Attributes:
        count: two for each layer, and the embedding's.
        token_bytes: of one token's numbers in each.
    """

    count: int = 2 * 32 + 1
    token_bytes: int = 4096 * 2

    def seconds(self, tokens: int, size: int, link: Link) -> tuple[float, float]:
        """Of all of them, on a ring of so many devices: waiting for messages, and for their bytes.

        2 (size - 1) messages behind each other, each of 1/size of the numbers (Thakur et al. 2005, §4.5).
        """
        if size < 1:
            raise ConfigError(f"size is a number of devices, at least 1, not {size}")
        messages = self.count * 2 * (size - 1)
        return messages * link.latency, messages * tokens * self.token_bytes / size / link.bandwidth


def sharded_cost(cost: CostModel, size: int, link: Link, sums: Sums | None = None) -> CostModel:
    """What a step takes when a model that costs so much on one device is cut into equal parts over several.

    At best: everything but the sums is divided by `size`, also keys and values, so that it is for as many key/value
    heads as devices or more.
    """
    waiting, sending = (sums or Sums()).seconds(1, size, link)
    return CostModel(cost.step / size + waiting, cost.token / size + sending, cost.stored_token / size)


def simulate_replicas(
    arrivals: Sequence[Arrival], replicas: int, *, num_blocks: int, block_size: int = 16, cost: CostModel | None = None
) -> list[Simulation]:
    """Serve a trace with several copies of an engine, to which the requests go in turn.

    Args:
        num_blocks: of each copy, likewise `cost`.

    Raises:
        ConfigError: not even one copy.
        InvalidRequestError: fewer requests than copies, or one that could never fit.
    """
    if replicas < 1:
        raise ConfigError(f"replicas is a number of copies, at least 1, not {replicas}")
    ordered = sorted(arrivals, key=lambda arrival: arrival.time)
    return [
        simulate(ordered[number::replicas], num_blocks=num_blocks, block_size=block_size, cost=cost)
        for number in range(replicas)
    ]


@dataclass(frozen=True)
class Service:
    """What the users got.

    Attributes:
        seconds_per_token: from a request's arrival to its end, for each token of its answer; the mean of all requests
            ("normalized latency", Kwon et al. 2023, §6.1).
        tokens_per_second: of all answers, from the first arrival to the last end.
    """

    seconds_per_token: float
    tokens_per_second: float

    @classmethod
    def of(cls, simulations: Sequence[Simulation]) -> Service:
        """Of one engine, or of several together."""
        served = [
            (arrival, metrics.finished_time)
            for one in simulations
            for arrival, metrics in zip(one.arrivals, one.metrics, strict=True)
            if metrics.finished_time is not None
        ]
        seconds = max(end for _, end in served) - min(arrival.time for arrival, _ in served)
        waits = [(end - arrival.time) / arrival.output_tokens for arrival, end in served]
        return cls(sum(waits) / len(waits), sum(arrival.output_tokens for arrival, _ in served) / seconds)
