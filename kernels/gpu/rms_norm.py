"""RMSNorm on the GPU: x / √(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019, §4).

In a Transformer a sublayer's output is added to the residual stream and the sum is normalised for the next sublayer.
`add_rms_norm` does both, so that the sum is not written by one kernel and read again by the next.

How it maps to the hardware: one program a row, which is read once, kept in registers, and written once. What bounds it:
memory, for many rows; the launch, for few.

Definition of right: `torch.nn.functional.rms_norm`, of x + added in x's dtype.
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
def _rms_norm(
    x,
    added,
    weight,
    out,
    eps,
    weight_offset,
    x_group,
    x_row,
    group,
    ADD: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row // group * x_group + row % group * x_row
    number = tl.arange(0, PADDED)
    kept = number < SIZE
    values = tl.load(x + number, mask=kept, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(added + row * SIZE + number, mask=kept, other=0.0).to(tl.float32)
        rounded = values.to(out.dtype.element_ty)
        tl.store(x + number, rounded, mask=kept)
        values = rounded.to(tl.float32)  # what a later reader of the sum sees
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / SIZE + eps)
    scaled = values * scale * (tl.load(weight + number, mask=kept, other=0.0).to(tl.float32) + weight_offset)
    tl.store(out + row * SIZE + number, scaled.to(out.dtype.element_ty), mask=kept)


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` takes these tensors: rows that are contiguous, not too long, and evenly apart."""
    return x.dtype is weight.dtype and x.stride(-1) == 1 and x.shape[-1] <= LARGEST and _layout(x) is not None


def _layout(x: Tensor) -> tuple[int, int, int] | None:
    """Numbers from group to group of rows, from row to row, and rows of a group; None where x has no such order.

    A matrix is groups of one row; queries ``[tokens, heads, head_dim]`` of a packed projection are groups of heads.
    """
    if x.ndim == 3 and not x.is_contiguous():
        return x.stride(0), x.stride(1), x.shape[1]
    try:
        return x.view(-1, x.shape[-1]).stride(0), 0, 1
    except RuntimeError:
        return None


def rms_norm(
    x: Float[Tensor, "*batch size"], weight: Float[Tensor, "size"], eps: float, weight_offset: float = 0.0
) -> Float[Tensor, "*batch size"]:
    """x normalised and times (weight + weight_offset), computed in float32. Has no gradient."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, out, weight, out, eps, weight_offset, add=False)
    return out


def add_rms_norm(
    x: Float[Tensor, "tokens size"],
    added: Float[Tensor, "tokens size"],
    weight: Float[Tensor, "size"],
    eps: float,
    weight_offset: float = 0.0,
) -> Float[Tensor, "tokens size"]:
    """Add to x, in place, and return its `rms_norm`, in one kernel."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, added.contiguous(), weight, out, eps, weight_offset, add=True)
    return out


def _launch(
    x: Tensor, added: Tensor, weight: Tensor, out: Tensor, eps: float, weight_offset: float, *, add: bool
) -> None:
    layout = _layout(x)
    assert layout is not None, "supports() is asked first"
    size = x.shape[-1]
    padded = triton.next_power_of_2(size)
    _rms_norm[(x.numel() // size,)](
        x, added, weight, out, eps, weight_offset, *layout, ADD=add, SIZE=size, PADDED=padded,
        num_warps=8 if padded > 2048 else 4 if padded > 512 else 1,
    )  # fmt: skip
