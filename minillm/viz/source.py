"""The package's own code, shown where it is explained: notebooks never keep a second copy."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from IPython.display import Markdown

import minillm
from minillm.errors import InvalidRequestError


def show_source(thing: Callable[..., Any]) -> Markdown:
    """The real source of a function or class of the package, with its file and line."""
    file, lines, first = _source(thing)
    return _markdown(f"`{file}`, from line {first}", lines)


def show_part(thing: Callable[..., Any], first: str, last: str) -> Markdown:
    """Some lines of the source of a function that is too long for one look, with their file and number.

    Args:
        thing: a function; a kernel of Numba or Triton stands for the function that it was made from.
        first: how the first line to show begins, its indentation aside.
        last: how the last one begins; the first such line from there on.

    Raises:
        InvalidRequestError: no line begins like this.
    """
    file, lines, number = _source(thing)
    start = _line(lines, first, 0)
    stop = _line(lines, last, start) + 1
    return _markdown(f"`{file}`, lines {number + start} to {number + stop - 1}", lines[start:stop])


def _source(thing: Callable[..., Any]) -> tuple[str, list[str], int]:
    """File, lines and number of the first line."""
    inner = inspect.unwrap(getattr(thing, "fn", thing))  # Triton keeps the function there, and Numba as functools do
    lines, first = inspect.getsourcelines(inner)
    file = Path(inspect.getsourcefile(inner) or "").relative_to(Path(minillm.__file__).parent)
    return f"minillm/{file.as_posix()}", lines, first


def _line(lines: Sequence[str], beginning: str, since: int) -> int:
    for number in range(since, len(lines)):
        if lines[number].strip().startswith(beginning):
            return number
    raise InvalidRequestError(f"no line from {since + 1} on begins with {beginning!r}: look at the whole source")


def _markdown(where: str, lines: Sequence[str]) -> Markdown:
    return Markdown(f"{where}:\n```python\n{textwrap.dedent(''.join(lines))}```")
