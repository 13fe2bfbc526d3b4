"""What the CPU kernels share: which liberties the compiler may take, threads, an exponential that it can vectorise."""

from __future__ import annotations

import numpy as np
import torch
from numba import config, njit, set_num_threads

from minillm.kernels.cpu.bfloat16 import bits_to_float

# Never plain fastmath=True: it assumes that there are no infinities and no NaN.
FASTMATH = {"reassoc", "contract", "arcp", "nsz"}

ONLY_PRANGE = dict.fromkeys(
    ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion"), False
)
"""Numba's option `parallel`: threads where `prange` says so, and nowhere else."""

LOG2_E = 1.4426950408889634


def use_torch_threads() -> int:
    """Give Numba as many threads as PyTorch has, whose number may have been set; returns it."""
    wanted = torch.get_num_threads()
    threads = min(wanted, config.NUMBA_NUM_THREADS)
    set_num_threads(threads)
    if torch.get_num_threads() != wanted:  # Numba starts its threads at the first call and sets the number for both
        torch.set_num_threads(wanted)
    return threads


@njit(inline="always")
def exp2(x):
    """2ˣ for a float32 x ≤ 0, to a relative 3e-7; below −126 it is 2⁻¹²⁶, which is as good as 0.

    The C library's function is a call for each number. This is a polynomial for the fraction (the least largest
    relative error, 7e-8) and an addition to the exponent's bits for the whole part: LLVM does 16 numbers at a time.
    """
    x = max(x, np.float32(-126.0))
    whole = np.floor(x)
    f = x - whole
    p = np.float32(1.8775767e-3)
    p = p * f + np.float32(8.9893397e-3)
    p = p * f + np.float32(5.5826318e-2)
    p = p * f + np.float32(2.4015361e-1)
    p = p * f + np.float32(6.9315308e-1)
    p = p * f + np.float32(9.9999994e-1)
    return p * bits_to_float(np.uint32((np.int32(whole) + np.int32(127)) << np.int32(23)))
