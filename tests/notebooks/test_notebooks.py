"""Notebooks are what their sources say, and were run whole; nbval compares their outputs (`make test`)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
BUILT = sorted(NOTEBOOKS.glob("*.ipynb"))


def test_cells_are_the_sources():
    command = [sys.executable, NOTEBOOKS / "build.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_source_is_built():
    assert [path.stem for path in BUILT] == sorted(path.stem for path in (NOTEBOOKS / "src").glob("*.py"))


@pytest.mark.parametrize("path", BUILT, ids=lambda path: path.stem)
def test_run_from_top_to_bottom_without_errors(path):
    """A notebook that was never executed would pass nbval without checking anything."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_sources_that_are_shown_are_the_packages_now(path):
    """Seen at once where code has moved on; nbval would see it, too, after minutes."""
    for cell in nbformat.read(path, as_version=4).cells:
        for shown in (out.data.get("text/markdown", "") for out in cell.get("outputs", ()) if "data" in out):
            if found := re.match(r"`([^`]+)`, (?:from line|lines) (\d+).*?\n```\w*\n(.*?)\n", shown, re.DOTALL):
                lines = (NOTEBOOKS.parent / found[1]).read_text(encoding="utf-8").splitlines()
                assert lines[int(found[2]) - 1].strip() == found[3].strip(), f"build {path.stem} again"
