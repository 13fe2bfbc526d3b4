"""bfloat16 in Numba, which has no such type: 16 bits read and written as integers, computed with as float32.

A bfloat16 is the upper half of a float32, so widening is a shift; narrowing rounds to the nearest, ties to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


@intrinsic
def _bits_to_float(typing_context, bits):  # type: ignore[no-untyped-def]
    """Reinterpret 32 bits as a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _float_to_bits(typing_context, value):  # type: ignore[no-untyped-def]
    """Reinterpret a float32 as 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@njit(inline="always")
def widen(bits):  # type: ignore[no-untyped-def]
    """uint16 bits of a bfloat16 → float32."""
    return _bits_to_float(np.uint32(bits) << np.uint32(16))


@njit(inline="always")
def narrow(value):  # type: ignore[no-untyped-def]
    """float32 → uint16 bits of the nearest bfloat16 (not for NaN)."""
    bits = _float_to_bits(np.float32(value))
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
