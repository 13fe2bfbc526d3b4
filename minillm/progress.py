"""Bars and notes for what takes longer than two seconds; shorter work says nothing.

``TQDM_DISABLE=1`` in the environment silences them: where outputs are kept and compared, they would never be the same.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm.auto import tqdm

SECONDS = 2.0


def progress(iterable: Iterable[Any] | None = None, *, show: bool = True, **options: Any) -> Any:
    """tqdm's bar over `iterable`, or one to `update`, that appears after two seconds.

    Args:
        show: False for none, ever.
        options: tqdm's.
    """
    # tqdm's bars for notebooks do not look at the environment.
    return tqdm(iterable, delay=SECONDS, disable=not show or _is_silent(), **options)


@contextlib.contextmanager
def note(text: str) -> Iterator[None]:
    """Say this on stderr, at a terminal or in a notebook, if what is done inside takes longer than two seconds."""
    timer = threading.Timer(SECONDS, _say, [text])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(text: str) -> None:
    is_seen = sys.stderr.isatty() or "ipykernel" in sys.modules
    if is_seen and not _is_silent():
        print(text, file=sys.stderr)


def _is_silent() -> bool:
    return bool(os.environ.get("TQDM_DISABLE"))
