"""The package's own code, shown where it is explained: notebooks never keep a second copy."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from IPython.display import Markdown

import minillm


def show_source(thing: Callable[..., Any]) -> Markdown:
    """The real source of a function or class of the package, with its file and line."""
    inner = inspect.unwrap(getattr(thing, "fn", thing))  # Triton keeps the function there, and Numba as functools do
    lines, first = inspect.getsourcelines(inner)
    file = Path(inspect.getsourcefile(inner) or "").relative_to(Path(minillm.__file__).parent)
    code = textwrap.dedent("".join(lines))
    return Markdown(f"`minillm/{file.as_posix()}`, from line {first}:\n```python\n{code}```")
