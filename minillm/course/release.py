"""From an assignment's text to the notebook that students get.

The text is a py:percent file with solutions and hidden tests, `src/NAME.py`. nbgrader makes the students' notebook of
it: the solutions replaced, the hidden tests cut out; what was cut it keeps in its database, `gradebook.db`.

Cells are marked by one tag each: none (text, or code that a student may change), `locked:ID`, `solution:ID`,
`tests:ID:POINTS`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jupytext
import nbformat

from minillm import __version__
from minillm.errors import AssignmentError, MissingExtraError

try:
    from nbgrader.apps.api import NbGraderAPI
    from sqlalchemy.exc import SAWarning
    from traitlets.config import Config
except ImportError as error:
    raise MissingExtraError("releasing and grading assignments", "assignments") from error

BEGIN_SOLUTION, END_SOLUTION = "### BEGIN SOLUTION", "### END SOLUTION"
BEGIN_HIDDEN, END_HIDDEN = "### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS"


@dataclass(frozen=True)
class Course:
    """A folder of assignments. In it stand `src`, which is written by hand, and nbgrader's folders.

    Attributes:
        root: the folder, absolute.
    """

    root: Path

    @classmethod
    def at(cls, folder: Path) -> Course:
        """The course in this folder.

        Raises:
            AssignmentError: there are no texts in it.
        """
        course = cls(folder.resolve())
        if not course.names:
            raise AssignmentError(f"there is no assignment in {folder / 'src'}: name the folder in which src stands")
        return course

    @property
    def names(self) -> list[str]:
        """The assignments that have a text."""
        return sorted(path.stem for path in (self.root / "src").glob("*.py"))

    def notebook(self, step: str, name: str, student: str = ".") -> Path:
        """An assignment's notebook in one of nbgrader's folders: source, release, submitted, autograded, feedback."""
        return self.root / step / student / name / f"{name}.ipynb"

    def api(self, **settings: Any) -> NbGraderAPI:
        """nbgrader on this course; the settings are those of its cells' execution."""
        # nbgrader asks the command `alembic` for the database's version when it makes one.
        commands, path = str(Path(sys.executable).parent), os.environ["PATH"]
        if commands not in path.split(os.pathsep):
            os.environ["PATH"] = f"{commands}{os.pathsep}{path}"
        warnings.filterwarnings("ignore", "Object of type", SAWarning)  # of its own making
        config = Config()
        config.CourseDirectory.root = str(self.root)
        # Submissions are graded side by side: one that finds the database in use waits for so many seconds.
        config.CourseDirectory.db_url = f"sqlite:///{self.root / 'gradebook.db'}?timeout=60"
        config.Execute.update(settings)
        config.Execute.extra_arguments = ["--log-level=ERROR"]
        return NbGraderAPI(config=config)


def release(course: Course, names: Iterable[str] = ()) -> list[Path]:
    """Write the students' notebooks `release/NAME/NAME.ipynb`, of all assignments when none is named; their paths.

    Raises:
        AssignmentError: an unknown name, or a text that is no assignment.
    """
    names = list(names) or course.names
    api = course.api()
    for name in names:
        if name not in course.names:
            raise AssignmentError(f"there is no assignment {name!r}: they are {', '.join(course.names)}")
        source = course.notebook("source", name)
        source.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(read_text(course.root / "src" / f"{name}.py"), source)
        result = api.generate_assignment(name)
        if not result["success"]:
            raise AssignmentError(f"nbgrader cannot release {name}: {reason(result)}")
    return [course.notebook("release", name) for name in names]


def reason(result: dict[str, Any]) -> str:
    """Why a step of nbgrader failed: the last error that it logged or raised."""
    logged = [line for line in result.get("log", "").splitlines() if "Error: " in line]
    return (logged or result["error"].strip().splitlines())[-1].strip()


def read_text(path: Path) -> nbformat.NotebookNode:
    """The text as nbgrader's instructor version.

    Raises:
        AssignmentError: a tag, an id or a marker that is missing, twice there or out of place.
    """
    notebook = jupytext.read(path, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        try:
            graded = _graded(cell)
        except AssignmentError as error:
            raise AssignmentError(f"{path.name}, cell {number}: {error}") from error
        cell["id"] = f"{path.stem}-{number:03d}"
        cell["metadata"] = {"nbgrader": graded} if graded else {}
    _check_ids(path, notebook.cells)
    notebook.cells[0]["source"] += f"\n\n*For minillm {__version__}.*"
    notebook["metadata"] = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
    }
    return nbformat.from_dict({**notebook, "nbformat": 4, "nbformat_minor": 5})


def _graded(cell: dict[str, Any]) -> dict[str, Any] | None:
    """nbgrader's metadata for a cell with one of the tags."""
    tags, source = cell["metadata"].get("tags", []), cell["source"]
    match [tag.split(":") for tag in tags]:
        case []:
            graded = None
        case [["locked", name]]:
            graded = _cell(name, locked=True)
        case [["solution", name]]:
            graded = _cell(name, solution=True)
        case [["tests", name, points]] if points.isdecimal() and int(points) > 0:
            graded = _cell(name, grade=True, locked=True) | {"points": int(points)}
        case _:
            raise AssignmentError(f"tags are locked:ID, solution:ID or tests:ID:POINTS, one a cell, not {tags}")
    if (BEGIN_SOLUTION in source and END_SOLUTION in source) != bool(graded and graded["solution"]):
        raise AssignmentError(f"a cell has a tag solution:ID where it has {BEGIN_SOLUTION} and {END_SOLUTION}")
    if BEGIN_HIDDEN in source and not (graded and graded["grade"]):
        raise AssignmentError("hidden tests stand in cells with a tag tests:ID:POINTS only")
    if graded and cell["cell_type"] != "code":
        raise AssignmentError("only code cells have tags")
    return graded


def _cell(name: str, *, grade: bool = False, solution: bool = False, locked: bool = False) -> dict[str, Any]:
    kind = {"grade": grade, "solution": solution, "locked": locked, "task": False}
    return {"grade_id": name, "schema_version": 3, "cell_type": "code", **kind}


def _check_ids(path: Path, cells: list[dict[str, Any]]) -> None:
    ids = [cell["metadata"]["nbgrader"]["grade_id"] for cell in cells if cell["metadata"]]
    twice = sorted({name for name in ids if ids.count(name) > 1 or not name})
    if twice:
        raise AssignmentError(f"{path.name}: ids must be there and differ: {', '.join(map(repr, twice))}")
    if not cells or cells[0]["cell_type"] != "markdown":
        raise AssignmentError(f"{path.name}: an assignment begins with a text cell")
    if not any(cell["metadata"] and cell["metadata"]["nbgrader"]["grade"] for cell in cells):
        raise AssignmentError(f"{path.name}: no cell has a tag tests:ID:POINTS")
