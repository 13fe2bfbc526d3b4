"""Build the notebooks from their text: notebooks/src/NN_name.py (py:percent) → notebooks/NN_name.ipynb, executed.

    python notebooks/build.py            every notebook
    python notebooks/build.py 00 03      some
    python notebooks/build.py --check    compare the cells' sources with the text, execute nothing

Two runs give the same bytes, but for what is timed or trained live (cells tagged nbval-ignore-output): cell ids are
made of the name and a number, versions are left out and widgets are numbered in the order in which they appear.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
SECONDS = 600
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "COLUMNS": "100", "TQDM_DISABLE": "1"}
"""Of those kernels whose outputs are kept or compared: a laptop without a GPU, and no progress bars, which come and go
with the time that something takes."""
WIDGET_ID = r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])"  # also behind IPY_MODEL_


def read_source(path: Path) -> nbformat.NotebookNode:
    """The text as a notebook without outputs."""
    notebook = jupytext.read(path, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{path.stem}-{number:03d}"
        cell["metadata"] = {key: value for key, value in cell["metadata"].items() if key == "tags"}
    notebook["metadata"] = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
    }
    return nbformat.from_dict({**notebook, "nbformat": 4, "nbformat_minor": 5})


def build(path: Path) -> Path:
    """Execute one notebook and write it beside the folder of sources."""
    notebook = read_source(path)
    metadata = dict(notebook["metadata"])
    os.environ.update(ENVIRONMENT)
    where = {"metadata": {"path": str(HERE)}}
    NotebookClient(notebook, timeout=SECONDS, record_timing=False, resources=where).execute()
    widgets = notebook["metadata"].get("widgets")
    notebook["metadata"] = metadata | ({"widgets": widgets} if widgets else {})
    target = HERE / f"{path.stem}.ipynb"
    # Numbered before they are written: nbformat sorts by name.
    numbered = _number_widgets(json.dumps(notebook), json.dumps(widgets))
    text = nbformat.writes(nbformat.reads(numbered, as_version=4))
    target.write_text(text + "\n", encoding="utf-8", newline="\n")
    return target


def differences(path: Path) -> list[str]:
    """What a committed notebook's cells say otherwise than their source."""
    target = HERE / f"{path.stem}.ipynb"
    if not target.exists():
        return [f"{target.name} is not built"]
    built, source = nbformat.read(target, as_version=4).cells, read_source(path).cells
    found = [f"{target.name} has {len(built)} cells, its source {len(source)}"] if len(built) != len(source) else []
    for ours, theirs in zip(built, source, strict=False):
        if _essence(ours) != _essence(theirs):
            found.append(f"{target.name}: cell {ours['id']} is not the source's")
    return found


def _essence(cell: dict[str, Any]) -> tuple[Any, ...]:
    return cell["id"], cell["cell_type"], cell["source"], cell["metadata"].get("tags")


def _number_widgets(text: str, widgets: str) -> str:
    """Widgets' random ids, numbered in the order of their appearance; other numbers of their form stay."""
    found = dict.fromkeys(re.findall(WIDGET_ID, widgets))
    numbers = {name: f"{number:032x}" for number, name in enumerate(found)}
    return re.sub(WIDGET_ID, lambda match: numbers.get(match[0], match[0]), text)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="how the notebooks' names begin; all when none is given")
    parser.add_argument("--check", action="store_true", help="compare sources, execute nothing")
    asked = parser.parse_args()
    sources = sorted((HERE / "src").glob("*.py"))
    chosen = [path for path in sources if not asked.names or path.name.startswith(tuple(asked.names))]
    if not chosen:
        parser.error(f"no source begins with {' or '.join(asked.names)}")
    if asked.check:
        problems = [problem for path in chosen for problem in differences(path)]
        print("\n".join(problems) or f"{len(chosen)} notebooks are what their sources say")
        return 1 if problems else 0
    for path in chosen:
        print(build(path).name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
