"""Checks that say what is wrong and where: kind, shape, first wrong position, what was expected and what came.

They stand in the assignments' visible and hidden tests, so that a student never reads only "assert failed".
"""

from __future__ import annotations

import gc
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import CodeType, FunctionType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

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
def unchanged(**tensors: Tensor) -> Iterator[None]:
    """Raise CheckError at the end if one of these tensors is not bit for bit what it was (NaN is equal to NaN)."""
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    yield
    for name, was in before.items():
        now = tensors[name]
        same = torch.equal(was.isnan(), now.isnan()) and torch.equal(was.nan_to_num(), now.nan_to_num())
        check(same, f"{name} was changed: leave what you are given as it is, and make something new")


@contextmanager
def without(*names: str) -> Iterator[None]:
    """While it lasts, calling one of these functions raises CheckError, under whatever name and however it was got.

    A name is `module:function`, or `module:Class` (then all the class's own methods). Of a Python function all copies
    are closed that have the same place in the same file: aliases, what was made of its code, modules loaded twice,
    methods that a subclass inherits. PyTorch's own functions are refused wherever they are called from. Whatever else
    is not written in Python is replaced in its module or class only. Whoever catches the error gets it again at the
    end, and loading a module anew is noticed there. What is copied as text is not seen.

    It takes some 100 ms to begin: put it around a loop, not into it.

    Raises:
        InvalidRequestError: there is nothing of that name.
    """
    found = {name: _find(name) for name in names}
    closed = [(function, name) for name, (_, thing) in found.items() for function in _functions(thing)]
    places = {_place(function): name for function, name in closed}
    native = {name: thing for name, (_, thing) in found.items() if not _functions(thing)}
    _refused.clear()
    with ExitStack() as undo:
        for function in _alike([function for function, _ in closed]):
            undo.callback(setattr, function, "__code__", function.__code__)
            function.__code__ = _refusing_code(places[_place(function)], function.__code__)
        for name in native:
            undo.callback(_replace(found[name][0], name))
        undo.enter_context(_WithoutTorch(native))
        there = {name: _find(name)[1] for name in names}
        yield
        for name, thing in there.items():
            if _find(name)[1] != thing:  # of a class method, each look makes a new one
                _refuse(name)
    if _refused:
        _refuse(_refused[0])


_refused: list[str] = []
"""What was called all the same since the last `without` began."""


def _refuse(name: str) -> NoReturn:
    _refused.append(name)
    raise CheckError(f"this task is about writing it yourself: do not use {name}")


class _WithoutTorch(TorchFunctionMode):
    """Refuses PyTorch's functions of these names, also where they were imported before."""

    def __init__(self, things: dict[str, Any]) -> None:
        super().__init__()
        self.things = things

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for name, thing in self.things.items():
            if func == thing:
                _refuse(name)
        return func(*args, **(kwargs or {}))


def _find(name: str) -> tuple[Any, Any]:
    """What holds the thing of this name, and the thing."""
    module_name, _, path = name.partition(":")
    try:
        holder = importlib.import_module(module_name)
        *outer, last = path.split(".")
        for part in outer:
            holder = getattr(holder, part)
        return holder, getattr(holder, last)
    except (ImportError, AttributeError) as error:
        raise InvalidRequestError(f"there is no {name!r} to close") from error


def _functions(thing: Any) -> list[FunctionType]:
    """The Python functions in it: itself, or a class's own methods."""
    members = vars(thing).values() if isinstance(thing, type) else [thing]
    return [function for function in map(_function, members) if function]


def _function(member: Any) -> FunctionType | None:
    """The Python function in a module's or class's member, if there is one; without its decorators."""
    member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    member = inspect.unwrap(member) if callable(member) else member
    return member if isinstance(member, FunctionType) else None


def _place(function: FunctionType) -> Any:
    """What a function's copies have in common; generated code, as that of dataclasses, stands in no file."""
    code = function.__code__
    return id(code) if code.co_filename.startswith("<") else (code.co_filename, code.co_qualname)


def _alike(functions: list[FunctionType]) -> list[FunctionType]:
    """All functions that there are from the same places as these."""
    names = {function.__code__.co_qualname for function in functions}  # looked at first: there are 100,000 functions
    found = [one for one in gc.get_objects() if type(one) is FunctionType and one.__code__.co_qualname in names]
    places = {_place(function) for function in functions}
    return [one for one in found if _place(one) in places]


def _replace(holder: Any, name: str) -> Callable[[], None]:
    """Put what refuses into the place of what is not written in Python; what puts it back."""
    attribute = name.rpartition(":")[2].rpartition(".")[2]
    own = vars(holder).get(attribute)
    setattr(holder, attribute, lambda *_, **__: _refuse(name))
    # What a class has inherited must not become its own.
    return lambda: delattr(holder, attribute) if own is None else setattr(holder, attribute, own)


def _refusing_code(name: str, like: CodeType) -> CodeType:
    """Code that refuses, with as many free variables as `like` (Python demands that)."""
    cells = "".join(f"    {variable} = None\n" for variable in like.co_freevars)
    uses = "".join(f"        {variable}\n" for variable in like.co_freevars)
    source = (
        f"def outer():\n{cells}    def refuse(*_args, **_kwargs):\n{uses}"
        f"        from minillm.course.checks import _refuse\n        _refuse({name!r})\n"
        f"    return refuse\n"
    )
    space: dict[str, Any] = {}
    exec(source, space)
    code = space["outer"]().__code__
    assert isinstance(code, CodeType), "a function's"
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
