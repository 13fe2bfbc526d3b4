"""The decoder's layers as the engine runs them: the same weights and numbers in fewer, larger operations.

`TransformerBlock` says what a layer is. Run as it says, a residual sum is written by one operation and read again by
the norm that follows it, and keys are turned by one operation and stored by another. Each operation costs a launch (on
a GPU) or a call (on a CPU), and for few tokens that is more than its arithmetic. Here each pair is one operation:

- residual sum and norm: a sublayer's output waits until the next sublayer's norm adds it;
- rotary positions and the key/value write, by a store that does both (`FusedStore`).

For a few tokens on a CPU all layers are one operation, where there is a kernel for such layers (`gather`).

Blocks are not called here, only their parts: a hook on a block hears nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minillm.transformer.blocks import TransformerBlock
from minillm.transformer.feed_forward import GatedFeedForward
from minillm.transformer.kv import FusedStore, KVStore
from minillm.transformer.linear import PackedLinear
from minillm.transformer.multi_head import MultiHeadAttention
from minillm.transformer.norms import RMSNorm
from minillm.transformer.positions import Rotation
from minillm.transformer.twins import twin


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


def gather(layers: Iterable[TransformerBlock]) -> Any:
    """The layers' weights as the kernel takes them that does all layers; None where it cannot do them.

    It can: layers with RMSNorm before each sublayer, a gated feed-forward network with SiLU, and matrix products whose
    packed weights it reads (`PackedLinear.few`).
    """
    parts = [_parts(layer) for layer in layers]
    if not parts or None in parts:
        return None
    found = [part for part in parts if part is not None]
    first = found[0].norms[0]
    norms = [norm for part in found for norm in (*part.norms, *part.head_norms)]
    alike = {(norm.eps, norm.weight_offset) for norm in norms}
    dtypes = {norm.weight.dtype for norm in norms}
    dtypes |= {product.packed.dtype for part in found for product in part.products}
    kernel = twin("decoder_layers", first.weight)
    if kernel is None or len(alike) > 1 or len(dtypes) > 1:
        return None
    layers_weights = [
        kernel.LayerWeights(
            *([norm.weight.detach() for norm in some] for some in (part.norms, part.head_norms)), part.products
        )
        for part in found
    ]
    return kernel.stack(layers_weights, first.eps, first.weight_offset)


class _Parts(NamedTuple):
    """Of a layer that can be gathered, what holds its weights."""

    norms: list[RMSNorm]
    head_norms: list[RMSNorm]
    products: list[Any]


def _parts(layer: TransformerBlock) -> _Parts | None:
    around = (layer.attention_norm, layer.feed_forward_norm)
    attention, feed_forward = layer.attention, layer.feed_forward
    if not isinstance(feed_forward, GatedFeedForward) or feed_forward.activation is not F.silu:
        return None
    if any(sublayer.placement != "pre" or sublayer.ranks is not None for sublayer in around):
        return None
    linears = (attention.qkv, attention.out, feed_forward.gate_up, feed_forward.down)
    products = [linear.few for linear in linears if isinstance(linear, PackedLinear) and linear.few is not None]
    if len(products) < len(linears):
        return None
    norms = [sublayer.norm for sublayer in around if isinstance(sublayer.norm, RMSNorm)]
    head_norms = [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
    return _Parts(norms, head_norms, products) if len(norms) == len(around) else None


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
