"""Workers: the protocol, what a failing engine says, stopping, and watching the machine."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from minillm.bench.processes import CAN_WATCH, CpuTime, EngineFailedError, Worker, wait_until_quiet

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")
needs_proc = pytest.mark.skipif(not CAN_WATCH, reason="needs /proc")

ECHO = """
import json, os, signal, sys, time
for line in sys.stdin:
    message = json.loads(line)
    if message.get("die"):
        print("about to die", file=sys.stderr, flush=True)
        os.kill(os.getpid(), message["die"])
    if message.get("spin"):
        end = time.process_time() + message["spin"]
        while time.process_time() < end: pass
    if message.get("take"):
        held = bytearray(message["take"])
        held = None
    print(json.dumps({"error": message["fail"]} if "fail" in message else {"echo": message}), flush=True)
    time.sleep(message.get("late", 0))
"""


@pytest.fixture
def worker(tmp_path):
    with Worker([sys.executable, "-c", ECHO], os.environ, tmp_path / "log") as worker:
        yield worker


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_answers_errors_and_goes_on(worker):
    assert worker.ask({"a": [1, 2]}, 20) == {"echo": {"a": [1, 2]}}
    with pytest.raises(EngineFailedError, match="no such model"):
        worker.ask({"fail": "no such model"}, 20)
    long = ["x" * 100] * 10_000
    assert worker.ask({"long": long}, 20) == {"echo": {"long": long}}


def test_a_dead_process_is_told_of_again_and_again(worker):
    for _ in range(2):
        with pytest.raises(EngineFailedError, match="SIGILL: about to die"):
            worker.ask({"die": int(signal.SIGILL)}, 20)


def test_no_answer_in_time(worker):
    with pytest.raises(EngineFailedError, match="no answer within 0 s"):
        worker.ask({"spin": 60}, 0.2)
    with pytest.raises(EngineFailedError, match="ended"):
        worker.ask({}, 20)


@needs_proc
def test_it_is_stopped_but_for_its_turn(worker):
    (pid,) = worker.pids
    worker.ask({}, 20)
    deadline = time.monotonic() + 10
    while state(pid) != "T" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state(pid) == "T"
    worker.close()
    assert worker.pids == []


@needs_proc
def test_peak_memory_begins_anew(worker):
    worker.ask({"take": 2**27}, 20)
    high = worker.peak_bytes
    worker.reset_peak()
    worker.ask({}, 20)
    assert high > 2**27
    assert worker.peak_bytes < high - 2**26


@needs_proc
def test_its_own_work_is_not_that_of_others(worker):
    start = CpuTime.now(worker)
    worker.ask({"spin": 0.5}, 20)
    end = CpuTime.now(worker)
    assert end.watched - start.watched > 0.4
    assert end.others_since(start) >= 0


def test_others():
    start, end = CpuTime(10.0, 100.0, 50.0), CpuTime(12.0, 103.5, 52.5)
    assert end.others_since(start) == pytest.approx(0.5)
    assert CpuTime(12.0, 100.0, 50.01).others_since(start) == 0.0


def test_waiting_ends():
    start = time.monotonic()
    wait_until_quiet(0.0)
    assert time.monotonic() - start < 1.0
