"""bfloat16 in Numba, which has no such type: 16 bits read and written as integers, computed with as float32.

A bfloat16 is the upper half of a float32, so widening is a shift; narrowing rounds to the nearest, ties to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

from minillm.kernels.cpu import compiler  # noqa: F401 (before the first njit)

DTYPES = (torch.float32, torch.bfloat16)
"""What `read` and `write`, and so the kernels, take."""


def bits(tensor: Tensor) -> Any:
    """The tensor's memory as an array: float32 as it is, 16-bit numbers as integers."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.view(torch.uint16).numpy() if tensor.dtype.itemsize == 2 else tensor.numpy()


@intrinsic
def bits_to_float(typing_context, bits):
    """Reinterpret 32 bits as a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


def nearest(builder: Any, value: Any) -> Any:
    """LLVM's float32, or a vector of them → 16 bits of the nearest bfloat16 each (not for NaN)."""
    count = value.type.count if isinstance(value.type, ir.VectorType) else None

    def of(bits: int) -> Any:
        return ir.IntType(bits) if count is None else ir.VectorType(ir.IntType(bits), count)

    def constant(number: int) -> Any:
        return ir.Constant(of(32), number if count is None else [number] * count)

    word = builder.bitcast(value, of(32))
    odd = builder.and_(builder.lshr(word, constant(16)), constant(1))
    rounded = builder.add(builder.add(word, constant(0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, constant(16)), of(16))


@intrinsic
def narrow(typing_context, value):
    """float32 → uint16 bits of the nearest bfloat16 (not for NaN); in 32 bits, which Numba's own integers leave."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return nearest(builder, args[0])

    return types.uint16(types.float32), generate


@njit(inline="always")
def widen(bits):
    """uint16 bits of a bfloat16 → float32."""
    return bits_to_float(np.uint32(bits) << np.uint32(16))


def read(number):  # pragma: no cover
    """A stored number as a float32."""
    raise NotImplementedError("only inside compiled code")


def write(like, value):  # pragma: no cover
    """A float32 as it is stored beside `like`."""
    raise NotImplementedError("only inside compiled code")


@overload(read, inline="always")
def _read(number):
    if number == types.uint16:
        return lambda number: widen(number)
    return lambda number: number


@overload(write, inline="always")
def _write(like, value):
    if like == types.uint16:
        return lambda like, value: narrow(np.float32(value))
    return lambda like, value: value
