"""The assignments as an instructor runs them: released, handed in by several students, graded by nbgrader."""

import csv
import html
import re
import runpy
import sys
from pathlib import Path

import nbformat
import pytest

import minillm
from minillm.course.grading import grade, write_grades
from minillm.course.release import Course, read_text, release
from minillm.errors import AssignmentError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TEXTS = {path.stem: path for path in sorted((ROOT / "notebooks" / "assignments" / "src").glob("*.py"))}
if sys.platform != "linux":
    TEXTS.pop("a5_paged_attention")  # Triton is for Linux

DEMO = """\
# %% [markdown]
# # A small assignment

# %% tags=["locked:given"]
BASE = 10

# %%
mine = "a cell of the student's"

# %% tags=["solution:double"]
def double(x):
    ### BEGIN SOLUTION
    return 2 * x
    ### END SOLUTION

# %% tags=["tests:double_tests:3"]
assert double(2) == 4, f"double(2) is {double(2)}"
### BEGIN HIDDEN TESTS
assert double(BASE) == 20, f"double({BASE}) is {double(BASE)}"
### END HIDDEN TESTS

# %% tags=["solution:triple"]
def triple(x):
    ### BEGIN SOLUTION
    return 3 * x
    ### END SOLUTION

# %% tags=["tests:triple_tests:2"]
assert triple(1) == 3
### BEGIN HIDDEN TESTS
assert triple(BASE) == 30
### END HIDDEN TESTS
"""
STUBBORN = """while True:
        try:
            while True:
                pass
        except KeyboardInterrupt:
            pass"""
DOUBLE, TRIPLE = "return 2 * x", "return 3 * x"
REPLACED = {
    # name: (what stands in the solved notebook, what the student has instead, points for double and triple)
    "solved": ("", "", 3, 2),
    "dies": (DOUBLE, "import os; os._exit(1)", 0, 2),
    "segfault": (TRIPLE, "import ctypes; ctypes.string_at(0)", 3, 0),
    "dies_at_once": ('mine = "a cell of the student\'s"', "import os; os._exit(1)", 3, 2),
    "leaves": (DOUBLE, "exit()", 0, 2),
    "loops": (DOUBLE, "while True: pass", 0, 2),
    "stubborn": (DOUBLE, STUBBORN, 0, 2),
    "floods": (DOUBLE, "while True: print('x' * 1000)", 0, 2),
    "hard_codes": (DOUBLE, "return 4", 0, 2),
    "hoards": (DOUBLE, "rows = []\n    while True: rows.append(bytes(2**28))", 0, 2),
    "long_message": (DOUBLE, "raise ValueError('x' * 10_000_000)", 0, 2),
    "warns": (DOUBLE, "import sys; print('x' * 10_000_000, file=sys.stderr); return 2 * x", 3, 2),
    "edits_given": ("BASE = 10", "BASE = 'anything'", 3, 2),
    "edits_tests": ("assert triple(1) == 3", "pass", 3, 2),
}


def course_of(folder, texts):
    """A course of these texts, released."""
    (folder / "src").mkdir()
    for name, text in texts.items():
        (folder / "src" / f"{name}.py").write_text(text, encoding="utf-8")
    course = Course.at(folder)
    release(course)
    return course


def solved(course, name):
    """The students' notebook with our solutions in it."""
    solutions = {cell.id: cell.source for cell in read_text(course.root / "src" / f"{name}.py").cells}
    notebook = nbformat.read(course.notebook("release", name), as_version=4)
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("solution"):
            cell.source = solutions[cell.id]
    return notebook


def hand_in(course, student, name, notebook):
    path = course.notebook("submitted", name, student)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(notebook, str):
        path.write_text(notebook, encoding="utf-8")
    else:
        nbformat.write(notebook, path)
    return path


def replaced(notebook, old, new):
    cells = [cell for cell in notebook.cells if old in cell.source]
    assert cells, f"{old!r} stands in no cell"
    cells[0].source = cells[0].source.replace(old, new)
    return notebook


def without_cell(notebook, name):
    notebook.cells = [cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade_id") != name]
    return notebook


def graded(course, **options):
    return {(one.student, one.assignment): one for one in grade(course, jobs=2, **options)}


def feedback(course, student, name):
    """What a student reads."""
    page = course.notebook("feedback", name, student).with_suffix(".html").read_text(encoding="utf-8")
    return html.unescape(re.sub(r"<[^>]+>", "", page))


def messages(course, student, name):
    """The errors of each tests cell."""
    cells = nbformat.read(course.notebook("autograded", name, student), as_version=4).cells
    return {
        cell.metadata.nbgrader.grade_id: " ".join(out.evalue for out in cell.outputs if out.output_type == "error")
        for cell in cells
        if cell.metadata.get("nbgrader", {}).get("grade")
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A class of students with every accident that we know of; the course and its grades."""
    course = course_of(tmp_path_factory.mktemp("demo"), {"demo": DEMO})
    for student, (old, new, *_) in REPLACED.items():
        hand_in(course, student, "demo", replaced(solved(course, "demo"), old, new))
    hand_in(course, "untouched", "demo", nbformat.read(course.notebook("release", "demo"), as_version=4))
    hand_in(course, "deletes_given", "demo", without_cell(solved(course, "demo"), "given"))
    hand_in(course, "deletes_tests", "demo", without_cell(solved(course, "demo"), "double_tests"))
    hand_in(course, "no_json", "demo", "def double(x): return 2 * x")
    hand_in(course, "empty", "demo", "")
    hand_in(course, "no_notebook", "demo", "[1, 2]")
    hand_in(course, "misnamed", "demo", solved(course, "demo")).rename(
        course.notebook("submitted", "demo", "misnamed").with_name("Untitled.ipynb")
    )
    spoilt = solved(course, "demo")
    spoilt.cells[1].metadata["nbgrader"] = {"grade_id": "given", "schema_version": 99}
    hand_in(course, "spoilt", "demo", spoilt)
    hand_in(course, "elsewhere", "demmo", solved(course, "demo"))
    hand_in(course, "Ann [7]", "demo", solved(course, "demo"))
    (course.root / "submitted" / "flat").mkdir()
    hand_in(course, "flat", "demo", solved(course, "demo")).rename(course.root / "submitted" / "flat" / "demo.ipynb")
    (course.root / "submitted" / "flat" / "demo").rmdir()
    hand_in(course, "__MACOSX", "ada", "what archives leave behind")
    grades = graded(course, cell_seconds=5)
    write_grades(course.root / "grades.csv", list(grades.values()))
    return course, grades


@pytest.mark.parametrize("student", REPLACED)
def test_a_cell_costs_its_own_points_only(demo, student):
    *_, double, triple = REPLACED[student]
    assert demo[1][student, "demo"].scores == {"double_tests": double, "triple_tests": triple}


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("dies", "the kernel died in this cell"),
        ("leaves", "ended the kernel"),
        ("loops", "stopped after 5 seconds"),
        ("stubborn", "did not stop when it was interrupted"),
        ("floods", "cut here"),
        ("long_message", "cut here"),
        ("warns", "cut here"),
        ("untouched", "NotImplementedError"),
        ("hard_codes", "double(10) is 4"),
        ("hoards", "MemoryError"),
    ],
)
def test_the_feedback_says_what_happened_and_is_no_book(demo, student, message):
    text = feedback(demo[0], student, "demo")
    assert message in text
    assert "double(BASE)" not in text  # a hidden test
    assert len(text) < 400_000


@pytest.mark.parametrize(
    ("student", "score", "note"),
    [
        ("untouched", 0, ""),
        ("solved", 5, ""),
        ("edits_given", 5, "given was changed: graded with the original"),
        ("edits_tests", 5, "triple_tests was changed: graded with the original"),
        ("deletes_given", 5, "given was deleted: put back"),
        ("deletes_tests", 2, "double_tests was deleted: 0 points for it"),
        ("no_json", 0, "demo.ipynb is no notebook: Notebook does not appear to be JSON"),
        ("empty", 0, "demo.ipynb is no notebook"),
        ("no_notebook", 0, "demo.ipynb is JSON, but no notebook"),
        ("spoilt", 0, "nbgrader cannot grade it"),
        ("misnamed", 0, "there is no demo.ipynb in"),
    ],
)
def test_the_instructor_is_told(demo, student, score, note):
    one = demo[1][student, "demo"]
    assert (one.score, one.max_score) == (score, 5)
    assert note in "".join(one.notes)
    assert bool(one.notes) == bool(note)


def test_an_unknown_assignment_is_told(demo):
    assert demo[1]["elsewhere", "demmo"].notes == ("there is no assignment 'demmo': they are demo",)
    assert demo[1]["flat", "demo.ipynb"].notes == ("demo.ipynb lies in the student's folder: put it into demo/",)
    assert "rename it" in demo[1]["Ann [7]", "demo"].notes[0]


def test_the_table_of_grades_has_every_submission(demo):
    course, grades = demo
    rows = list(csv.DictReader((course.root / "grades.csv").open(encoding="utf-8")))
    assert len(rows) == len(grades) == len(REPLACED) + 11
    told = next(row for row in rows if row["student"] == "deletes_tests")
    assert told | {"notes": ""} == {
        "student": "deletes_tests",
        "assignment": "demo",
        "score": "2.0",
        "max_score": "5.0",
        "demo:double_tests": "0.0",
        "demo:triple_tests": "2.0",
        "notes": "",
    }


def test_a_second_submission_counts_and_a_given_cell_may_take_longer(tmp_path):
    course = course_of(tmp_path, {"demo": DEMO.replace("BASE = 10", "import time; time.sleep(4); BASE = 10")})
    hand_in(course, "ada", "demo", nbformat.read(course.notebook("release", "demo"), as_version=4))
    assert graded(course)["ada", "demo"].score == 0
    hand_in(course, "ada", "demo", solved(course, "demo"))
    assert graded(course, cell_seconds=3)["ada", "demo"].score == 5
    hand_in(course, "ada", "demo", without_cell(solved(course, "demo"), "double_tests"))
    assert graded(course)["ada", "demo"].score == 2
    hand_in(course, "ada", "demo", "")
    assert graded(course)["ada", "demo"].score == 0
    assert not course.notebook("feedback", "demo", "ada").with_suffix(".html").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tests:double_tests:3", "tests:double_tests", "demo.py, cell 4: tags are locked:ID, solution:ID or tests:ID"),
        ("tests:double_tests:3", "tests:double_tests:many", "tests:double_tests:many"),
        ("solution:triple", "solution:double", "ids must be there and differ: 'double'"),
        ("solution:triple", "locked:triple", "a cell has a tag solution:ID where it has ### BEGIN SOLUTION"),
        ("    ### END SOLUTION", "", "a cell has a tag solution:ID where it has ### BEGIN SOLUTION"),
        ("### END HIDDEN TESTS", "", "nbgrader cannot release demo: RuntimeError: No end hidden tests statement"),
        ("[markdown]\n#", 'tags=["given"]\n#', "tags are locked:ID"),
    ],
)
def test_a_text_that_is_no_assignment_is_told(tmp_path, old, new, message):
    with pytest.raises(AssignmentError, match=re.escape(message)):
        course_of(tmp_path, {"demo": DEMO.replace(old, new)})


def test_nothing_to_release_or_to_grade_is_told(tmp_path):
    with pytest.raises(AssignmentError, match="name the folder in which src stands"):
        Course.at(tmp_path)
    course = course_of(tmp_path, {"demo": DEMO})
    with pytest.raises(AssignmentError, match=r"STUDENT/demo/demo\.ipynb"):
        list(grade(course))
    with pytest.raises(AssignmentError, match="no assignment 'a9': they are demo"):
        release(course, ["a9"])


# The real assignments.


def mistakes_of(name):
    path = HERE / "mistakes" / f"{name}.py"
    return runpy.run_path(str(path))["MISTAKES"] if path.exists() else []


def students_of(name, config):
    """Mistakes that cost points of different cells, together in one submission: that they do not add up otherwise.

    The first such submission of each assignment (three of the first), or all of them with --all-mistakes.
    """
    students = []
    for mistake in mistakes_of(name):
        for group in students:
            if not any(
                one["solution"] == mistake["solution"] or one["loses"].keys() & mistake["loses"].keys() for one in group
            ):
                group.append(mistake)
                break
        else:
            students.append([mistake])
    return students if config.getoption("--all-mistakes") else students[: 3 if name == "a1_attention" else 1]


@pytest.fixture(scope="module")
def classroom(request, tmp_path_factory):
    """All assignments (that tests were selected for), graded at once for students who solved them, who did nothing, and
    who made our planted mistakes."""
    selected = [getattr(item, "callspec", None) for item in request.session.items]
    names = sorted({spec.params["name"] for spec in selected if spec and spec.params.get("name") in TEXTS})
    texts = {name: TEXTS[name].read_text(encoding="utf-8") for name in names}
    course = course_of(tmp_path_factory.mktemp("classroom"), texts)
    for name in names:
        hand_in(course, "reference", name, solved(course, name))
        hand_in(course, "untouched", name, nbformat.read(course.notebook("release", name), as_version=4))
        for number, group in enumerate(students_of(name, request.config)):
            hand_in(course, f"mistakes{number}", name, mistaken(course, name, group))
    return course, graded(course, cell_seconds=600)  # other tests run beside this one


def hidden_lines(name):
    """Lines of hidden tests that stand nowhere else, as they are read in a page.

    Not those that only call a check: IPython tells of a frame by such a line.
    """
    text = TEXTS[name].read_text(encoding="utf-8")
    block = re.compile(r"### BEGIN HIDDEN TESTS\n(.*?)### END HIDDEN TESTS", re.DOTALL)
    lines = {line.strip() for hidden in block.findall(text) for line in hidden.splitlines()}
    course = (path.read_text(encoding="utf-8") for path in Path(minillm.__file__).parent.glob("course/*.py"))
    seen = "\n".join([block.sub("", text), *course])
    return [line for line in lines if len(line) > 12 and line not in seen and not re.match(r"check_\w+\(", line)]


def mistaken(course, name, group):
    """The solved notebook with these mistakes in it."""
    notebook = solved(course, name)
    cells = {cell.metadata.get("nbgrader", {}).get("grade_id"): cell for cell in notebook.cells}
    for mistake in group:
        cell = cells[mistake["solution"]]
        assert cell.source.count(mistake["old"]) == 1, f"{mistake['name']}: its old text is not once in the solution"
        cell.source = cell.source.replace(mistake["old"], mistake["new"])
    return notebook


@pytest.mark.parametrize("name", TEXTS)
def test_the_reference_scores_all_and_the_untouched_release_nothing(classroom, name):
    course, grades = classroom
    assert grades["reference", name].scores == grades["reference", name].points, messages(course, "reference", name)
    assert grades["untouched", name].score == 0
    # Solutions that are the package's are told as such, and nothing else is.
    assert all(note.endswith("word for word") for note in grades["reference", name].notes)
    assert bool(grades["reference", name].notes) == (name in ("a4_block_allocator", "a6_scheduler"))
    assert not grades["untouched", name].notes


@pytest.mark.parametrize("name", TEXTS)
def test_a_mistake_loses_its_points_and_its_message_is_shown(classroom, name, pytestconfig):
    course, grades = classroom
    assert len(mistakes_of(name)) >= 3
    for number, group in enumerate(students_of(name, pytestconfig)):
        student = f"mistakes{number}"
        one, errors, page = grades[student, name], messages(course, student, name), feedback(course, student, name)
        loses = {cell: points for mistake in group for cell, points in mistake["loses"].items()}
        assert {cell: one.points[cell] - got for cell, got in one.scores.items() if got < one.points[cell]} == loses, (
            group,
            errors,
        )
        for mistake in group:
            assert any(mistake["message"] in errors[cell] for cell in mistake["loses"]), (mistake, errors)
            assert mistake["message"] in page
        assert not [line for line in hidden_lines(name) if line in page]


@pytest.mark.parametrize("name", TEXTS)
def test_cells_that_judge_import_their_judges(name):
    """Whatever names a student has taken for something else, `check` for one."""
    cells = read_text(TEXTS[name]).cells
    judges = judges_imported("\n".join(cell.source for cell in cells))
    for cell in cells:
        if cell.metadata.get("nbgrader", {}).get("grade"):
            used = {judge for judge in judges if re.search(rf"\b{judge}\(", cell.source)}
            assert used <= judges_imported(cell.source), cell.metadata.nbgrader.grade_id


def judges_imported(source):
    lists = re.findall(r"^from minillm\.course\S* import ([^(\n]+|\([^)]+\))", source, re.MULTILINE)
    return {name for one in lists for name in re.findall(r"\b(?:check|compare|judge|without)\w*", one)}


@pytest.mark.parametrize("name", TEXTS)
def test_the_release_holds_no_solution_and_no_hidden_test(classroom, name):
    text = classroom[0].notebook("release", name).read_text(encoding="utf-8")
    assert "SOLUTION" not in text
    assert "HIDDEN" not in text
    released, originals = nbformat.reads(text, as_version=4).cells, read_text(TEXTS[name]).cells
    for cell, original in zip(released, originals, strict=True):
        if original.metadata.get("nbgrader", {}).get("solution"):
            answer = original.source.split("### BEGIN SOLUTION")[1].split("### END SOLUTION")[0].strip()
            assert answer not in "\n".join(one.source for one in released)
            assert "raise NotImplementedError()" in cell.source
