"""Property tests: random operations on a student's piece, beside a model so simple that it is right by inspection.

When the two differ, the sequence of operations is shrunk before it is told, so that a student reads the three lines
that matter and not forty (the idea is QuickCheck's: Claessen and Hughes 2000; the shrinking is a plain version of
Zeller and Hildebrandt 2002, "Simplifying and Isolating Failure-Inducing Input").
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from minillm.course.checks import CheckError


class Operation(NamedTuple):
    """One operation.

    Attributes:
        kind: what is done.
        name: to what. Where there is nothing of this name, nothing is done, so that any operation can be left out.
        argument: how much, how far, or which.
        new: name of what comes of it, if something does.
    """

    kind: str
    name: str = ""
    argument: int = 0
    new: str = ""


class World(Protocol):
    """A student's piece and the model beside it.

    Attributes:
        lines: what has been done so far, as one would type it.
    """

    lines: list[str]

    def do(self, operation: Operation) -> None:
        """Do it to both, and raise CheckError where they differ."""


def judge(
    make: Callable[[], World],
    draw: Callable[[random.Random], list[Operation]],
    *,
    seed: int,
    rounds: int = 60,
) -> None:
    """Raise CheckError if some of these sequences of operations goes wrong; the message has the shortest one found.

    Args:
        make: a new world.
        draw: a sequence of operations.
    """
    rng = random.Random(seed)
    for _ in range(rounds):
        operations = draw(rng)
        if _failure(make, operations):
            raise CheckError(f"{_failure(make, shrink(make, operations))} (seed {seed})")


def shrink(make: Callable[[], World], operations: Sequence[Operation]) -> list[Operation]:
    """A part of a failing sequence that still fails, and of which no single operation can be left out."""
    kept = list(operations)
    size = len(kept) // 2
    while size:
        start = 0
        while start < len(kept):
            fewer = kept[:start] + kept[start + size :]
            if _failure(make, fewer):
                kept = fewer
            else:
                start += size
        size //= 2
    return kept


def _failure(make: Callable[[], World], operations: Sequence[Operation]) -> str:
    """What goes wrong, and after which lines; nothing where all goes well."""
    world: World | None = None
    try:
        world = make()
        for operation in operations:
            world.do(operation)
    except CheckError as error:
        wrong = str(error)
    except Exception as error:  # the student's: whatever it is, it is told
        wrong = f"it raised {type(error).__name__}: {error}".removesuffix(": ")
    else:
        return ""
    lines = "".join(f"\n    {line}" for line in ([] if world is None else world.lines))
    return f"after{lines}\n{wrong}"
