"""The judges of assignment 6: the package's scheduler passes, and a planted mistake is told."""

from __future__ import annotations

import pytest

from minillm.course.checks import CheckError
from minillm.course.scheduling import (
    Scene,
    check_goodput,
    check_refusals,
    compare,
    goodput,
    on_clock,
    outcome,
    random_scenes,
    traffic,
)
from minillm.engine.request import Status
from minillm.engine.scheduler import Schedule, Scheduler
from minillm.errors import InvalidRequestError


def running(scheduler: Scheduler, step: Schedule) -> None:
    scheduler._schedule_running(step)


def waiting(scheduler: Scheduler, step: Schedule) -> None:
    scheduler._schedule_waiting(step)


def test_the_examples_worked_by_hand():
    step = outcome(Scheduler, Scene(running=((30, 3), (9, 8), (5, 0)), budget=16), running)
    assert step.scheduled == ["b: 1 from 8", "a: 15 from 3"]
    step = outcome(Scheduler, Scene(running=((9, 8), (5, 4), (10, 9)), free=0), running)
    assert (step.preempted, step.free) == (["c"], 1)  # three given back, one for a, one for b
    step = outcome(Scheduler, Scene(waiting=(9, 2, 1), free=3, seats=2), waiting)
    assert (step.scheduled, step.waiting[0][0]) == (["a: 9 from 0"], "b")


class Copied(Scheduler):
    """Right, and not the package's functions."""

    def _schedule_waiting(self, step: Schedule) -> None:
        while self.waiting and step.budget and len(self.running) < self.config.max_num_seqs:
            request = self.waiting[0]
            count = min(request.num_tokens, step.budget)
            if self.pool.blocks_for(count) > self.pool.num_free:
                return
            self.waiting.popleft()
            self.running.append(request)
            request.status = Status.RUNNING
            self._take(request, count, step)


class Overtaking(Copied):
    def _schedule_waiting(self, step: Schedule) -> None:
        self.waiting.reverse()
        super()._schedule_waiting(step)
        self.waiting.reverse()


class OneSeatMore(Copied):
    def _schedule_waiting(self, step: Schedule) -> None:
        super()._schedule_waiting(step)
        if self.waiting and step.budget and self.pool.num_free >= 10:
            request = self.waiting.popleft()
            self.running.append(request)
            request.status = Status.RUNNING
            self._take(request, min(request.num_tokens, step.budget), step)


class Imported(Scheduler):
    def _schedule_waiting(self, step: Schedule) -> None:
        Scheduler._schedule_waiting(self, step)


class Crashing(Scheduler):
    def _schedule_waiting(self, step: Schedule) -> None:
        raise KeyError("a")


def test_what_is_right_passes():
    compare(Copied, random_scenes(1), waiting, ["_schedule_waiting"])


@pytest.mark.parametrize(
    ("scheduler_class", "message"),
    [
        (Overtaking, "running: "),
        (OneSeatMore, "scheduled has "),
        (Imported, "do not use minillm.engine.scheduler:Scheduler._schedule_waiting"),
        (Crashing, "it raised KeyError: 'a'"),
    ],
)
def test_a_wrong_decision_is_told_with_its_scene(scheduler_class, message):
    with pytest.raises(CheckError) as caught:
        compare(scheduler_class, random_scenes(2), waiting, ["_schedule_waiting"])
    assert message in str(caught.value)


class NoRefusal(Scheduler):
    def add(self, request):
        self.waiting.append(request)


class EarlyRefusal(Scheduler):
    def add(self, request):
        if self.pool.blocks_for(len(request.prompt_token_ids) + request.max_tokens) > self.pool.num_blocks:
            raise InvalidRequestError("too long")
        self.waiting.append(request)


def test_refusals():
    with pytest.raises(CheckError, match="need 3 blocks, and there are 2"):
        check_refusals(NoRefusal, [(6, 4, 2)])
    with pytest.raises(CheckError, match="must not be refused"):
        check_refusals(EarlyRefusal, [(6, 3, 2)])


class Static(Scheduler):
    def _schedule_waiting(self, step):
        if not self.running:
            super()._schedule_waiting(step)


class HalfTheSeats(Scheduler):
    def _schedule_waiting(self, step):
        if len(self.running) < 12:
            super()._schedule_waiting(step)


class Greedy(Scheduler):
    """Takes more than the budget."""

    def schedule(self):
        step = super().schedule()
        step.budget += 10
        self._schedule_waiting(step)
        return step


class Idle(Scheduler):
    """Answers nobody."""

    def schedule(self):
        return Schedule(self.config.max_num_batched_tokens)


class PromptsFirst(Scheduler):
    def _schedule_running(self, step):
        for request in sorted(self.running, key=lambda one: -one.num_uncomputed_tokens):
            count = min(request.num_uncomputed_tokens, step.budget)
            if count and request.status is Status.RUNNING and self._make_room(request, count, step):
                self._take(request, count, step)


@pytest.mark.parametrize(
    ("scheduler_class", "message"),
    [
        (Greedy, "tokens, and the budget is 200"),
        (Idle, "nothing is computed, and there are requests"),
        (PromptsFirst, "decodes come first"),
        (Crashing, "the scheduler stopped with KeyError"),
    ],
)
def test_a_step_that_breaks_a_rule_is_told(scheduler_class, message):
    with pytest.raises(CheckError) as caught:
        on_clock(scheduler_class, traffic(1))
    assert message in str(caught.value)


def test_goodput_falls_in_steps_with_the_scheduler():
    arrivals = traffic(3)
    best, half, static = (goodput(on_clock(one, arrivals)) for one in (Scheduler, HalfTheSeats, Static))
    assert best == pytest.approx(
        len(arrivals) / on_clock(Scheduler, arrivals).seconds, rel=0.1
    )  # nearly all are content
    assert 0.3 * best < half < 0.9 * best
    assert static < 0.2 * best


def test_the_packages_scheduler_is_closed():
    with pytest.raises(CheckError, match=r"do not use minillm\.engine\.scheduler"):
        check_goodput(type("Mine", (Scheduler,), {}), seed=1, share=0.5)
