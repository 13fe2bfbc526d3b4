"""The same requests served from memories of two kinds, and what every slot was for at each step.

In a contiguous memory a request is given one stretch when it begins and keeps it until it has ended. In a paged one it
takes a block at a time. Everything else is the same: the engine, first come first served, requests that join and leave
at any step (Yu et al. 2022, "Orca", §3), the clock and what a step costs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args

from minillm.cache.block_pool import BlockPool
from minillm.engine.request import Request
from minillm.engine.scheduler import Schedule, Scheduler, SchedulerConfig
from minillm.engine.trace import Trace, TracedPart
from minillm.errors import CacheFullError, ConfigError
from minillm.simulate.contiguous import ContiguousAllocator, Use
from minillm.simulate.simulator import CostModel, Simulation, serve
from minillm.simulate.trace import Arrival

MemoryPolicy = Literal["max", "pow2", "exact", "paged"]
MEMORY_POLICIES: tuple[MemoryPolicy, ...] = get_args(MemoryPolicy)


class Held(NamedTuple):
    """The memory that one request holds: blocks of one size, filled in order. A stretch is a single block.

    Attributes:
        blocks: their numbers, in the request's order.
        size: slots of each.
        origin: first slot of block 0.
        length: tokens stored.
        final: tokens that will be stored at its end.
    """

    name: str
    blocks: tuple[int, ...]
    size: int
    origin: int
    length: int
    final: int

    @classmethod
    def of_stretches(cls, memory: ContiguousAllocator) -> tuple[Held, ...]:
        """What each sequence holds of a contiguous memory."""
        return tuple(
            cls(name, (0,), stretch.size, stretch.start, stretch.length, stretch.final)
            for name, stretch in memory.stretches.items()
        )

    @property
    def starts(self) -> list[int]:
        """First slot of each block."""
        return [self.origin + block * self.size for block in self.blocks]

    @property
    def reserved(self) -> int:
        """Slots that it holds and will use, but not yet."""
        return min(self.final, len(self.blocks) * self.size) - self.length

    @property
    def internal(self) -> int:
        """Slots that it holds and will never use."""
        return len(self.blocks) * self.size - self.length - self.reserved


@dataclass(frozen=True)
class MemoryStep:
    """The memory when a step has been computed, and before those who end with it give theirs back.

    Attributes:
        start: in seconds, likewise `end`.
        waiting: requests in the queue.
    """

    start: float
    end: float
    waiting: int
    held: tuple[Held, ...]
    use: Use


@dataclass(frozen=True)
class MemorySimulation(Simulation):
    """A simulation, and its memory at each of its steps."""

    num_slots: int
    memory: list[MemoryStep]

    def mean_use(self) -> dict[str, float]:
        """The share of the memory that was used for each purpose of `Use`, averaged over the time when requests waited.

        A server with nothing in its queue wastes nothing that anybody misses; where nobody ever waits, all time counts.
        """
        steps = [step for step in self.memory if step.waiting] or self.memory
        whole = self.num_slots * sum(step.end - step.start for step in steps)
        return {
            purpose.name: sum(getattr(step.use, purpose.name) * (step.end - step.start) for step in steps) / whole
            for purpose in fields(Use)
        }


class ReservingScheduler(Scheduler):
    """The engine's scheduler on a contiguous memory: a request starts when its whole stretch is free.

    Its pool has a block for every seat, as long as a sequence may become. It is never short of any, so the allocator
    alone decides who runs, and nobody is preempted.

    Attributes:
        record: what each request held, and what the memory was used for, after each step.
    """

    def __init__(self, config: SchedulerConfig, memory: ContiguousAllocator) -> None:
        super().__init__(config, BlockPool(config.max_num_seqs, config.max_model_len, enable_prefix_caching=False))
        self.memory = memory
        self.record: list[tuple[tuple[Held, ...], Use]] = []

    def _schedule_waiting(self, step: Schedule) -> None:
        while self.waiting and step.budget and len(self.running) < self.config.max_num_seqs:
            request = self.waiting[0]
            # The last token is given out and never stored.
            final = len(request.prompt_token_ids) + request.max_tokens - 1
            try:
                self.memory.allocate(request.name, 0, final)
            except CacheFullError:
                return
            self.waiting.popleft()
            behind, self.waiting = self.waiting, deque([request])
            super()._schedule_waiting(step)
            self.waiting = behind

    def computed(self, step: Schedule) -> None:
        super().computed(step)
        for part in step.scheduled:
            self.memory.append(part.request.name, part.count)
        self.record.append((Held.of_stretches(self.memory), self.memory.use()))

    def finish(self, request: Request) -> None:
        super().finish(request)
        self.memory.free(request.name)


def simulate_memory(
    policy: MemoryPolicy,
    arrivals: Sequence[Arrival],
    *,
    num_slots: int,
    block_size: int = 16,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 2048,
    max_model_len: int = 16_384,
    cost: CostModel | None = None,
) -> MemorySimulation:
    """Serve a trace of requests from a memory of so many slots.

    Args:
        policy: how a request gets its memory: one stretch by a policy of `ContiguousAllocator`, or "paged": blocks of
            `block_size`, as it grows.

    Raises:
        ConfigError: another policy, or sizes that make no sense.
        InvalidRequestError: a request that is longer than `max_model_len` or could never fit.
    """
    if policy not in MEMORY_POLICIES:
        raise ConfigError(f"policy {policy!r} is not one of {', '.join(MEMORY_POLICIES)}")
    config, cost = SchedulerConfig(max_num_seqs, max_num_batched_tokens, max_model_len), cost or CostModel()
    if policy == "paged":
        pool = BlockPool(num_slots // block_size, block_size, enable_prefix_caching=False)
        served = serve(arrivals, Scheduler(config, pool), cost)
        held = [_in_blocks(stored, served.arrivals, block_size) for stored in _stored(served.trace)]
        record = [(step, _use(step, num_slots)) for step in held]
    else:
        scheduler = ReservingScheduler(config, ContiguousAllocator(num_slots, policy, max_model_len))
        served, record = serve(arrivals, scheduler, cost), scheduler.record
    steps = zip(served.trace.steps, record, strict=True)
    memory = [MemoryStep(step.start, step.end, len(step.waiting), held, use) for step, (held, use) in steps]
    return MemorySimulation(served.arrivals, served.metrics, served.trace, served.seconds, num_slots, memory)


def _stored(trace: Trace) -> Iterator[dict[str, TracedPart]]:
    """At each step, the latest part of every request that runs: one that the budget left out keeps what it has."""
    latest: dict[str, TracedPart] = {}
    for step in trace.steps:
        latest |= {part.name: part for part in step.parts}
        latest = {name: latest[name] for name in step.running}
        yield latest


def _in_blocks(stored: dict[str, TracedPart], arrivals: Sequence[Arrival], size: int) -> tuple[Held, ...]:
    finals = {name: arrivals[int(name)].prompt_tokens + arrivals[int(name)].output_tokens - 1 for name in stored}
    return tuple(
        Held(name, part.blocks, size, 0, part.start + part.count, finals[name]) for name, part in stored.items()
    )


def _use(held: Sequence[Held], num_slots: int) -> Use:
    """Of a paged memory: whatever is free fits whoever waits, so nothing is lost outside of the blocks."""
    tokens = sum(one.length for one in held)
    reserved, internal = sum(one.reserved for one in held), sum(one.internal for one in held)
    return Use(tokens, reserved, internal, external=0, free=num_slots - tokens - reserved - internal)
