"""How rank 0 lets the other ranks compute the steps that it has planned.

It alone schedules and samples. A step reaches the others as two tensors: how many tokens, sequences and so on there
are, and all of the step's numbers behind each other. Then every rank computes its part of the same pass.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from enum import IntEnum
from types import FrameType
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minillm.cache.block_table import Copy
from minillm.cache.paged import PagedBatch
from minillm.engine.ranks import BEAT_SECONDS, Crew, DistributedRanks, Traffic
from minillm.errors import RankError

if TYPE_CHECKING:
    from minillm.engine.runner import ModelRunner


class Command(IntEnum):
    """What the others are to do."""

    STOP = 0
    BEAT = 1
    RUN = 2
    LOGITS = 3


HEADER = 6
"""Numbers that come first: the command, tokens (or rows), sequences, blocks of a table, longest part, copies."""


class Leader:
    """Rank 0's word to the others.

    Args:
        crew: the processes that it has started, where it has (and not `torchrun`).
    """

    def __init__(self, ranks: DistributedRanks, crew: Crew | None) -> None:
        self.crew = crew
        self.error: RankError | None = None
        self._ranks = ranks
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, all ranks compute; nothing else is sent meanwhile, and Ctrl-C waits.

        Raises:
            RankError: one of them has died, or does not answer.
        """
        with self._lock, _interrupts_later():
            self.check()
            try:
                with contextlib.nullcontext() if self.crew is None else self.crew.waiting():
                    yield
            except RankError as error:
                self.error = error
                raise
            except BaseException as error:
                # The others are somewhere else in the step: they cannot be spoken to any more.
                self.error = RankError(f"rank 0 failed in the middle of a step: {error}")
                if self.crew is not None:
                    self.crew.kill()
                raise

    @property
    def traffic(self) -> Traffic:
        """What rank 0 has put into collectives."""
        return self._ranks.traffic

    def check(self) -> None:
        """Raise RankError where a rank has died."""
        if self.error is not None:
            raise self.error
        if self.crew is not None:
            self.crew.check()

    def send_batch(self, tokens: Int[Tensor, "tokens"], positions: Int[Tensor, "tokens"], batch: PagedBatch) -> None:
        """Let the others run this step."""
        copies = torch.tensor(batch.copies or [], dtype=torch.int64)
        numbers = torch.cat(
            [
                part.flatten().cpu()
                for part in (
                    tokens,
                    positions,
                    batch.slot_mapping,
                    batch.query_starts,
                    batch.seq_lens,
                    batch.block_tables,
                    copies,
                )
            ]
        )
        sequences, width = batch.block_tables.shape
        self._send(Command.RUN, len(tokens), sequences, width, batch.max_query_len, len(copies))
        self._ranks.broadcast(numbers)

    def send_hidden(self, hidden: Float[Tensor, "rows hidden"]) -> None:
        """Let the others compute their logits of these rows."""
        self._send(Command.LOGITS, len(hidden))
        self._ranks.broadcast(hidden.contiguous())

    def close(self) -> None:
        """Let the others end, and wait for that."""
        if self._closed.is_set():
            return
        self._closed.set()
        with self._lock, contextlib.suppress(RuntimeError):
            if self.error is None and (self.crew is None or self.crew.error is None):
                self._send(Command.STOP)
        if self.crew is not None:
            self.crew.close()
        self._ranks.close()

    def _send(self, *numbers: int) -> None:
        self._ranks.broadcast(torch.tensor([*numbers, *[0] * (HEADER - len(numbers))]))

    def _beat(self) -> None:
        """Let the others know that rank 0 is there, and see that they are, while there is nothing to compute."""
        while not self._closed.wait(BEAT_SECONDS):
            with contextlib.suppress(RuntimeError), self.turn():  # what is wrong, the next turn or check tells
                if not self._closed.is_set():
                    self._send(Command.BEAT)
                    self._ranks.least(0)


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Hold Ctrl-C back while the ranks are under way; what it does, it does at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # it only ever interrupts the main thread
        return
    came: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(*came[0])


def ignore_signals() -> None:
    """Leave Ctrl-C and SIGTERM to rank 0, which lets the others end when it does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@torch.inference_mode()
def follow(runner: ModelRunner, ranks: DistributedRanks) -> None:
    """Compute this rank's part of what rank 0 sends, until it says that it is over.

    Raises:
        RankError: another rank has died, or does not answer.
    """
    while True:
        command, count, *sizes = ranks.broadcast(torch.zeros(HEADER, dtype=torch.int64)).tolist()
        match command:
            case Command.STOP:
                return
            case Command.BEAT:
                ranks.least(0)
            case Command.RUN:
                runner.run(_receive_batch(runner, ranks, count, *sizes))
            case Command.LOGITS:
                config = runner.decoder.config
                rows = torch.empty(count, config.hidden_size, dtype=runner.decoder.dtype, device=runner.device)
                runner.logits(ranks.broadcast(rows))


def _receive_batch(
    runner: ModelRunner, ranks: DistributedRanks, count: int, sequences: int, width: int, longest: int, copies: int
) -> PagedBatch:
    """A step's numbers, in the runner's input tensors."""
    parts = [count, count, count, sequences + 1, sequences, sequences * width, 2 * copies]
    numbers = ranks.broadcast(torch.empty(sum(parts), dtype=torch.int64))
    tokens, positions, slots, starts, lengths, tables, pairs = numbers.split(parts)
    return runner.fill(
        tokens,
        positions,
        slots,
        starts,
        lengths,
        tables.view(sequences, width),
        max_query_len=longest,
        copies=[Copy(*pair) for pair in pairs.view(-1, 2).tolist()],
    )
