"""Two small things that every reader of model files needs: a JSON object from a file, and a list cut short."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minillm.errors import MinillmError


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
