"""A whole layer of the decoder for a few tokens, on the CPU, in one call.

What it computes: what `minillm.transformer.fused.run_layers` does for one layer, by the same kernels: norm, projection,
rotation, key/value write, paged attention, projection, residual sum and norm, gated feed-forward network, residual sum.

How it maps to the hardware: for one token, all between the products is some microseconds of arithmetic a layer, and was
a third of the time, because each of nine calls makes arrays of its arguments, allocates its result, and goes through
Python. Here it is one call, and the threads that one product has woken are still awake for the next. CUDA graphs are
the same idea on a GPU. What bounds it: reading the weights, once a step.

Definition of right: `minillm.transformer.blocks.TransformerBlock`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numba import njit
from torch import Tensor

from minillm.kernels.cpu.bfloat16 import bits, read, write
from minillm.kernels.cpu.fast_math import LOG2_E, use_torch_threads
from minillm.kernels.cpu.packed_linear import FEW_ROWS, FewRows, multiply, outputs_of_a_block
from minillm.kernels.cpu.paged_attention import MIN_TILES_PER_THREAD, NOTHING_COMMON, Plan, _attend
from minillm.kernels.cpu.rms_norm import _add_rms_norm, _normalise, _rms_norm
from minillm.kernels.cpu.rotary import _turn
from minillm.kernels.cpu.silu_mul import _few


class Arrays(NamedTuple):
    """The memory of a layer's weights; what a layer does not have is empty."""

    attention_norm: Any
    qkv: Any
    qkv_bias: Any
    q_norm: Any
    k_norm: Any
    attention_out: Any
    attention_out_bias: Any
    feed_forward_norm: Any
    gate_up: Any
    gate_up_bias: Any
    down: Any
    down_bias: Any


class LayerWeights(NamedTuple):
    """A layer as `run` takes it; `products` keep the memory of `arrays`.

    Attributes:
        eps, weight_offset: of all its norms.
    """

    arrays: Arrays
    products: tuple[FewRows, ...]
    eps: float
    weight_offset: float


@njit(nogil=True, cache=True)
def _rotate_and_write(
    projected, q_norm, k_norm, eps, weight_offset, cos, sin, interleaved, q, k_cache, v_cache, slots
):  # fmt: skip
    """The queries, turned; keys, turned, and values into their slots; all of them normalised before, if they are."""
    heads, kv_heads, block_size = q.shape[1], k_cache.shape[1], k_cache.shape[2]
    for token in range(len(slots)):
        for head in range(heads):
            source = projected[token, head]
            if len(q_norm):
                _normalise(source, q_norm, source, eps, weight_offset)
            _turn(source, cos[token], sin[token], interleaved, q[token, head])
        if slots[token] >= 0:
            block, place = divmod(slots[token], block_size)
            for head in range(kv_heads):
                source = projected[token, heads + head]
                if len(k_norm):
                    _normalise(source, k_norm, source, eps, weight_offset)
                _turn(source, cos[token], sin[token], interleaved, k_cache[block, head, place])
                v_cache[block, head, place] = projected[token, heads + kv_heads + head]


@njit(nogil=True, cache=True)
def _layer(
    threads, x, arrays, eps, weight_offset, cos, sin, interleaved, k_cache, v_cache, slots,
    tables, seqs, lengths, ends, window, common_lse, common_mean, scale, cap
):  # fmt: skip
    tokens, hidden = x.shape
    _, kv_heads, _, head_dim = k_cache.shape
    heads = arrays.attention_out.shape[1] // outputs_of_a_block(arrays.attention_out) // head_dim
    all_heads = heads + 2 * kv_heads
    intermediate = arrays.down.shape[1] // outputs_of_a_block(arrays.down)

    normed, added = np.empty_like(x), np.empty_like(x)
    _rms_norm(x, arrays.attention_norm, normed, eps, weight_offset)
    projected = np.empty((tokens, all_heads * head_dim), x.dtype)
    multiply(threads, arrays.qkv, normed, arrays.qkv_bias, projected)
    q = np.empty((tokens, heads, head_dim), x.dtype)
    _rotate_and_write(
        projected.reshape(tokens, all_heads, head_dim), arrays.q_norm, arrays.k_norm, eps, weight_offset,
        cos, sin, interleaved, q, k_cache, v_cache, slots
    )  # fmt: skip
    attended = np.zeros((tokens, heads, head_dim), x.dtype)
    parts = max(1, min(threads, ends[-1] * kv_heads // MIN_TILES_PER_THREAD))
    _attend(
        parts, q, k_cache, v_cache, tables, seqs, lengths, ends, window, 0, common_lse, common_mean,
        scale, cap, attended
    )  # fmt: skip
    flat = attended.reshape(tokens, heads * head_dim)
    multiply(threads, arrays.attention_out, flat, arrays.attention_out_bias, added)

    _add_rms_norm(x, added, arrays.feed_forward_norm, normed, eps, weight_offset)
    gate_up = np.empty((tokens, 2 * intermediate), x.dtype)
    multiply(threads, arrays.gate_up, normed, arrays.gate_up_bias, gate_up)
    middle = np.empty((tokens, intermediate), x.dtype)
    _few(gate_up, middle)
    multiply(threads, arrays.down, middle, arrays.down_bias, added)
    for token in range(tokens):
        for i in range(hidden):
            x[token, i] = write(x[token, i], read(x[token, i]) + read(added[token, i]))


def gather(
    norms: tuple[Tensor, Tensor],
    head_norms: tuple[Tensor, Tensor] | None,
    products: tuple[FewRows, FewRows, FewRows, FewRows],
    eps: float,
    weight_offset: float,
) -> LayerWeights:
    """A layer's weights, for `run`.

    Args:
        norms: before attention and before the feed-forward network.
        head_norms: of each head's queries and keys.
        products: queries, keys and values; attention's output; gate and up; down.
        eps, weight_offset: of all norms.
    """
    nothing = products[0].bias[:0]
    q_norm, k_norm = (nothing, nothing) if head_norms is None else map(bits, head_norms)
    qkv, attention_out, gate_up, down = products
    arrays = Arrays(
        bits(norms[0]), qkv.blocks, qkv.bias, q_norm, k_norm, attention_out.blocks, attention_out.bias,
        bits(norms[1]), gate_up.blocks, gate_up.bias, down.blocks, down.bias,
    )  # fmt: skip
    return LayerWeights(arrays, products, eps, weight_offset)


def takes(tokens: int, plan: Plan) -> bool:
    """Whether `run` is for a step of so many tokens: a few, each with keys of its own."""
    return tokens <= FEW_ROWS and not plan.many and not len(plan.shared)


def run(
    x: Float[Tensor, "tokens hidden"],
    layer: LayerWeights,
    cos: Float[Tensor, "tokens half"],
    sin: Float[Tensor, "tokens half"],
    k_cache: Float[Tensor, "blocks kv_heads block_size head_dim"],
    v_cache: Float[Tensor, "blocks kv_heads block_size head_dim"],
    slot_mapping: Int[Tensor, "tokens"],
    plan: Plan,
    *,
    interleaved: bool,
    scale: float,
    soft_cap: float | None = None,
) -> None:
    """Make of x, in place, what the layer makes of it; save the tokens' keys and values in their slots."""
    _layer(
        use_torch_threads(),
        bits(x),
        layer.arrays,
        layer.eps,
        layer.weight_offset,
        bits(cos),
        bits(sin),
        interleaved,
        bits(k_cache),
        bits(v_cache),
        slot_mapping.numpy(),
        plan.tables,
        plan.seqs,
        plan.lengths,
        plan.ends,
        plan.window,
        *NOTHING_COMMON,
        np.float32(scale * (1.0 if soft_cap is not None else LOG2_E)),
        np.float32(soft_cap or 0.0),
    )
