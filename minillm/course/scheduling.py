"""What assignment 6 is judged by: single decisions beside the package's, rules that every step keeps, and goodput."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from minillm.cache.block_pool import BlockPool
from minillm.cache.block_table import BlockTable
from minillm.course.checks import CheckError, check, check_equal, without
from minillm.course.running import Requests, check_same_tokens, run_engine, scheduled_by
from minillm.engine.engine import Engine
from minillm.engine.outputs import RequestMetrics, RequestOutput
from minillm.engine.params import SamplingParams
from minillm.engine.request import Request, Status
from minillm.engine.scheduler import Schedule, Scheduled, Scheduler, SchedulerConfig
from minillm.errors import InvalidRequestError
from minillm.simulate.simulator import CostModel, Simulation, serve
from minillm.simulate.trace import Arrival
from minillm.viz import token_times

METHODS = ("add", "schedule", "_schedule_running", "_make_room", "_preempt", "_schedule_waiting")
ANSWERS = tuple(f"minillm.engine.scheduler:Scheduler.{name}" for name in METHODS)
"""The package's answers to the assignment, as `without` names them."""

SIZE = 4
"""Tokens of a block in single decisions."""

# --- single decisions


@dataclass(frozen=True)
class Scene:
    """A moment in a scheduler's life.

    Attributes:
        running: requests from the oldest to the youngest: how many tokens each has, and how many of them are computed.
        waiting: prompt lengths of those in the queue.
        free: blocks that nobody holds.
        seats: max_num_seqs.
        budget: max_num_batched_tokens.
    """

    running: tuple[tuple[int, int], ...] = ()
    waiting: tuple[int, ...] = ()
    free: int = 100
    seats: int = 8
    budget: int = 16

    def __str__(self) -> str:
        names = iter(NAMES)
        running = [f"{next(names)} ({computed} of {tokens} computed)" for tokens, computed in self.running]
        waiting = [f"{next(names)} ({tokens} tokens)" for tokens in self.waiting]
        return (
            f"running: {', '.join(running) or 'nobody'}; waiting: {', '.join(waiting) or 'nobody'}; "
            f"{self.free} free blocks of {SIZE}, {self.seats} seats, a budget of {self.budget} tokens"
        )

    def play(self, scheduler_class: type[Scheduler]) -> Scheduler:
        """A scheduler at this moment."""
        blocks = sum(-(-computed // SIZE) for _, computed in self.running)
        pool = BlockPool(blocks + self.free, SIZE, enable_prefix_caching=False)
        scheduler = scheduler_class(SchedulerConfig(self.seats, self.budget, 1000), pool)
        names = iter(NAMES)
        for tokens, computed in self.running:
            request = _request(next(names), tokens, pool)
            request.table.append(computed)
            request.num_computed_tokens, request.status = computed, Status.RUNNING
            scheduler.running.append(request)
        for tokens in self.waiting:
            scheduler.waiting.append(_request(next(names), tokens, pool))
        return scheduler


NAMES = "abcdefghijklmnop"

Decide = Callable[[Scheduler, Schedule], object]
"""One decision of a scheduler about a step; what it returns is compared, too."""


class Outcome(NamedTuple):
    """What a decision came to."""

    scheduled: list[str]
    preempted: list[str]
    running: list[str]
    waiting: list[str]
    budget: int
    free: int
    returned: object


def outcome(scheduler_class: type[Scheduler], scene: Scene, decide: Decide) -> Outcome:
    """Play the scene and let it decide.

    Raises:
        CheckError: what it left is no scheduler's state, or it raised an error.
    """
    scheduler = scene.play(scheduler_class)
    step = Schedule(scene.budget)
    try:
        returned = decide(scheduler, step)
    except CheckError:
        raise
    except Exception as error:  # the student's: whatever it is, it is told
        raise CheckError(f"{scene}: it raised {type(error).__name__}: {error}") from error
    check(all(isinstance(part, Scheduled) for part in step.scheduled), f"{scene}: step.scheduled holds other things")
    return Outcome(
        [f"{part.request.name}: {_told(part)}" for part in step.scheduled],
        [request.name for request in step.preempted],
        [f"{request.name}: {_state(request)}" for request in scheduler.running],
        [f"{request.name}: {_state(request)}" for request in scheduler.waiting],
        step.budget,
        scheduler.pool.num_free,
        returned,
    )


def compare(
    scheduler_class: type[Scheduler],
    scenes: Sequence[Scene],
    decide: Decide,
    closed: Sequence[str],
    *,
    hint: str = "",
    told: str = "",
) -> None:
    """Raise CheckError where a decision differs from the package's; `closed` of its methods must not be used."""
    what = {"free": "the number of free blocks", "budget": "step.budget", "returned": "what is returned"}
    outcomes = [outcome(Scheduler, scene, decide) for scene in scenes]
    with without(*(f"minillm.engine.scheduler:Scheduler.{name}" for name in closed)):
        for scene, expected in zip(scenes, outcomes, strict=True):
            got = outcome(scheduler_class, scene, decide)
            for field, mine, right in zip(Outcome._fields, got, expected, strict=True):
                check_equal(mine, right, f"{scene}{told}.\n{what.get(field, field)}", hint=hint)


def random_scenes(
    seed: int, count: int = 100, *, decodes: bool = True, chunks: bool = True, **fixed: int
) -> list[Scene]:
    """Scenes of all kinds.

    Args:
        decodes: whether some running requests need one token.
        chunks: whether some have a prompt that is not finished.
        fixed: of a Scene's sizes; the others are drawn.
    """
    rng = random.Random(seed)
    scenes = []
    for _ in range(count):
        running = []
        for _ in range(rng.randrange(1, 6)):
            tokens = rng.randrange(2, 40)
            decode = decodes and (not chunks or rng.random() < 0.5)
            running.append((tokens, tokens - 1 if decode else rng.randrange(0, tokens - 1)))
        waiting = tuple(rng.randrange(1, 40) for _ in range(rng.randrange(5)))
        sizes = {"free": rng.randrange(1, 12), "seats": rng.randrange(len(running), 9), "budget": rng.randrange(9, 40)}
        scenes.append(Scene(tuple(running), waiting, **sizes | fixed))
    return scenes


def check_refusals(scheduler_class: type[Scheduler], cases: Sequence[tuple[int, int, int]]) -> None:
    """Raise CheckError unless `add` takes what fits alone, and refuses what does not.

    Args:
        cases: prompt tokens, max_tokens, and blocks that there are.
    """
    with without("minillm.engine.scheduler:Scheduler.add"):
        for case in cases:
            _check_refusal(scheduler_class, *case)


def _check_refusal(scheduler_class: type[Scheduler], prompt: int, answer: int, blocks: int) -> None:
    pool = BlockPool(blocks, SIZE, enable_prefix_caching=False)
    scheduler = scheduler_class(SchedulerConfig(4, 16, 1000), pool)
    request = _request("a", prompt, pool, answer)
    needed = pool.blocks_for(prompt + answer - 1)
    told = (
        f"{prompt} prompt tokens and max_tokens={answer} store {prompt + answer - 1} tokens, which need {needed} blocks"
    )
    try:
        scheduler.add(request)
    except InvalidRequestError as error:
        check(needed > blocks, f"{told}: there are {blocks}, so it must not be refused ({error})")
        check(bool(str(error)), "the InvalidRequestError should say what is wrong")
        check(not scheduler.waiting, "a request that is refused must not be in the queue")
    else:
        check(needed <= blocks, f"{told}, and there are {blocks}: an InvalidRequestError should be raised")
        right = list(scheduler.waiting) == [request]
        check(right, "a request that fits should be put at the end of self.waiting")


def _request(name: str, tokens: int, pool: BlockPool, answer: int = 50) -> Request:
    return Request(name, [1] * tokens, SamplingParams(max_tokens=answer), answer, BlockTable(pool), RequestMetrics(0.0))


def _told(part: Scheduled) -> str:
    return f"{part.count} from {part.start}"


def _state(request: Request) -> str:
    return f"{request.status.value}, {request.num_computed_tokens} computed, {len(request.table.blocks)} blocks"


# --- rules for every step


class Watch(Scheduler):
    """Put before a scheduler class, it checks every step; `watched` does that."""

    num_steps = 0
    max_steps = 20_000

    def schedule(self) -> Schedule:
        self.num_steps += 1
        check(self.num_steps <= self.max_steps, f"after {self.max_steps} steps there are still requests: who starves?")
        running, waiting = list(self.running), list(self.waiting)
        decodes = [request for request in running if request.num_uncomputed_tokens == 1]
        step = super().schedule()
        if not isinstance(step, Schedule):
            raise CheckError(f"schedule should return a Schedule, not {step!r} (is a return missing?)")
        told = f"step {self.num_steps}: "
        _check_sizes(self, step, told)
        _check_parts(self, step, told)
        _check_queues(self, running, waiting, step, told)
        planned = {part.request for part in step.scheduled}
        for request in decodes:
            fair = request in planned or request not in self.running
            check(fair, f"{told}request {request.name} needs one token and is left out: decodes come first")
        if running:
            check(running[0] in planned, f"{told}the oldest request, {running[0].name}, is not in it: it could starve")
        return step


def watched(scheduler_class: type[Scheduler]) -> type[Scheduler]:
    """The class with every step checked."""
    return type(scheduler_class.__name__, (Watch, scheduler_class), {})


def _check_sizes(scheduler: Scheduler, step: Schedule, told: str) -> None:
    config = scheduler.config
    most, seats = config.max_num_batched_tokens, config.max_num_seqs
    check(step.num_tokens <= most, f"{told}it has {step.num_tokens} tokens, and the budget is {most}")
    check(len(scheduler.running) <= seats, f"{told}{len(scheduler.running)} requests run on {seats} seats")
    check(bool(step.scheduled), f"{told}nothing is computed, and there are requests")


def _check_parts(scheduler: Scheduler, step: Schedule, told: str) -> None:
    requests = [part.request for part in step.scheduled]
    check(len(set(requests)) == len(requests), f"{told}a request is in it twice")
    for part in step.scheduled:
        request, told_part = part.request, f"{told}request {part.request.name} gets {_told(part)}"
        check(request in scheduler.running, f"{told_part}, and it is not running")
        check(request.status is Status.RUNNING, f"{told_part}, and its status is {request.status.value}")
        check(part.start == request.num_computed_tokens, f"{told_part}; {request.num_computed_tokens} are computed")
        check(
            1 <= part.count <= request.num_uncomputed_tokens, f"{told_part}; it needs {request.num_uncomputed_tokens}"
        )
        check(request.table.num_tokens == part.start + part.count, f"{told_part}, and has no slots for just these")


def _check_queues(
    scheduler: Scheduler, running: list[Request], waiting: list[Request], step: Schedule, told: str
) -> None:
    now = [*scheduler.running, *scheduler.waiting]
    check(len(set(now)) == len(now), f"{told}a request is in the queues twice")
    check(set(now) == {*running, *waiting}, f"{told}a request is in no queue any more")
    for request in scheduler.waiting:
        held = len(request.table.blocks)
        check(request.status is Status.WAITING, f"{told}request {request.name} waits, and is {request.status.value}")
        check(not held, f"{told}request {request.name} waits, and holds {held} blocks")
    gone = [request for request in running if request in scheduler.waiting]
    check(running[len(running) - len(gone) :] == gone, f"{told}somebody was preempted who is not the youngest")
    check(set(gone) <= set(step.preempted), f"{told}somebody lost its blocks and is not in step.preempted")
    joined = [request for request in scheduler.running if request not in running]
    check(joined == waiting[: len(joined)], f"{told}somebody has overtaken the first in the queue")


# --- in the engine, and on a virtual clock


def compare_in_engine(
    engine: Engine, scheduler_class: type[Scheduler], requests: Requests, *, num_blocks: int, told: str = ""
) -> list[RequestOutput]:
    """Answer prompts with the package's scheduler, and with this one on so few blocks while the package's is closed.

    Raises:
        CheckError: other tokens were written, a step broke a rule, or blocks are not given back.
    """
    engine.scheduler.pool.forget_all()
    expected = run_engine(engine, requests)
    before = engine.scheduler
    pool = BlockPool(num_blocks, before.pool.block_size, enable_prefix_caching=False)
    scheduler = watched(scheduler_class)(before.config, pool)
    with scheduled_by(engine, scheduler), without(*ANSWERS):
        got = run_engine(engine, requests)
    check_same_tokens(got, expected, told)
    check(pool.num_free == num_blocks, f"all have ended, and {num_blocks - pool.num_free} blocks are not free{told}")
    return got


def traffic(seed: int, count: int = 100) -> list[Arrival]:
    """Requests that come in bursts: many short prompts, some long ones, answers of all lengths."""
    rng = random.Random(seed)
    time, arrivals = 0.0, []
    for _ in range(count):
        time += rng.expovariate(70 if rng.random() < 0.85 else 10)
        prompt = rng.randrange(400, 900) if rng.random() < 0.15 else rng.randrange(10, 120)
        arrivals.append(Arrival(time, prompt, rng.randrange(20, 120)))
    return arrivals


FIRST_TOKEN, NEXT_TOKEN = 1.0, 0.04
"""What a user is promised, in seconds: from the request to the first token, and between two tokens."""


def on_clock(scheduler_class: type[Scheduler], arrivals: Sequence[Arrival]) -> Simulation:
    """Serve this traffic on the simulator: 24 seats, 200 tokens a step, 320 blocks of 16 tokens.

    Raises:
        CheckError: a step broke a rule, or the scheduler stopped with an error.
    """
    pool = BlockPool(320, 16, enable_prefix_caching=False)
    scheduler = watched(scheduler_class)(SchedulerConfig(24, 200, 2000), pool)
    try:
        return serve(arrivals, scheduler, CostModel())
    except CheckError:
        raise
    except Exception as error:  # the student's: whatever it is, it is told
        raise CheckError(f"the scheduler stopped with {type(error).__name__}: {error}") from error


def goodput(simulation: Simulation) -> float:
    """Requests a second for which both promises were kept, as vLLM's benchmark counts goodput."""
    times = token_times(simulation.trace)
    kept = 0
    for number, metrics in enumerate(simulation.metrics):
        tokens = times[str(number)]
        gaps = [after - before for before, after in pairwise(tokens)]
        kept += tokens[0] - metrics.arrival_time <= FIRST_TOKEN and max(gaps, default=0.0) <= NEXT_TOKEN
    return kept / simulation.seconds


def check_goodput(scheduler_class: type[Scheduler], seed: int, share: float) -> None:
    """Raise CheckError unless its goodput is at least this share of the package's; print what it reached.

    Nothing is returned: nbgrader takes a number that a tests cell ends with for the points.
    """
    arrivals = traffic(seed)
    best = goodput(on_clock(Scheduler, arrivals))
    with without(*ANSWERS):
        mine = goodput(on_clock(scheduler_class, arrivals))
    told = f"{mine:.2f} requests a second keep the promises, {mine / best:.0%} of the package's {best:.2f}"
    check(mine >= share * best, f"{told}; {share:.0%} are asked for (traffic of seed {seed})")
    print(told)
