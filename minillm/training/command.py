"""How the training commands end: an error of ours is one sentence, not a traceback."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from minillm.errors import ConfigError, MinillmError

notes = Console(stderr=True, highlight=False)
"""Where a command says what it does: standard error."""


def check_folder(folder: Path) -> None:
    """Raise ConfigError for a folder that cannot be written to: before an hour of training, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written to ({error.strerror}): choose another folder") from error


def run(command: Callable[..., Any]) -> None:
    """Run a typer command; exit with status 1 and one sentence for what minillm raises on purpose, or a full disk."""
    try:
        command()
    except (MinillmError, OSError) as error:
        notes.print(f"[red]error[/red] {escape(' '.join(str(error).split()))}", soft_wrap=True)
        sys.exit(1)
