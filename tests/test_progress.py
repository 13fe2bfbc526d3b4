"""Bars and notes come after two seconds, and never where outputs are compared; tqdm's own clock tells the time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import tqdm.notebook

import minillm.progress
from minillm.progress import note, progress


@pytest.fixture
def clock(monkeypatch):
    """The time by which tqdm goes, in seconds."""
    now = [100.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    return now


def run(clock, seconds: float, **options) -> None:
    for _ in progress(range(4), desc="work", mininterval=0, **options):
        clock[0] += seconds / 4


def test_short_work_says_nothing(clock, capsys):
    run(clock, 1.9)
    assert not capsys.readouterr().err


def test_long_work_is_told(clock, capsys):
    run(clock, 4.0)
    assert "work: 100%" in capsys.readouterr().err


def test_nobody_is_told_who_does_not_want_to_be(clock, capsys):
    run(clock, 4.0, show=False)
    assert not capsys.readouterr().err


def test_a_note_is_written_once_work_takes_long_and_somebody_looks_on(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(minillm.progress, "SECONDS", 0.0)
    spoken = []
    monkeypatch.setattr(minillm.progress, "_say", spoken.append)
    with note("compiling"):
        while not spoken:
            pass
    assert spoken == ["compiling"]
    monkeypatch.setattr(minillm.progress, "SECONDS", 60.0)
    with note("compiling"):
        pass
    assert spoken == ["compiling"]


@pytest.mark.parametrize(("terminal", "silenced", "said"), [(True, "", True), (True, "1", False), (False, "", False)])
def test_a_note_goes_to_people_only(terminal, silenced, said, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", silenced)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    minillm.progress._say("compiling")
    assert (capsys.readouterr().err == "compiling\n") == said


def test_an_environment_without_bars_has_none():
    """As notebooks are built and compared; tqdm reads its environment when it is imported."""
    code = "import tqdm.std as s; t = [0.0]; s.time = lambda: t[0]\nfrom minillm.progress import progress\n"
    code += "for _ in progress(range(4), mininterval=0): t[0] += 1"
    for disabled, said in (("1", False), ("", True)):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "TQDM_DISABLE": disabled}, capture_output=True, check=True
        )
        assert bool(done.stderr) == said


@pytest.mark.parametrize("silenced", ["1", ""])
def test_nor_has_it_bars_for_notebooks(silenced, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", silenced)
    monkeypatch.setattr(minillm.progress, "tqdm", tqdm.notebook.tqdm)
    assert progress(range(4)).disable == bool(silenced)
