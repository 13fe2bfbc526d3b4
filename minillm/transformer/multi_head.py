"""Multi-head attention (Vaswani et al. 2017, §3.2.2): over the sequence itself, and from one sequence to another.

Self-attention has grouped heads, rotary positions and q/k norm, for the decoders that came after the paper.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from minillm.transformer.attention import attend
from minillm.transformer.kv import KVStore
from minillm.transformer.norms import RMSNorm
from minillm.transformer.positions import Rotation, rotate


class MultiHeadAttention(nn.Module):
    """Project to heads, rotate, attend through a key/value store, project back.

    q, k and v are one packed matrix product; its rows are all query heads, then all key heads, then all value heads.

    Args:
        layer: this layer's number in the store.
        num_kv_heads: fewer than `num_heads` is grouped-query attention; 1 is multi-query attention.
        qk_norm_eps: when given, RMSNorm over each head's q and k (Qwen3, Gemma 3).
        qk_norm_offset: added to the q/k norms' weights (Gemma's 1 + w).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        layer: int,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm_eps: float | None = None,
        qk_norm_offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = head_dim
        self.split = [num_heads, num_kv_heads, num_kv_heads]
        self.qkv = nn.Linear(hidden_size, sum(self.split) * head_dim, bias=qkv_bias)
        self.out = nn.Linear(num_heads * head_dim, hidden_size, bias=out_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(head_dim, qk_norm_eps, qk_norm_offset)
            self.k_norm = RMSNorm(head_dim, qk_norm_eps, qk_norm_offset)

    def forward(
        self, x: Float[Tensor, "*tokens hidden"], rotation: Rotation | None, kv: KVStore
    ) -> Float[Tensor, "*tokens hidden"]:
        q, k, v = self.project(x)
        if rotation is not None:
            q, k = rotate(q, k, rotation)
        return self.out(kv.attend(self.layer, q, k, v).flatten(-2))

    def project(self, x: Float[Tensor, "*tokens hidden"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[*tokens, heads, head_dim]``, and keys and values ``[*tokens, kv_heads, head_dim]``."""
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(self.split, dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class CrossAttention(nn.Module):
    """Attention from the decoder's tokens to the encoder's output (Vaswani et al. 2017, §3.2.3, first item).

    Keys and values depend on the source alone: `keys_values` is called once a source, `forward` once a step.
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.kv = nn.Linear(hidden_size, 2 * num_heads * head_dim, bias=bias)
        self.out = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)

    def keys_values(
        self, memory: Float[Tensor, "batch keys hidden"]
    ) -> tuple[Float[Tensor, "batch heads keys head_dim"], Float[Tensor, "batch heads keys head_dim"]]:
        """What the decoder looks at: one packed product, all key heads' rows first."""
        kv = self.kv(memory).unflatten(-1, (2, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        k, v = kv.contiguous().unbind()  # laid out once as every step's matrix products read it
        return k, v

    def queries(self, x: Float[Tensor, "batch queries hidden"]) -> Float[Tensor, "batch heads queries head_dim"]:
        """What the decoder's tokens ask for."""
        return self.q(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        x: Float[Tensor, "batch queries hidden"],
        k: Float[Tensor, "batch heads keys head_dim"],
        v: Float[Tensor, "batch heads keys head_dim"],
        mask: Bool[Tensor, "batch 1 1 keys"] | None,
    ) -> Float[Tensor, "batch queries hidden"]:
        return self.out(attend(self.queries(x), k, v, mask, causal=False).transpose(1, 2).flatten(-2))
