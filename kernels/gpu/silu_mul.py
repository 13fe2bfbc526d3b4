"""The gated feed-forward network's middle on the GPU: silu(gate) · up (Shazeer 2020, "GLU Variants", eq. 6).

How it maps to the hardware: one program for some thousand numbers of a row; gate and up are read where the packed
projection left them, side by side. In PyTorch it takes two kernels, and what the first one writes the second one reads
again. What bounds it: memory.

Definition of right: ``torch.nn.functional.silu(gate) * up``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

NUMBERS = 1024


@triton.jit
def _silu_mul(gate_up, out, row_stride, SIZE: tl.constexpr, NUMBERS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * NUMBERS + tl.arange(0, NUMBERS)
    kept = number < SIZE
    gate = tl.load(gate_up + row * row_stride + number, mask=kept, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + SIZE + number, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + number, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=kept)


def supports(gate_up: Tensor) -> bool:
    """Whether `silu_mul` takes this: any of Triton's numbers."""
    return gate_up.is_floating_point()


def silu_mul(gate_up: Float[Tensor, "*batch two_sizes"]) -> Float[Tensor, "*batch size"]:
    """silu of the first half of the last dimension, times the second half; computed in float32. Has no gradient."""
    size = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype, device=gate_up.device)
    rows = gate_up.reshape(-1, 2 * size)
    grid = (len(rows), triton.cdiv(size, NUMBERS))
    _silu_mul[grid](rows, out, rows.stride(0), SIZE=size, NUMBERS=NUMBERS)
    return out
