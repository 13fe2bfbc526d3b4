"""JupyterLab as a learner meets it: a process of its own, and notebooks in it that a browser runs."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import symtable
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from tests.helpers import answers

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {path.stem: path for path in sorted(ROOT.glob("notebooks/src/*.py"))}
read_source = runpy.run_path(str(ROOT / "notebooks" / "build.py"))["read_source"]

NO_NEWS = {"fetchNews": "false", "checkForUpdates": False}
SECONDS = 120


@dataclass
class Lab:
    """A running JupyterLab.

    Attributes:
        folder: what it shows.
    """

    url: str
    folder: Path

    def put(self, stem: str) -> str:
        """A notebook made from its source, without outputs: what is seen was computed here; its name in the folder."""
        nbformat.write(read_source(SOURCES[stem]), self.folder / f"{stem}.ipynb")
        return f"{stem}.ipynb"

    def put_explorers(self, explorers: Mapping[str, str]) -> str:
        """One notebook of nothing but explorers, each with what it needs out of the notebook that has it.

        Args:
            explorers: function → notebook.
        """
        notebook = read_source(next(iter(SOURCES.values())))
        notebook.cells = []
        for name, stem in explorers.items():
            notebook.cells += cells_for(read_source(SOURCES[stem]).cells, f"{name}(")
        nbformat.write(notebook, self.folder / "explorers.ipynb")
        return "explorers.ipynb"


@contextlib.contextmanager
def jupyter_lab(folder: Path) -> Iterator[Lab]:
    """Started in a folder, with settings, workspaces and runtime files of its own: nothing of the user is touched."""
    notebooks = folder / "notebooks"
    notebooks.mkdir()
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(NO_NEWS))
    own = {f"JUPYTER_{place.upper()}_DIR": str(folder / place) for place in ("config", "data", "runtime")}
    own |= {f"JUPYTERLAB_{place.upper()}_DIR": str(folder / place) for place in ("settings", "workspaces")}
    own |= {"IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": str(ROOT)}
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += ["--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token="]
    command += [f"--ServerApp.root_dir={notebooks}"]
    environment = {**os.environ, **own, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    with started(command, environment, folder / "lab.log", f"{url}/api/status"):
        yield Lab(url, notebooks)


@contextlib.contextmanager
def started(command: list[str], environment: dict[str, str], log: Path, url: str) -> Iterator[None]:
    """A server's process, once it answers at `url`; at the end it and its children are stopped."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, cwd=log.parent, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + SECONDS
        while not answers(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"it does not answer:\n{log.read_text()}"
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def cells_for(cells: list[Any], call: str) -> list[Any]:
    """The last cell with this text, the text before it, and the statements that make the names that it needs."""
    last = max(number for number, cell in enumerate(cells) if cell.cell_type == "code" and call in cell.source)
    kept, wanted = [cells[last - 1], cells[last]], names(cells[last].source)[0]
    for cell in reversed([cell for cell in cells[:last] if cell.cell_type == "code"]):
        lines = []
        for statement in reversed(ast.parse(cell.source).body):
            code = ast.unparse(statement)
            needs, makes = names(code)
            if wanted & makes:
                lines.insert(0, code)
                wanted = wanted - makes | needs
        if lines:
            kept.insert(0, nbformat.from_dict({**cell, "source": "\n".join(lines)}))
    return kept


def names(code: str) -> tuple[set[str], set[str]]:
    """The global names that some statements need, and those that they make."""
    top = symtable.symtable(code, "cell", "exec")
    needs = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}
    tables = list(top.get_children())
    for table in tables:
        needs |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        tables.extend(table.get_children())
    makes = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    return needs, makes
