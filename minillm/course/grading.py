"""Grades what students handed in, by nbgrader: scores, a table of grades, and HTML feedback.

Students' code runs with the rights of whoever grades. Timeouts and restarts keep a mistake from costing more than its
cell; they are no protection against malice. For strangers' code, grade in a container.
"""

from __future__ import annotations

import contextlib
import csv
import multiprocessing
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
from nbconvert.filters import strip_ansi
from nbconvert.preprocessors import ClearMetadataPreprocessor, CSSHTMLHeaderPreprocessor
from nbgrader.api import Gradebook, MissingEntry
from nbgrader.converters import Autograde, GenerateFeedback
from nbgrader.preprocessors import (
    CheckCellMetadata,
    ClearHiddenTests,
    ClearOutput,
    DeduplicateIds,
    GetGrades,
    LimitOutput,
    NbGraderPreprocessor,
    OverwriteCells,
    OverwriteKernelspec,
    SaveAutoGrades,
)
from nbgrader.utils import capture_log, compute_checksum, temp_attrs
from traitlets import List
from traitlets.config import Config

import minillm
from minillm.course.copies import copies
from minillm.course.execution import CarefulExecute
from minillm.course.release import BEGIN_HIDDEN, END_HIDDEN, Course, reason, release
from minillm.errors import AssignmentError

CELL_SECONDS = 60
MEMORY = 8 * 2**30
"""Bytes that a submission may ask for, on Linux: a list that grows without end is a MemoryError of its cell."""


@dataclass(frozen=True)
class Grade:
    """One submission's result.

    Attributes:
        scores: points got, by tests cell.
        points: points to get, by tests cell.
        notes: what the instructor should know: files that cannot be read, locked cells that were changed.
    """

    student: str
    assignment: str
    scores: dict[str, float] = field(default_factory=dict)
    points: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        return sum(self.scores.values())

    @property
    def max_score(self) -> float:
        return sum(self.points.values())


def grade(course: Course, *, cell_seconds: int = CELL_SECONDS, jobs: int = 1) -> Iterator[Grade]:
    """Grade every `submitted/STUDENT/NAME/NAME.ipynb`, by the texts as they are now.

    Args:
        cell_seconds: a cell that runs longer is interrupted and fails.
        jobs: so many submissions at a time.

    Raises:
        AssignmentError: nothing was handed in, a text is no assignment, or a grading process was ended from outside.
    """
    handed_in = submissions(course)
    release(course, sorted({name for _, name in handed_in if name in course.names}))
    spawn = multiprocessing.get_context("spawn")  # nbgrader changes the folder that it works in, so no threads
    with ProcessPoolExecutor(min(jobs, len(handed_in)), mp_context=spawn, initializer=_set_environment) as pool:
        try:
            yield from pool.map(partial(_grade_submission, course, cell_seconds), *zip(*handed_in, strict=True))
        except BrokenProcessPool as error:
            raise AssignmentError(
                "a process that graded was ended (by somebody, or because memory ran out): grade again, with fewer jobs"
            ) from error


def submissions(course: Course) -> list[tuple[str, str]]:
    """Students and the names of what they handed in.

    Raises:
        AssignmentError: there is nothing.
    """
    # What file managers and archives leave behind begins with . or __.
    found = [
        (student.name, folder.name)
        for student in sorted((course.root / "submitted").glob("*"))
        for folder in (sorted(student.iterdir()) if student.is_dir() else [])
        if not any(one.name.startswith((".", "__")) for one in (student, folder))
    ]
    if not found:
        where = course.root / "submitted" / "STUDENT" / course.names[0] / f"{course.names[0]}.ipynb"
        raise AssignmentError(f"nothing was handed in: put notebooks where {where} says")
    return found


def _set_environment() -> None:
    """Graded on a CPU, whatever the machine has; submissions run side by side, so each has one thread and some memory.

    Kernels import the minillm that grades, wherever they run.
    """
    os.environ.update(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    with contextlib.suppress(ImportError):  # Windows has no such limits
        import resource

        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        bound = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
        resource.setrlimit(resource.RLIMIT_DATA, (bound, most))
    here, others = str(Path(minillm.__file__).parents[1]), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{here}{os.pathsep}{others}" if others else here


def _grade_submission(course: Course, cell_seconds: int, student: str, name: str) -> Grade:
    if name not in course.names:
        return Grade(student, name, notes=(_unknown(course, name),))
    if set(student) & set("*?[]"):
        return Grade(student, name, notes=("nbgrader finds no folder with one of *?[] in its name: rename it",))
    _forget(course, student, name)
    points = {cell["grade_id"]: float(cell["points"]) for cell in _cells(course.notebook("source", name), "grade")}
    scores = dict.fromkeys(points, 0.0)
    notes: tuple[str, ...] = ()
    try:
        notes = _changes(course, student, name)
        scores |= _autograde(course, cell_seconds, student, name)
    except AssignmentError as error:
        notes = (*notes, str(error))
    except Exception as error:  # whatever a submission does to nbgrader, the others are graded
        notes = (*notes, f"it cannot be graded: {type(error).__name__}: {error}")
    return Grade(student, name, scores, points, notes)


def _unknown(course: Course, name: str) -> str:
    meant = name.removesuffix(".ipynb")
    if meant in course.names:
        return f"{name} lies in the student's folder: put it into {meant}/"
    return f"there is no assignment {name!r}: they are {', '.join(course.names)}"


def _forget(course: Course, student: str, name: str) -> None:
    """Drop what came of an earlier submission: nbgrader would keep the points of a cell that the new one lacks."""
    for step in ("autograded", "feedback"):
        shutil.rmtree(course.notebook(step, name, student).parent, ignore_errors=True)
    with Gradebook(course.api().coursedir.db_url) as gradebook, contextlib.suppress(MissingEntry):
        for one in gradebook.find_submission_notebook(name, name, student).grades:
            one.auto_score = 0
        gradebook.db.commit()


def _autograde(course: Course, cell_seconds: int, student: str, name: str) -> dict[str, float]:
    """Points by tests cell, from nbgrader; feedback is written."""
    api = course.api(timeout=cell_seconds)
    with temp_attrs(api.coursedir, assignment_id=name, student_id=student):
        converter = CarefulAutograde(coursedir=api.coursedir, parent=api)
        converter.force = True
        result = capture_log(converter)
        if result["success"]:
            feedback = CarefulFeedback(coursedir=api.coursedir, parent=api)
            feedback.update_config(Config({"HTMLExporter": {"template_name": "feedback"}}))
            feedback.force = True
            result = capture_log(feedback)
    if not result["success"]:
        raise AssignmentError(f"nbgrader cannot grade it: {reason(result)}")
    with Gradebook(api.coursedir.db_url) as gradebook:
        grades = gradebook.find_submission_notebook(name, name, student).grades
        return {one.name: float(one.score or 0) for one in grades}


def _changes(course: Course, student: str, name: str) -> tuple[str, ...]:
    """What a student did to cells that were not theirs, and what in theirs is the package's.

    Raises:
        AssignmentError: the notebook is missing or cannot be read.
    """
    submitted = {cell["grade_id"]: cell for cell in _cells(course.notebook("submitted", name, student), "grade_id")}
    notes = []
    for cell in _cells(course.notebook("release", name), "locked"):
        grade_id = cell["grade_id"]
        if grade_id not in submitted:
            notes.append(f"{grade_id} was deleted: " + ("0 points for it" if cell["grade"] else "put back"))
        elif not submitted[grade_id]["intact"]:
            notes.append(f"{grade_id} was changed: graded with the original")
    for cell in nbformat.read(course.notebook("submitted", name, student), as_version=4).cells:
        if cell.cell_type == "code" and not cell.metadata.get("nbgrader", {}).get("locked"):
            notes.extend(f"{mine} is minillm's {theirs}, word for word" for mine, theirs in copies(cell.source))
    return tuple(notes)


def _cells(path: Path, kind: str) -> list[dict[str, Any]]:
    """nbgrader's metadata of the cells in which its entry `kind` is set; `intact`: the cell is as it was released."""
    if not path.is_file():
        others = sorted(other.name for other in path.parent.glob("*") if not other.name.startswith(".")) or ["nothing"]
        raise AssignmentError(f"there is no {path.name} in {path.parent}, but {', '.join(others)}")
    try:
        cells = nbformat.read(path, as_version=4).cells
        graded = [cell for cell in cells if cell["metadata"].get("nbgrader", {}).get(kind)]
        told = [(cell, cell["metadata"]["nbgrader"]) for cell in graded]
        return [{**one, "intact": one.get("checksum") == compute_checksum(cell)} for cell, one in told]
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, UnicodeDecodeError) as error:
        raise AssignmentError(f"{path.name} is no notebook: {str(error).splitlines()[0][:200]}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AssignmentError(f"{path.name} is JSON, but no notebook") from error


class RestoreLocked(NbGraderPreprocessor):
    """Puts given cells back that a student deleted. nbgrader puts back changed ones only; tests stay deleted."""

    def preprocess(self, nb: Any, resources: Any) -> tuple[Any, Any]:
        """The notebook with the missing cells, each behind the cell that it stood behind."""
        place = 0
        for cell in nbformat.read(resources["nbgrader"]["source"], as_version=4).cells:
            graded = cell.metadata.get("nbgrader")
            if graded is None:
                continue
            ids = [one.metadata.get("nbgrader", {}).get("grade_id") for one in nb.cells]
            if graded["grade_id"] in ids:
                place = ids.index(graded["grade_id"]) + 1
            elif graded["locked"] and not graded["grade"]:
                nb.cells.insert(place, cell)
                place += 1
        return nb, resources


class CarefulAutograde(Autograde):
    """nbgrader's autograde with our execution, and with deleted cells put back."""

    sanitize_preprocessors = List(
        [ClearOutput, DeduplicateIds, OverwriteKernelspec, RestoreLocked, OverwriteCells, CheckCellMetadata]
    )
    autograde_preprocessors = List(
        [CarefulExecute, ClearMetadataPreprocessor, LimitOutput, SaveAutoGrades, CheckCellMetadata]
    )

    def init_single_notebook_resources(self, notebook_filename: str) -> dict[str, Any]:
        """What the preprocessors are told; also where the instructor's version is."""
        resources: dict[str, Any] = super().init_single_notebook_resources(notebook_filename)
        told = resources["nbgrader"]
        folder = self.coursedir.format_path(self.coursedir.source_directory, ".", told["assignment"])
        told["source"] = str(Path(folder) / f"{told['notebook']}.ipynb")
        return resources


class HideTests(ClearHiddenTests):
    """Takes hidden tests out of what students read: whoever may hand in again would learn them by heart.

    Of a failing check the message stays, and the lines that led there, but for those that are hidden.
    """

    def preprocess_cell(self, cell: Any, resources: Any, cell_index: int) -> tuple[Any, Any]:
        """The cell without its hidden tests, and its errors without lines of them."""
        hidden = _hidden_lines(cell.source)
        for error in (one for one in cell.get("outputs", ()) if one.output_type == "error"):
            error.traceback = [
                _without_lines(part, hidden)
                if strip_ansi(part).startswith(f"Cell In[{cell.execution_count}]")
                else part
                for part in error.traceback
            ]
        return super().preprocess_cell(cell, resources, cell_index)


def _hidden_lines(source: str) -> set[int]:
    """Numbers of the lines of hidden tests, from 1 on."""
    found, is_hidden = set(), False
    for number, line in enumerate(source.splitlines(), 1):
        is_hidden = is_hidden or BEGIN_HIDDEN in line
        if is_hidden:
            found.add(number)
        is_hidden = is_hidden and END_HIDDEN not in line
    return found


def _without_lines(part: str, numbers: set[int]) -> str:
    """A part of IPython's traceback without lines of these numbers."""
    found = ((line, re.match(r"(?:-+> ?|\s*)(\d+)\b", strip_ansi(line))) for line in part.splitlines())
    return "\n".join(line for line, number in found if number is None or int(number[1]) not in numbers)


class CarefulFeedback(GenerateFeedback):
    """nbgrader's feedback without hidden tests."""

    preprocessors = List([HideTests, GetGrades, CSSHTMLHeaderPreprocessor])


def write_grades(path: Path, grades: list[Grade]) -> None:
    """A CSV with a row a submission, and a column a tests cell (empty where a submission has no such cell)."""
    cells = list(dict.fromkeys(f"{one.assignment}:{cell}" for one in grades for cell in one.points))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["student", "assignment", "score", "max_score", *cells, "notes"])
        for one in grades:
            scores = {f"{one.assignment}:{cell}": score for cell, score in one.scores.items()}
            row = [one.student, one.assignment, one.score, one.max_score]
            table.writerow([*row, *(scores.get(cell, "") for cell in cells), "; ".join(one.notes)])
