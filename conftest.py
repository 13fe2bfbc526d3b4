"""Set before anything imports Triton: its kernels run in the interpreter, in tests and in the notebooks' kernels."""

import os
import sys
from pathlib import Path

import pytest


def _has_gpu() -> bool:
    # torch is not asked: importing it may import Triton.
    return Path("/dev/nvidiactl").exists()


if not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

collect_ignore_glob = ["notebooks/assignments/*"]  # what is released has holes
if sys.platform != "linux":  # Triton is for Linux
    collect_ignore_glob += ["notebooks/09_*", "notebooks/10_*"]

import tests.typechecker  # noqa: E402, F401  (jaxtyping's hook looks it up by name)


def pytest_configure(config):
    if config.getoption("nbval", False):
        # A progress bar comes and goes with the time that something takes: outputs are compared without.
        os.environ["TQDM_DISABLE"] = "1"


def pytest_addoption(parser):
    parser.addoption("--all-mistakes", action="store_true", help="grade every planted mistake, not some of each")


TABLES: dict[str, list[str]] = {}


@pytest.fixture
def report():
    """report(title, line): lines of a table printed when all tests are done."""

    def add(title: str, line: str) -> None:
        TABLES.setdefault(title, []).append(line)

    return add


def pytest_terminal_summary(terminalreporter):
    for title, lines in TABLES.items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
