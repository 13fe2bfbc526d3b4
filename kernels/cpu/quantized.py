"""Products of rounded weights with few rows of activations, on the CPU.

What it computes: x · weightᵀ, where a weight is number · scale (8 bits, one scale for a row), or number · scale + low
(4 bits; a scale and a lowest value for each group of a row). The scale is taken out of the sum, and the lowest value is
multiplied by the sum of the group's x, so that inside the loops there is one multiplication for a weight.

How it maps to the hardware: each weight is read once, widened in registers, and multiplied with all rows of x, which
stay in the first-level cache; the rows of the weight are divided among the threads. What bounds it: reading the
weights, of which 8 bits are a quarter of float32's; for 4 bits, taking them apart. For many rows of x widening pays no
more: `Int8Linear` and `Int4Linear` then make floating-point weights again and leave the product to PyTorch.

In a byte of 4-bit numbers, the lower half is one of the first half of its group, the upper half one of the second, so
that both are consecutive.

Definition of right: `F.linear` of the layer's ``dequantized()`` weights.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int8, UInt8
from numba import njit, prange
from torch import Tensor

from minillm.kernels.cpu.bfloat16 import DTYPES, bits, read
from minillm.kernels.cpu.fast_math import FASTMATH, ONLY_PRANGE, use_torch_threads

WEIGHTS_PER_THREAD = 2**16
"""Fewer are done before another thread has woken up."""


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _some_int8(numbers, scale, x, out, begin, end):
    for row in range(begin, end):
        weights = numbers[row]
        for token in range(x.shape[0]):
            xs, total = x[token], np.float32(0)
            for i in range(len(xs)):
                total += xs[i] * np.float32(weights[i])
            out[token, row] = total * read(scale[row])


@njit(nogil=True, cache=True, parallel=ONLY_PRANGE)
def _int8(parts, numbers, scale, x, out):
    rows = numbers.shape[0]
    for part in prange(parts):
        _some_int8(numbers, scale, x, out, rows * part // parts, rows * (part + 1) // parts)


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _some_int4(pairs, scale, low, x, sums, out, begin, end):
    half = pairs.shape[2]
    for row in range(begin, end):
        for token in range(x.shape[0]):
            total = np.float32(0)
            for group in range(pairs.shape[1]):
                both, xs, product = pairs[row, group], x[token, group], np.float32(0)
                for i in range(half):
                    product += xs[i] * np.float32(both[i] & np.uint8(15))
                for i in range(half):
                    product += xs[half + i] * np.float32(both[i] >> np.uint8(4))
                total += product * read(scale[row, group]) + sums[token, group] * read(low[row, group])
            out[token, row] = total


@njit(nogil=True, cache=True, parallel=ONLY_PRANGE)
def _int4(parts, pairs, scale, low, x, sums, out):
    rows = pairs.shape[0]
    for part in prange(parts):
        _some_int4(pairs, scale, low, x, sums, out, rows * part // parts, rows * (part + 1) // parts)


def supports(x: Float[Tensor, "rows in"]) -> bool:
    """Whether the products take x, and scales of its dtype: float32 or bfloat16."""
    return x.dtype in DTYPES


def _parts(weights: int) -> int:
    return max(1, min(use_torch_threads(), weights // WEIGHTS_PER_THREAD))


def int8_product(
    x: Float[Tensor, "rows in"], numbers: Int8[Tensor, "out in"], scale: Float[Tensor, "out"]
) -> Float[Tensor, "rows out"]:
    """x · (numbers · scale)ᵀ, computed in float32. Has no gradient."""
    out = torch.empty(len(x), len(numbers))
    _int8(_parts(numbers.numel()), numbers.numpy(), bits(scale), x.float().contiguous().numpy(), out.numpy())
    return out.to(x.dtype)


def int4_product(
    x: Float[Tensor, "rows in"],
    pairs: UInt8[Tensor, "out groups half_a_group"],
    scale: Float[Tensor, "out groups"],
    low: Float[Tensor, "out groups"],
) -> Float[Tensor, "rows out"]:
    """x · (numbers · scale + low)ᵀ, computed in float32; `pairs` hold two numbers each. Has no gradient."""
    out = torch.empty(len(x), len(pairs))
    grouped = x.float().reshape(len(x), pairs.shape[1], 2 * pairs.shape[2]).contiguous()
    sums = grouped.sum(dim=2)
    arrays = (pairs.numpy(), bits(scale), bits(low), grouped.numpy(), sums.numpy(), out.numpy())
    _int4(_parts(2 * pairs.numel()), *arrays)
    return out.to(x.dtype)
