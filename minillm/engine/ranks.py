"""Several processes that run one model: who they are, how they start, how they speak, and how they end.

On one machine rank 0 starts the others (`python -m minillm.engine.rank`); across machines `torchrun` starts all of
them. They speak through `torch.distributed`: gloo between CPUs, NCCL between GPUs.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from minillm.errors import ConfigError, RankError

START_SECONDS = 1800.0
"""How long ranks wait for each other while they load."""
STEP_SECONDS = 60.0
"""How long a rank waits for another within a step; after that the other one is taken for dead."""
BEAT_SECONDS = 15.0
"""How often rank 0 lets the others know that it is there, when there is nothing to do."""
LOOK_SECONDS = 0.5
"""How often rank 0 looks whether the processes that it started are alive."""
LAST_SECONDS = 10.0
"""How long ranks have to end when they have been told to; and how much longer than `STEP_SECONDS` a step may wait when
a rank is known to be dead, before the process is ended."""
_torchrun_has_met = False
"""Whether torchrun's processes have come together; they end with the model, and do so once."""
LOOPBACK = {
    "darwin": {"GLOO_SOCKET_IFNAME": "lo0"},
    "linux": {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"},
}.get(sys.platform, {})
"""Processes of one machine speak over this interface."""


@dataclass
class Traffic:
    """What this rank has put into collectives: how often, and bytes of its tensors."""

    all_reduces: int = 0
    all_reduce_bytes: int = 0
    all_gathers: int = 0
    all_gather_bytes: int = 0
    broadcasts: int = 0
    broadcast_bytes: int = 0


class DistributedRanks:
    """`Ranks` by `torch.distributed`. Every error of a collective is a `RankError`."""

    def __init__(self, rank: int, size: int, store: Store | None, device: str) -> None:
        self.rank = rank
        self.size = size
        self.traffic = Traffic()
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        patience = timedelta(seconds=START_SECONDS)
        with self._others():
            if store is None:  # torchrun's environment says where to meet
                global _torchrun_has_met
                _torchrun_has_met = True
                dist.init_process_group(backend, timeout=patience)
            else:
                dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=size)
            self._group = dist.group.WORLD

    def begin_work(self) -> None:
        """Loading is over: from now on nobody waits longer than `STEP_SECONDS`."""
        with self._others():
            self._group = dist.new_group(timeout=timedelta(seconds=STEP_SECONDS))

    def all_reduce(self, x: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens hidden"]:
        self.traffic.all_reduces += 1
        self.traffic.all_reduce_bytes += x.nbytes
        x = x.contiguous()
        with self._others():
            dist.all_reduce(x, group=self._group)
        return x

    def all_gather(self, x: Float[Tensor, "*tokens part"]) -> Float[Tensor, "*tokens whole"]:
        self.traffic.all_gathers += 1
        self.traffic.all_gather_bytes += x.nbytes
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with self._others():
            dist.all_gather(parts, x, group=self._group)
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x, on every rank."""
        self.traffic.broadcasts += 1
        self.traffic.broadcast_bytes += x.nbytes
        with self._others():
            dist.broadcast(x, 0, group=self._group)
        return x

    def least(self, number: int) -> int:
        """The least of all ranks' numbers."""
        told = torch.tensor(number)
        with self._others():
            dist.all_reduce(told, dist.ReduceOp.MIN, group=self._group)
        return int(told)

    def close(self) -> None:
        with contextlib.suppress(RuntimeError, ValueError):
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _others(self) -> Iterator[None]:
        """Turn what a collective raises when another rank does not answer into a RankError."""
        try:
            yield
        except RuntimeError as error:
            raise RankError(f"another rank does not answer: start again ({str(error).splitlines()[0]})") from error


class Crew:
    """The processes of the other ranks, started by rank 0 on this machine.

    Args:
        size: how many ranks there are, this one among them.
        arguments: for `rank.main`, as JSON.
        device: "cpu" or "cuda".

    Attributes:
        error: what has become of a rank that has ended by itself.
    """

    def __init__(self, size: int, arguments: Mapping[str, Any], device: str) -> None:
        self.error: RankError | None = None
        self._closed = False
        self._waits_since: float | None = None
        self._dead_since = 0.0
        self.store = _store(size)
        self._threads = torch.get_num_threads()
        torch.set_num_threads(max(1, self._threads // size))
        arguments = {**arguments, "threads": torch.get_num_threads()}
        self._lent = {name: value for name, value in LOOPBACK.items() if name not in os.environ}
        os.environ.update(self._lent)
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "minillm.engine.rank", str(rank), str(size), str(self.store.port), device],
                stdin=subprocess.PIPE,
                env=os.environ | {"TQDM_DISABLE": "1"},  # rank 0 shows how far loading is
                text=True,
            )
            for rank in range(1, size)
        ]
        for process in self._processes:
            assert process.stdin is not None, "it is a pipe"
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(arguments) + "\n")
                process.stdin.flush()  # it stays open: its end tells the rank that rank 0 has died
        threading.Thread(target=self._look, name="ranks", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        """The processes' numbers, from rank 1 on."""
        return [process.pid for process in self._processes]

    def wait_for_all(self) -> None:
        """Wait until every process has come so far that it can be spoken to.

        Raises:
            RankError: one has ended before.
        """
        names = [here(rank) for rank in range(1, len(self._processes) + 1)]
        deadline = time.monotonic() + START_SECONDS
        while not self.store.check(names):
            self.check()
            if time.monotonic() > deadline:
                raise RankError(f"not all ranks have come within {START_SECONDS / 60:.0f} minutes: start again")
            time.sleep(LOOK_SECONDS / 10)

    def started(self) -> None:
        """All have found each other: this process's environment is as it was."""
        for name in self._lent:
            os.environ.pop(name, None)
        self._lent = {}

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """This process may be waiting for the others inside.

        Raises:
            RankError: a rank has ended.
        """
        self.check()
        self._waits_since = time.monotonic()
        try:
            yield
        except RankError as error:
            # A collective notices an end before its process is gone.
            deadline = time.monotonic() + 4 * LOOK_SECONDS
            while not self._find_dead() and time.monotonic() < deadline:
                time.sleep(LOOK_SECONDS / 10)
            self.error = self.error or error
            self.kill()
            raise self.error from error
        finally:
            self._waits_since = None

    def check(self) -> None:
        """Raise the RankError of a rank that has ended."""
        if self.error is not None:
            self.kill()
            raise self.error

    def close(self) -> None:
        """Wait for the processes, which have been told to end."""
        self._closed = True
        deadline = time.monotonic() + LAST_SECONDS
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End the processes at once."""
        self._closed = True
        self.started()
        torch.set_num_threads(self._threads)
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()

    def _find_dead(self) -> bool:
        """Whether a rank has ended by itself; `error` then tells of the first."""
        for rank, process in enumerate(self._processes, 1):
            status = process.poll()
            if status is not None and not self._closed and self.error is None:
                how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
                if status > 0 and self.store.check([failure(rank)]):
                    how = f"failed ({self.store.get(failure(rank)).decode()})"
                self._dead_since = time.monotonic()
                self.error = RankError(f"rank {rank} {how}: the model cannot go on without its part; start again")
        return self.error is not None

    def _look(self) -> None:
        """Notice ranks that end; where rank 0 hangs in a step because of that, end it."""
        while not self._closed:
            dead, since = self._find_dead(), self._waits_since
            patience = STEP_SECONDS + LAST_SECONDS
            if dead and since is not None and time.monotonic() - max(since, self._dead_since) > patience:
                print(f"minillm: {self.error}; a step has not come back", file=sys.stderr, flush=True)
                os._exit(1)
            time.sleep(LOOK_SECONDS)


def _store(size: int) -> TCPStore:
    """Where ranks meet; by itself it would listen on all of the machine's addresses."""
    door = socket.create_server(("127.0.0.1", 0))
    port = door.getsockname()[1]
    return TCPStore("127.0.0.1", port, size, is_master=True, wait_for_workers=False, master_listen_fd=door.detach())


def torchrun_rank() -> tuple[int, int] | None:
    """This process's rank and how many there are, where `torchrun` has started it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def follows_torchrun() -> bool:
    """Whether `torchrun` has started this process for another rank than 0: it answers nobody, and ends in its `LLM`."""
    place = torchrun_rank()
    return place is not None and place[0] > 0


def here(rank: int) -> str:
    """The key under which a started process says that it is there."""
    return f"rank {rank} is here"


def failure(rank: int) -> str:
    """The key under which a started process says why it ends."""
    return f"rank {rank} failed"


def check_ranks(size: int, device: str) -> None:
    """Raise ConfigError where so many ranks cannot be."""
    if not dist.is_available():
        raise ConfigError("this PyTorch has no torch.distributed: tensor_parallel_size must be 1")
    if dist.is_initialized():
        raise ConfigError("torch.distributed is in use in this process already: close the other parallel model first")
    run = torchrun_rank()
    if _torchrun_has_met:
        raise ConfigError("torchrun's other processes ended with the first model: start the program again for another")
    if run is not None and run[1] != size:
        raise ConfigError(f"torchrun started {run[1]} ranks, and tensor_parallel_size={size}: they must be equal")
    if device == "cuda" and run is not None and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise ConfigError(
            f"torchrun has started more ranks here than the {torch.cuda.device_count()} GPUs: lower --nproc-per-node"
        )
    if device == "cuda" and run is None and torch.cuda.device_count() < size:
        raise ConfigError(
            f"tensor_parallel_size={size} and {torch.cuda.device_count()} GPUs here: take fewer ranks, start them on "
            "several machines with torchrun, or use device='cpu'"
        )
