"""Scaled dot-product attention as pure functions: by hand, fused, and the choice between the two.

Source: Vaswani et al. 2017, "Attention Is All You Need", §3.2; grouped queries: Ainslie et al. 2023, "GQA".
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def attention_mask(
    query_positions: Int[Tensor, "*batch queries"],
    key_positions: Int[Tensor, "*batch keys"],
    *,
    causal: bool = True,
    window: int | None = None,
) -> Bool[Tensor, "*batch queries keys"]:
    """Which keys each query may see: none later than itself, none further back than the window."""
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    mask = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return mask if window is None else mask & (distance.abs() < window)


def dot_product_attention(
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch kv_heads keys head_dim"],
    v: Float[Tensor, "batch kv_heads keys head_dim"],
    mask: Bool[Tensor, "#batch #heads #queries keys"] | None = None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """softmax(q·kᵀ·scale)·v, written out (Vaswani et al. 2017, eq. 1).

    Grouped heads need no copies of k and v: the queries of a group are stacked as more rows of one product.

    Args:
        mask: True where a query may see a key; None lets every query see every key.
        scale: 1/√head_dim when None.
        soft_cap: bound on the scores, as in Gemma 2.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads = k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale

    grouped = q.reshape(batch, kv_heads, heads // kv_heads * queries, head_dim)
    scores = ((grouped * scale) @ k.transpose(-1, -2)).view(batch, heads, queries, -1)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    out = weights.view(batch, kv_heads, heads // kv_heads * queries, -1) @ v
    return out.view(batch, heads, queries, head_dim)


def sdpa_attention(
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch kv_heads keys head_dim"],
    v: Float[Tensor, "batch kv_heads keys head_dim"],
    mask: Bool[Tensor, "#batch #heads #queries keys"] | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """The same through PyTorch's fused kernel, which never stores the scores (Dao et al. 2022, "FlashAttention").

    Args:
        causal: query i sees keys 0…i; an alternative to a mask, for as many queries as keys.
    """
    grouped = q.shape[1] != k.shape[1]
    fused = partial(F.scaled_dot_product_attention, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    if q.device.type == "cpu" and q.dtype is torch.bfloat16 and q.requires_grad:
        # On a CPU the kernel's backward pass takes nearly twice as long in bfloat16 as in float32.
        with torch.autocast("cpu", enabled=False):
            return fused(q.float(), k.float(), v.float()).to(q.dtype)
    return fused(q, k, v)


def attend(
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch kv_heads keys head_dim"],
    v: Float[Tensor, "batch kv_heads keys head_dim"],
    mask: Bool[Tensor, "#batch #heads #queries keys"] | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    soft_cap: float | None = None,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Attention by whichever of the two ways fits.

    Without a mask, the queries are the last positions of the keys: one query sees all keys, as many queries as keys
    see a triangle. One query a sequence is bound by reading k and v, where two plain products over the grouped rows
    beat the fused kernel by far in bf16 on a CPU; a soft cap is something the fused kernel does not have.
    """
    queries, keys = q.shape[2], k.shape[2]
    if queries == 1 or soft_cap is not None:
        if mask is None and causal and queries > 1:
            steps = torch.arange(keys, device=q.device)
            mask = attention_mask(steps[keys - queries :], steps)[None, None]
        return dot_product_attention(q, k, v, mask, scale=scale, soft_cap=soft_cap)
    return sdpa_attention(q, k, v, mask, scale=scale, causal=causal and mask is None)
