"""Checks that say what is wrong and where: kind, shape, first wrong position, what was expected and what came.

They stand in the assignments' visible and hidden tests, so that a student never reads only "assert failed".
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from minillm.errors import InvalidRequestError, MinillmError


class CheckError(MinillmError, AssertionError):
    """A student's piece does something else than it should; the message says what and where."""


def check_close(
    got: Any, expected: Tensor, what: str = "the result", *, rtol: float = 1e-4, atol: float = 1e-5, hint: str = ""
) -> None:
    """Raise CheckError unless `got` is a tensor of the expected shape and dtype, and its numbers are close.

    Close is `|got − expected| ≤ atol + rtol·|expected|`; infinities must be equal, and NaN is never close.
    """
    __tracebackhide__ = True  # IPython shows the cell that called this, and the message
    if not isinstance(got, Tensor):
        _fail(f"{what} should be a tensor of shape {tuple(expected.shape)}, not {_told(got)}", hint)
    if got.shape != expected.shape:
        _fail(f"{what} has shape {tuple(got.shape)}, and should have {tuple(expected.shape)}", hint)
    if got.dtype != expected.dtype:
        _fail(f"{what} is {_name(got.dtype)}, and should be {_name(expected.dtype)}", hint)
    wrong = ~torch.isclose(got.detach(), expected, rtol=rtol, atol=atol)
    if not wrong.any():
        return
    first = tuple(wrong.nonzero()[0].tolist())
    where = f"[{', '.join(map(str, first))}]" if first else ""
    _fail(
        f"{what}{where} is {_number(got[first])}, and should be {_number(expected[first])} "
        f"({int(wrong.sum())} of {wrong.numel()} numbers are wrong)",
        hint,
    )


def check_equal(got: Any, expected: Any, what: str = "the result", *, hint: str = "") -> None:
    """Raise CheckError unless the two are equal; of lists and tuples the first position that differs is named."""
    __tracebackhide__ = True
    if isinstance(expected, (list, tuple)) and isinstance(got, (list, tuple)):
        _check_sequence(got, expected, what, hint)
    elif type(got) is not type(expected) or got != expected:
        _fail(f"{what} is {_told(got)}, and should be {_told(expected)}", hint)


def check(right: bool, message: str) -> None:
    """Raise CheckError with this message unless `right`."""
    __tracebackhide__ = True
    if not right:
        _fail(message, "")


@contextmanager
def without(*names: str) -> Iterator[None]:
    """While it lasts, calling one of these functions raises CheckError, whoever imported it, under whatever name.

    A name is `module:function` or `module:Class` (then all the class's own methods). Functions that are not written in
    Python, such as torch's, are replaced in their module only.

    Raises:
        InvalidRequestError: there is nothing of that name.
    """
    undo: list[Callable[[], None]] = []
    try:
        for name in names:
            undo.extend(_closed(name))
        yield
    finally:
        for again in reversed(undo):
            again()


def _closed(name: str) -> list[Callable[[], None]]:
    """Close what the name says; what opens it again."""
    module_name, _, path = name.partition(":")
    try:
        holder = importlib.import_module(module_name)
        *outer, last = path.split(".")
        for part in outer:
            holder = getattr(holder, part)
        thing = getattr(holder, last)
    except (ImportError, AttributeError) as error:
        raise InvalidRequestError(f"there is no {name!r} to close") from error
    if isinstance(thing, type):
        functions = [one for one in map(_function, vars(thing).values()) if one]
    else:
        functions = [thing] if isinstance(thing, FunctionType) else []
    if functions:
        return [_close_function(function, name) for function in functions]

    def refuse(*_: Any, **__: Any) -> Any:
        _fail(f"this task is about writing {path} yourself: do not call {name}", "")

    setattr(holder, last, refuse)
    return [lambda: setattr(holder, last, thing)]


def _function(member: Any) -> FunctionType | None:
    """The Python function in a class's member, if there is one."""
    member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    return member if isinstance(member, FunctionType) else None


def _close_function(function: FunctionType, name: str) -> Callable[[], None]:
    """Swap the function's code, which all its aliases share, for one that refuses."""
    code = function.__code__
    function.__code__ = _refusing_code(f"this task is about writing it yourself: do not use {name}", code)

    def again() -> None:
        function.__code__ = code

    return again


def _refusing_code(message: str, like: CodeType) -> CodeType:
    """Code that raises CheckError(message), with as many free variables as `like` (Python demands that)."""
    cells = "".join(f"    {variable} = None\n" for variable in like.co_freevars)
    uses = "".join(f"        {variable}\n" for variable in like.co_freevars)
    source = (
        f"def outer():\n{cells}    def refuse(*_args, **_kwargs):\n{uses}"
        f"        from minillm.course.checks import CheckError\n        raise CheckError({message!r})\n"
        f"    return refuse\n"
    )
    space: dict[str, Any] = {}
    exec(source, space)
    code = space["outer"]().__code__
    assert isinstance(code, CodeType)
    return code


def _check_sequence(got: Sequence[Any], expected: Sequence[Any], what: str, hint: str) -> None:
    __tracebackhide__ = True
    for place, (mine, right) in enumerate(zip(got, expected, strict=False)):
        if mine != right:
            _fail(f"{what}[{place}] is {_told(mine)}, and should be {_told(right)}", hint)
    if len(got) != len(expected):
        _fail(f"{what} has {len(got)} items, and should have {len(expected)}: {_told(expected)}", hint)


def _fail(message: str, hint: str) -> None:
    raise CheckError(f"{message}. {hint}" if hint else message)


def _told(value: Any) -> str:
    if value is None:
        return "None (is a return missing?)"
    text = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _number(value: Tensor) -> str:
    return f"{value.item():.6g}" if value.is_floating_point() else str(value.item())
