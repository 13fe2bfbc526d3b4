"""A Transformer block: two sublayers, each with a residual connection and norms before, after, or both.

Sources: post-norm: Vaswani et al. 2017, §3.1; pre-norm: Xiong et al. 2020, "On Layer Normalization in the Transformer
Architecture"; sandwich norm: Ding et al. 2021, "CogView", §2.4 (Gemma 3 and GLM-4-0414 use it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from minillm.transformer.kv import KVStore
from minillm.transformer.multi_head import MultiHeadAttention
from minillm.transformer.positions import Rotation

NormPlacement = Literal["pre", "post", "sandwich"]


class ResidualNorm(nn.Module):
    """A sublayer's residual connection.

    - pre: x + f(norm(x))
    - post: norm(x + f(x))
    - sandwich: x + out_norm(f(norm(x)))
    """

    def __init__(self, placement: NormPlacement, make_norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.placement = placement
        self.norm = make_norm()
        self.out_norm = make_norm() if placement == "sandwich" else None

    def forward(
        self, x: Float[Tensor, "*tokens hidden"], sublayer: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "*tokens hidden"]:
        if self.placement == "post":
            return self.norm(x + sublayer(x))
        out = sublayer(self.norm(x))
        return x + (out if self.out_norm is None else self.out_norm(out))


class DecoderBlock(nn.Module):
    """Self-attention, then a feed-forward network, each inside its residual connection."""

    def __init__(
        self,
        attention: MultiHeadAttention,
        feed_forward: nn.Module,
        placement: NormPlacement,
        make_norm: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm = ResidualNorm(placement, make_norm)
        self.feed_forward_norm = ResidualNorm(placement, make_norm)

    def forward(
        self, x: Float[Tensor, "*tokens hidden"], rotation: Rotation | None, kv: KVStore
    ) -> Float[Tensor, "*tokens hidden"]:
        x = self.attention_norm(x, lambda normed: self.attention(normed, rotation, kv))
        return self.feed_forward_norm(x, self.feed_forward)
