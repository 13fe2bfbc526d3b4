"""Runs a submission's cells so that whatever a student's code does costs that cell only."""

from __future__ import annotations

import json
from typing import Any

import nbformat
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbgrader.preprocessors import Execute
from traitlets import Unicode

MAX_OUTPUT = 100_000
"""Characters that are kept of what a cell prints."""
MAX_LINE = 10_000
"""Characters that are kept of an error's message, and of each line of its traceback."""


class CarefulExecute(Execute):
    """nbgrader's execution of a notebook, which goes on after a kernel's end.

    A cell that runs for more than `timeout` seconds is interrupted; a given cell, in which imports take their time,
    after ten times as many. Where the kernel does not answer to that, or died in the cell, it is started again, the
    earlier cells that ran without an error are run again, and grading goes on with the next cell.
    """

    shutdown_kernel = Unicode("immediate")

    def preprocess(self, nb: Any, resources: Any = None, km: Any = None) -> tuple[Any, Any]:
        """Run all cells; each gets its outputs."""
        self._ran: list[int] = []
        self.timeout_func = lambda cell: self.timeout * (10 if _is_given(cell) else 1)
        return super().preprocess(nb, resources, km)

    def preprocess_cell(self, cell: Any, resources: Any, index: int) -> tuple[Any, Any]:
        """Run one cell; give it an error if it took the kernel with it."""
        self._check_assign_resources(resources)
        end = self._run(index)
        cell = self.nb.cells[index]
        if end:
            cell.outputs.append(nbformat.v4.new_output("error", **_error("DeadKernelError", end)))
            self._start_again()
        elif cell.cell_type == "code" and not any(output.output_type == "error" for output in cell.outputs):
            self._ran.append(index)
        return cell, resources

    def _run(self, index: int) -> str:
        """Run a cell; why the kernel cannot be used any more, or an empty string."""
        cell = self.nb.cells[index]
        seconds = self.timeout_func(cell)
        self.error_on_timeout = _error("CellTimeoutError", f"stopped after {seconds} seconds: a loop without end?")
        self._room = MAX_OUTPUT
        self._exited = False
        try:
            self.execute_cell(cell, index)
        except DeadKernelError:
            return "the kernel died in this cell (a crash in compiled code, os._exit, or no memory left)"
        except CellTimeoutError:
            return f"still running after {seconds} seconds, and it did not stop when it was interrupted"
        return "this cell ended the kernel (exit() or quit())" if self._exited else ""

    def _start_again(self) -> None:
        """A new kernel in which the earlier cells have run; one that ends the kernel now is left out from here on."""
        end = "no kernel yet"
        while end:
            self._cleanup_kernel()
            self.km = self.create_kernel_manager()
            self.start_new_kernel()
            self.start_new_kernel_client()
            end = ""
            for index in list(self._ran):
                cell = self.nb.cells[index]
                kept = cell.outputs, cell.execution_count
                end = self._run(index)
                cell.outputs, cell.execution_count = kept
                if end:
                    self._ran.remove(index)
                    break

    def on_cell_executed(self, **told: Any) -> None:
        """Notice a cell that asked the kernel to exit."""
        payload = told["execute_reply"]["content"].get("payload", [])
        self._exited = any(one.get("source") == "ask_exit" for one in payload)
        super().on_cell_executed(**told)

    def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
        """Take a message's output as far as there is room for it; stderr (a warning, a progress bar) is no failure."""
        content, kind = msg["content"], msg["msg_type"]
        if kind == "stream":
            if not self._room:
                return None
            text, room = content["text"], self._room
            self._room = max(0, room - len(text))
            content.update(name="stdout", text=_cut(text, room))
        elif kind == "error":
            content["evalue"] = _cut(content["evalue"], MAX_LINE)
            content["traceback"] = [_cut(line, MAX_LINE) for line in content["traceback"]]
        elif "data" in content and len(json.dumps(content["data"], default=str)) > self._room:
            return None
        return super().process_message(msg, cell, cell_index)


def _is_given(cell: Any) -> bool:
    graded = cell.metadata.get("nbgrader", {})
    return bool(graded.get("locked") and not graded.get("grade"))


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[:room]}\n… cut here: too long\n"


def _error(name: str, message: str) -> dict[str, Any]:
    return {"ename": name, "evalue": message, "traceback": [f"\x1b[0;31m{name}\x1b[0m: {message}"]}
