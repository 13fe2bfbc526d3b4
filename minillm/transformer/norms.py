"""Layer normalisation (Ba et al. 2016) and root-mean-square normalisation (Zhang & Sennrich 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minillm.transformer.twins import twin


class LayerNorm(nn.LayerNorm):
    """(x − mean) / √(variance + eps) · weight + bias, over the last dimension."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__(size, eps=eps)


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight, over the last dimension: a LayerNorm without mean and bias.

    Args:
        weight_offset: added to the stored weight; Gemma stores w and multiplies by 1 + w.
    """

    def __init__(self, size: int, eps: float = 1e-6, weight_offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - weight_offset))
        self.eps = eps
        self.weight_offset = weight_offset

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        kernel = twin("rms_norm", x)
        if kernel is not None and kernel.supports(x, self.weight):
            out: Tensor = kernel.rms_norm(x, self.weight, self.eps, self.weight_offset)
            return out
        if self.weight_offset:
            # In float32: 1 + w would lose w's last bits in bf16.
            weight = self.weight.float() + self.weight_offset
            return F.rms_norm(x.float(), self.weight.shape, weight, self.eps).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def add(self, x: Float[Tensor, "tokens size"], added: Float[Tensor, "tokens size"]) -> Float[Tensor, "tokens size"]:
        """Add to x, in place, and return its norm; by one kernel where there is one."""
        kernel = twin("rms_norm", x)
        if kernel is not None and kernel.supports(x, self.weight):
            out: Tensor = kernel.add_rms_norm(x, added, self.weight, self.eps, self.weight_offset)
            return out
        x += added
        return self(x)
