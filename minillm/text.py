"""Small things that several parts need: a JSON object from a file, a list cut short, the sign of half a character."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minillm.errors import MinillmError

HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""What a decoded text ends in while the last bytes of a character are missing."""


def read_json(path: Path, error_type: type[MinillmError]) -> dict[str, Any]:
    """The object in a JSON file; raises `error_type` for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise error_type(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise error_type(f"{path} does not hold an object")
    return content


def some(names: Sequence[str], count: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
