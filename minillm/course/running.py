"""Requests through the real engine, with a bound on its steps: a student's piece may forget to get on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from minillm.course.checks import CheckError, check_equal
from minillm.engine.engine import Engine
from minillm.engine.outputs import RequestOutput
from minillm.engine.params import SamplingParams
from minillm.engine.scheduler import Scheduler

Requests = Sequence[tuple[Sequence[int], SamplingParams]]
"""Prompts as token ids, and how each is to be answered."""

MAX_STEPS = 2000


@contextmanager
def scheduled_by(engine: Engine, scheduler: Scheduler) -> Iterator[None]:
    """While it lasts, the engine has another scheduler, with a pool of its own over the same memory."""
    before = engine.scheduler
    before.pool.forget_all()  # what its blocks hold is overwritten now
    engine.scheduler = scheduler
    try:
        yield
    finally:
        engine.scheduler = before
        engine._answers.clear()


def run_engine(engine: Engine, requests: Requests) -> list[RequestOutput]:
    """Answer these prompts, all there from the beginning.

    Raises:
        CheckError: the engine stopped with an error, or did not come to an end.
    """
    done: dict[str, RequestOutput] = {}
    steps = 0
    try:
        for number, (tokens, params) in enumerate(requests):
            engine.add_request(str(number), tokens, params)
        while engine.has_unfinished_requests and steps < MAX_STEPS:
            done |= {output.request_id: output for output in engine.step() if output.finished}
            steps += 1
    except CheckError:
        raise
    except Exception as error:  # the student's: whatever it is, it is told
        raise CheckError(f"the engine stopped at step {steps}: {type(error).__name__}: {error}") from error
    if len(done) < len(requests):
        raise CheckError(f"after {steps} steps {len(requests) - len(done)} of {len(requests)} requests have no answer")
    return [done[str(number)] for number in range(len(requests))]


def check_same_tokens(got: Sequence[RequestOutput], expected: Sequence[RequestOutput], told: str = "") -> None:
    """Raise CheckError unless all answers have the same tokens; `told` stands behind its message."""
    for number, (mine, right) in enumerate(zip(got, expected, strict=True)):
        for one, other in zip(mine.outputs, right.outputs, strict=True):
            what = f"request {number}, answer {one.index}: the tokens"
            check_equal(one.token_ids, other.token_ids, what, hint=told)
