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


@intrinsic
def float_to_bits(typing_context, value):
    """Reinterpret a float32 as 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@njit(inline="always")
def widen(bits):
    """uint16 bits of a bfloat16 → float32."""
    return bits_to_float(np.uint32(bits) << np.uint32(16))


@njit(inline="always")
def narrow(value):
    """float32 → uint16 bits of the nearest bfloat16 (not for NaN)."""
    bits = float_to_bits(np.float32(value))
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


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
        return lambda like, value: narrow(value)
    return lambda like, value: value
