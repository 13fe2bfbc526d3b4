"""Engines in processes of their own: asked over pipes, stopped while it is not their turn, and watched.

Memory and CPU time are read from ``/proc``; where there is none (macOS) they are None.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from minillm.errors import MinillmError

PROC = Path("/proc")
CAN_WATCH = (PROC / "self" / "clear_refs").exists()
QUIET = 0.1
"""Cores that other processes may keep busy while something is measured."""
END_SECONDS = 10.0


class EngineFailedError(MinillmError):
    """An engine that could not be loaded, or that failed while it was measured."""


class Worker:
    """A process that answers one JSON line for each that it is sent.

    It leads a process group of its own, which is stopped (SIGSTOP) but for the time of a question: OpenMP's threads
    spin for a while after their work, and would slow down whoever comes next.

    Args:
        command: what to run.
        environment: of the process.
        log: file for what it prints.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            # The same session: should this process die, the kernel ends stopped groups that it leaves behind.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, env=environment, process_group=0
            )
        self._stop()

    def ask(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to a message.

        Args:
            timeout: seconds after which the process is killed.

        Raises:
            EngineFailedError: it says so, ended, or did not answer in time.
        """
        if self._process.returncode is not None:
            raise EngineFailedError(self._end())
        self._signal(signal.SIGCONT)
        try:
            line = self._exchange(json.dumps(message).encode() + b"\n", timeout)
        finally:
            self._stop()
        if not line:
            raise EngineFailedError(self._end())
        answer = json.loads(line)
        if "error" in answer:
            raise EngineFailedError(answer["error"])
        return answer

    def _exchange(self, message: bytes, timeout: float) -> bytes:
        """The line that comes back; empty where the process ended."""
        source, sink = self._process.stdout, self._process.stdin
        assert source is not None and sink is not None, "both are pipes"  # noqa: PT018
        with contextlib.suppress(BrokenPipeError):
            sink.write(message)
            sink.flush()
        end, line = time.monotonic() + timeout, b""
        with selectors.DefaultSelector() as selector:
            selector.register(source, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(end - time.monotonic()):
                    self.close()
                    raise EngineFailedError(f"no answer within {timeout:.0f} s")
                piece = os.read(source.fileno(), 2**20)
                if not piece:
                    return b""
                line += piece
        return line

    def _end(self) -> str:
        """What is known of a process that has ended."""
        self.close()
        status = self._process.returncode
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        said = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"the process ended with {how}" + (f": {said[-1].strip()}" if said else "")

    def _stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """End the process and all that it started."""
        self._signal(signal.SIGCONT)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None, "both are pipes"
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The process and those that it started."""
        return [pid for pid in _all_pids() if _group(pid) == self._process.pid]

    def reset_peak(self) -> None:
        """Count the peak memory from here on."""
        for pid in self.pids:
            with contextlib.suppress(OSError):
                (PROC / str(pid) / "clear_refs").write_text("5")

    @property
    def peak_bytes(self) -> int | None:
        """The most memory that the processes held, each since `reset_peak`."""
        return sum(map(_peak_bytes, self.pids)) if CAN_WATCH else None


class CpuTime(NamedTuple):
    """Seconds of CPU time so far: of the whole machine, and of the processes watched."""

    at: float
    machine: float
    watched: float

    @classmethod
    def now(cls, worker: Worker | None = None) -> CpuTime | None:
        """Up to now, watching this process and a worker's; None where it cannot be read."""
        if not CAN_WATCH:
            return None
        pids = [os.getpid(), *(worker.pids if worker is not None else ())]
        return cls(time.monotonic(), _machine_seconds(), sum(map(_cpu_seconds, pids)))

    def others_since(self, start: CpuTime) -> float:
        """Cores that processes not watched kept busy between `start` and now."""
        others = (self.machine - start.machine) - (self.watched - start.watched)
        return max(0.0, others / (self.at - start.at))


def wait_until_quiet(timeout: float) -> None:
    """Wait until other processes leave the machine alone for a second, or until the time is over."""
    end = time.monotonic() + timeout
    while CAN_WATCH and time.monotonic() < end:
        start = CpuTime.now()
        time.sleep(1.0)
        now = CpuTime.now()
        if start is None or now is None or now.others_since(start) <= QUIET:
            return


def _all_pids() -> Iterator[int]:
    return (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()) if CAN_WATCH else iter(())


def _group(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return os.getpgid(pid)
    return None


def _peak_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in (PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _cpu_seconds(pid: int) -> float:
    """Of a process and of its children that have ended."""
    with contextlib.suppress(OSError):
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _machine_seconds() -> float:
    """Of all processes: user, nice, system, irq, softirq and stolen by other virtual machines."""
    user, nice, system, _, _, irq, softirq, steal = map(int, (PROC / "stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
