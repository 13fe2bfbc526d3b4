"""How the training commands end: an error of ours is one sentence, not a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape

from minillm.errors import MinillmError

notes = Console(stderr=True, highlight=False)
"""Where a command says what it does: standard error."""


def run(command: Callable[..., Any]) -> None:
    """Run a typer command; exit with status 1 and one sentence for what minillm raises on purpose."""
    try:
        command()
    except MinillmError as error:
        notes.print(f"[red]error[/red] {escape(' '.join(str(error).split()))}", soft_wrap=True)
        sys.exit(1)
