"""RMSNorm on the GPU: x / √(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019, §4).

How it maps to the hardware: one program a row, which is read once, kept in registers, and written once. What bounds it:
memory, for many rows; the launch, for few.

Definition of right: `torch.nn.functional.rms_norm`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

LARGEST = 16_384
"""Numbers of a row that one program keeps in registers."""


@triton.jit
def _rms_norm(x, weight, out, eps, x_row, SIZE: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, PADDED)
    kept = number < SIZE
    values = tl.load(x + row * x_row + number, mask=kept, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / SIZE + eps)
    scaled = values * scale * tl.load(weight + number, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + number, scaled.to(out.dtype.element_ty), mask=kept)


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` takes these tensors: rows that are contiguous and not too long."""
    return x.dtype is weight.dtype and x.stride(-1) == 1 and x.shape[-1] <= LARGEST and _rows(x) is not None


def _rows(x: Tensor) -> Tensor | None:
    """x as a matrix without a copy, or None."""
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        return None


def rms_norm(
    x: Float[Tensor, "*batch size"], weight: Float[Tensor, "size"], eps: float
) -> Float[Tensor, "*batch size"]:
    """The normalised x, computed in float32. Has no gradient."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = _rows(x)
    assert rows is not None, "supports() is asked first"
    size = x.shape[-1]
    padded = triton.next_power_of_2(size)
    _rms_norm[(len(rows),)](
        rows, weight, out, eps, rows.stride(0), SIZE=size, PADDED=padded, num_warps=8 if padded > 2048 else 4
    )
    return out
