"""The decoder's layers as the engine runs them: the same weights and numbers in fewer, larger operations.

`TransformerBlock` says what a layer is. Run as it says, a residual sum is written by one operation and read again by
the norm that follows it, and keys are turned by one operation and stored by another. Each operation costs a launch (on
a GPU) or a call (on a CPU), and for few tokens that is more than its arithmetic. Here each pair is one operation:

- residual sum and norm: a sublayer's output waits until the next sublayer's norm adds it;
- rotary positions and the key/value write, by a store that does both (`FusedStore`).

Blocks are not called here, only their parts: a hook on a block hears nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minillm.transformer.blocks import TransformerBlock
from minillm.transformer.kv import FusedStore, KVStore
from minillm.transformer.multi_head import MultiHeadAttention
from minillm.transformer.norms import RMSNorm
from minillm.transformer.positions import Rotation


def fuses(layers: Iterable[TransformerBlock], final_norm: nn.Module | None) -> bool:
    """Whether `run_layers` knows how these layers go: RMSNorm before each sublayer (and perhaps behind it)."""
    norms = (norm for layer in layers for norm in (layer.attention_norm, layer.feed_forward_norm))
    return isinstance(final_norm, RMSNorm) and all(
        norm.placement != "post" and norm.dropout is None and isinstance(norm.norm, RMSNorm) for norm in norms
    )


def takes_part(kv: KVStore) -> TypeGuard[FusedStore]:
    """Whether this call is for `run_layers`: no gradient is wanted, and the store has its fused operation."""
    return not torch.is_grad_enabled() and isinstance(kv, FusedStore) and kv.fuses


def run_layers(
    layers: Iterable[tuple[TransformerBlock, Rotation | None]],
    final_norm: nn.Module,
    x: Float[Tensor, "tokens hidden"],
    kv: FusedStore,
) -> Float[Tensor, "tokens hidden"]:
    """What the layers, each with its rotation, and then the final norm make of x, which is overwritten."""
    out: Tensor | None = None
    for layer, rotation in layers:
        normed = _add(x, out, layer.attention_norm.norm)
        out = layer.attention_norm.finish(_attend(layer.attention, normed, rotation, kv))
        normed = _add(x, out, layer.feed_forward_norm.norm)
        out = layer.feed_forward_norm.finish(layer.feed_forward(normed))
    return _add(x, out, final_norm)


def _add(x: Tensor, out: Tensor | None, norm: nn.Module) -> Tensor:
    """Add to the residual stream what waited for it; its norm."""
    assert isinstance(norm, RMSNorm), "fuses() is asked first"
    return norm(x) if out is None else norm.add(x, out)


def _attend(
    attention: MultiHeadAttention, x: Float[Tensor, "tokens hidden"], rotation: Rotation | None, kv: FusedStore
) -> Float[Tensor, "tokens hidden"]:
    """As `MultiHeadAttention.forward`; the store turns queries and keys."""
    if rotation is None:
        return attention(x, None, kv)
    q, k, v = attention.project(x)
    return attention.out(kv.rotate_and_attend(attention.layer, q, k, v, rotation).flatten(-2))
