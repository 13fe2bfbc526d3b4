"""Finds functions of the package that a student handed in word for word, under whatever name.

The notebooks show the package's source, and reading it is learning. What was copied is for the instructor to weigh, so
it is noted and costs nothing.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import minillm

MIN_STATEMENTS = 4
"""Shorter functions are alike by chance."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def copies(source: str) -> list[tuple[str, str]]:
    """Functions in a cell's source that are the package's: their names, and those that they have there."""
    try:
        functions = list(_functions(ast.parse(source)))
    except SyntaxError:  # it cannot run either, or is IPython's
        return []
    known = _known()
    return [(function.name, known[essence]) for function, essence in functions if essence in known]


@functools.cache
def _known() -> dict[str, str]:
    """The package's functions by their essence."""
    root = Path(minillm.__file__).parent
    paths = [path for folder in (root, root / "kernels") for path in sorted(folder.rglob("*.py"))]
    return {
        essence: f"{path.relative_to(root).with_suffix('').as_posix().replace('/', '.')}.{function.name}"
        for path in paths
        for function, essence in _functions(ast.parse(path.read_text(encoding="utf-8")))
    }


def _functions(tree: ast.Module) -> Iterator[tuple[Function, str]]:
    """Functions of some length, each with what is left without its name, types and docstring."""
    for function in ast.walk(tree):
        if not isinstance(function, Function):
            continue
        body = function.body[ast.get_docstring(function) is not None :]
        if sum(isinstance(node, ast.stmt) for one in body for node in ast.walk(one)) >= MIN_STATEMENTS:
            yield function, "\n".join([_names(function.args), *map(ast.unparse, body)])


def _names(arguments: ast.arguments) -> str:
    """Parameters' names, without their types."""
    parameters = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
    return ", ".join(one.arg for one in parameters if one is not None)
