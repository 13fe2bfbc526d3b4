"""Results as JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minillm.errors import ConfigError


def check_writable(path: Path | None) -> None:
    """Raise ConfigError, before anything is measured, where the result could not be written."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConfigError(f"{path} cannot be written: name a file in a folder that exists")


def write_json(path: Path, content: Any) -> None:
    """Write a result, indented."""
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
