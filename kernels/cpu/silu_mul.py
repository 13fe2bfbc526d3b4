"""The gated feed-forward network's middle on the CPU: silu(gate) · up (Shazeer 2020, "GLU Variants", eq. 6).

How it maps to the hardware: gate and up are read where the packed projection left them, side by side, and the
exponential is a polynomial in vector registers. PyTorch takes two operations, the second of which reads again what the
first has written. What bounds it: arithmetic, some twenty operations a number, so that many rows are divided among
the threads.

Definition of right: ``torch.nn.functional.silu(gate) * up``.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numba import njit, prange
from torch import Tensor

from minillm.kernels.cpu.bfloat16 import DTYPES, bits, read, write
from minillm.kernels.cpu.fast_math import FASTMATH, LOG2_E, ONLY_PRANGE, exp2, use_torch_threads

MANY_ROWS = 32
"""So many are worth waking another thread."""


@njit(fastmath=FASTMATH, error_model="numpy", nogil=True, cache=True)  # a check for 0 in each division forbids vectors
def _row(gate, up, out):
    for i in range(len(out)):
        g = read(gate[i])
        shrunk = exp2(np.float32(-LOG2_E) * abs(g))  # e^−|g|, which cannot overflow
        top = g if g > 0 else g * shrunk
        out[i] = write(out[i], top / (np.float32(1) + shrunk) * read(up[i]))


@njit(nogil=True, cache=True)
def _few(gate_up, out):
    size = out.shape[1]
    for row in range(out.shape[0]):
        _row(gate_up[row, :size], gate_up[row, size:], out[row])


@njit(nogil=True, cache=True, parallel=ONLY_PRANGE)
def _many(gate_up, out):
    size = out.shape[1]
    for row in prange(out.shape[0]):
        _row(gate_up[row, :size], gate_up[row, size:], out[row])


def supports(gate_up: Tensor) -> bool:
    """Whether `silu_mul` takes this: contiguous float32 or bfloat16."""
    return gate_up.dtype in DTYPES and gate_up.is_contiguous()


def silu_mul(gate_up: Float[Tensor, "*batch two_sizes"]) -> Float[Tensor, "*batch size"]:
    """silu of the first half of the last dimension, times the second half; computed in float32. Has no gradient."""
    size = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype)
    rows, outs = bits(gate_up).reshape(-1, 2 * size), bits(out).reshape(-1, size)
    if len(rows) < MANY_ROWS:
        _few(rows, outs)
    else:
        use_torch_threads()
        _many(rows, outs)
    return out
