"""The assignments' commands: `release` builds the students' notebooks, `grade` grades what they handed in.

    python -m minillm.course.assignments release
    python -m minillm.course.assignments grade

Students' notebooks are `release/NAME/NAME.ipynb`; hand-ins go to `submitted/STUDENT/NAME/NAME.ipynb`; `grades.csv` and
`feedback/STUDENT/NAME/NAME.html` come out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from minillm.course.grading import CELL_SECONDS, Grade, grade, submissions, write_grades
from minillm.course.release import Course, release
from minillm.training.command import run

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
Folder = Annotated[Path, typer.Option(help="The folder in which the assignments' src stands.")]
HERE = Path("notebooks/assignments")


@app.command("release")
def release_command(
    names: Annotated[list[str] | None, typer.Argument(help="Assignments; all when none is named.")] = None,
    folder: Folder = HERE,
) -> None:
    """Build the students' notebooks from the texts."""
    for path in release(Course.at(folder), names or ()):
        print(path)


@app.command("grade")
def grade_command(
    folder: Folder = HERE,
    cell_seconds: Annotated[int, typer.Option(min=1, help="A cell that runs longer is stopped.")] = CELL_SECONDS,
    jobs: Annotated[int, typer.Option(min=1, help="So many submissions at a time.")] = 1,
) -> None:
    """Grade all that was handed in; write grades.csv and feedback."""
    course = Course.at(folder)
    grades = []
    try:
        with Progress(transient=True) as progress:
            bar = progress.add_task("grading", total=len(submissions(course)))
            for one in grade(course, cell_seconds=cell_seconds, jobs=jobs):
                grades.append(one)
                progress.update(bar, advance=1, description=f"{one.student}: {one.assignment}")
    finally:  # what was graded before an end is kept
        if grades:
            write_grades(course.root / "grades.csv", grades)
    Console().print(_table(grades))
    print(f"{course.root / 'grades.csv'}\n{course.root / 'feedback'}")


def _table(grades: list[Grade]) -> Table:
    table = Table("student", "assignment", "score", "cells with points lost", "notes")
    for one in grades:
        lost = [f"{cell} −{one.points[cell] - got:g}" for cell, got in one.scores.items() if got < one.points[cell]]
        score = f"{one.score:g} of {one.max_score:g}"
        table.add_row(one.student, one.assignment, score, "\n".join(lost), "\n".join(one.notes))
    return table


if __name__ == "__main__":
    run(app)
