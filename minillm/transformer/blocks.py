"""Transformer blocks: sublayers, each with a residual connection and norms before, after, or both.

Sources: blocks and post-norm: Vaswani et al. 2017, §3.1; pre-norm: Xiong et al. 2020, "On Layer Normalization in the
Transformer Architecture"; sandwich norm: Ding et al. 2021, "CogView", §2.4 (Gemma 3 and GLM-4-0414 use it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from minillm.transformer.kv import KVStore
from minillm.transformer.multi_head import CrossAttention, MultiHeadAttention
from minillm.transformer.parallel import Ranks
from minillm.transformer.positions import Rotation

NormPlacement = Literal["pre", "post", "sandwich"]


class ResidualNorm(nn.Module):
    """A sublayer's residual connection.

    - pre: x + f(norm(x))
    - post: norm(x + f(x))
    - sandwich: x + out_norm(f(norm(x)))

    Dropout falls on f's output, before it is added (Vaswani et al. 2017, §5.4). Where each of several ranks computes a
    part of f, the output is their sum.
    """

    def __init__(
        self,
        placement: NormPlacement,
        make_norm: Callable[[], nn.Module],
        dropout: float = 0.0,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.placement = placement
        self.ranks = ranks
        self.norm = make_norm()
        self.out_norm = make_norm() if placement == "sandwich" else None
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(
        self, x: Float[Tensor, "*tokens hidden"], sublayer: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "*tokens hidden"]:
        out = self.finish(sublayer(x if self.placement == "post" else self.norm(x)))
        return self.norm(x + out) if self.placement == "post" else x + out

    def finish(self, out: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens hidden"]:
        """What is added to the residual stream, of a sublayer's output (or a rank's part of it)."""
        if self.ranks is not None:
            out = self.ranks.all_reduce(out)
        if self.dropout is not None:
            out = self.dropout(out)
        return out if self.out_norm is None else self.out_norm(out)


class TransformerBlock(nn.Module):
    """Self-attention, then a feed-forward network, each inside its residual connection.

    It is the encoder's block and the decoder-only model's: whether attention is causal is for the store to know.
    """

    def __init__(
        self,
        attention: MultiHeadAttention,
        feed_forward: nn.Module,
        placement: NormPlacement,
        make_norm: Callable[[], nn.Module],
        dropout: float = 0.0,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm = ResidualNorm(placement, make_norm, dropout, ranks)
        self.feed_forward_norm = ResidualNorm(placement, make_norm, dropout, ranks)

    def forward(
        self, x: Float[Tensor, "*tokens hidden"], rotation: Rotation | None, kv: KVStore
    ) -> Float[Tensor, "*tokens hidden"]:
        x = self.attention_norm(x, lambda normed: self.attention(normed, rotation, kv))
        return self.feed_forward_norm(x, self.feed_forward)


class CrossAttentionBlock(nn.Module):
    """The decoder's block where there is an encoder: self-attention, attention to the source, feed-forward network."""

    def __init__(
        self,
        attention: MultiHeadAttention,
        cross_attention: CrossAttention,
        feed_forward: nn.Module,
        placement: NormPlacement,
        make_norm: Callable[[], nn.Module],
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.cross_attention = cross_attention
        self.feed_forward = feed_forward
        self.attention_norm = ResidualNorm(placement, make_norm, dropout)
        self.cross_attention_norm = ResidualNorm(placement, make_norm, dropout)
        self.feed_forward_norm = ResidualNorm(placement, make_norm, dropout)

    def forward(
        self,
        x: Float[Tensor, "batch target hidden"],
        k: Float[Tensor, "batch heads source head_dim"],
        v: Float[Tensor, "batch heads source head_dim"],
        mask: Bool[Tensor, "batch 1 1 source"] | None,
        kv: KVStore,
    ) -> Float[Tensor, "batch target hidden"]:
        """`k`, `v` and `mask` are the source's, for this layer; `kv` holds the target's."""
        x = self.attention_norm(x, lambda normed: self.attention(normed, None, kv))
        x = self.cross_attention_norm(x, lambda normed: self.cross_attention(normed, k, v, mask))
        return self.feed_forward_norm(x, self.feed_forward)
