"""All layers of the decoder for a few tokens, or a batch of single ones, on the CPU, in one call.

What it computes: what `minillm.transformer.fused.run_layers` does, by the same kernels: norm, projection, rotation,
key/value write, paged attention, projection, residual sum and norm, gated feed-forward network, residual sum.

How it maps to the hardware: for one token, all between the products is some microseconds of arithmetic a layer, and was
a third of the time, because each of nine calls makes arrays of its arguments, allocates its result, and goes through
Python. Here a step is one call, and the threads that one product has woken are still awake for the next. CUDA graphs
are the same idea on a GPU. What bounds it: reading the weights, once a step.

Definition of right: `minillm.transformer.blocks.TransformerBlock`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numba import njit, prange
from torch import Tensor

from minillm.kernels.cpu.bfloat16 import bits, read, write
from minillm.kernels.cpu.fast_math import FASTMATH, LOG2_E, ONLY_PRANGE, use_torch_threads
from minillm.kernels.cpu.packed_linear import FewRows, multiply, side_by_side
from minillm.kernels.cpu.paged_attention import FAR, MIN_TILES_PER_THREAD, NOTHING, Plan, _attend, _rows
from minillm.kernels.cpu.prompt_attention import words_for
from minillm.kernels.cpu.rms_norm import _add_and_normalise, _normalise
from minillm.kernels.cpu.rotary import _turn
from minillm.kernels.cpu.silu_mul import _few, _many
from minillm.kernels.cpu.vectors import numbers_at

NORMS, HEAD_NORMS, PRODUCTS = 2, 2, 4
MANY_TOKENS = 16
"""So many are divided among threads where they are normalised, turned and gated."""
QKV, ATTENTION_OUT, GATE_UP, DOWN = range(PRODUCTS)


class LayerWeights(NamedTuple):
    """One layer's weights.

    Attributes:
        norms: before attention and before the feed-forward network.
        head_norms: of each head's queries and keys, or nothing.
        products: queries, keys and values; attention's output; gate and up; down.
    """

    norms: Sequence[Float[Tensor, "hidden"]]
    head_norms: Sequence[Float[Tensor, "head_dim"]]
    products: Sequence[FewRows]


class Stack(NamedTuple):
    """Layers as `run` takes them.

    Attributes:
        layers: keep the memory.
        vectors: for each layer, address and length of its norms, its head norms, and its products' biases.
        blocks: for each layer, address and shape of its products' weights.
        eps, weight_offset: of all norms.
        most_tokens: of a step.
    """

    layers: Sequence[LayerWeights]
    vectors: Any
    blocks: Any
    eps: float
    weight_offset: float
    most_tokens: int


def stack(layers: Sequence[LayerWeights], eps: float, weight_offset: float) -> Stack:
    """Layers for `run`: a table of where their weights lie, so that a step hands over one array for all of them."""
    vectors = np.zeros((len(layers), NORMS + HEAD_NORMS + PRODUCTS, 2), np.int64)
    blocks = np.zeros((len(layers), PRODUCTS, 4), np.int64)
    for number, layer in enumerate(layers):
        norms, head_norms = ([bits(norm) for norm in some] for some in (layer.norms, layer.head_norms))
        for start, some in ((0, norms), (NORMS, head_norms), (NORMS + HEAD_NORMS, [p.bias for p in layer.products])):
            for place, array in enumerate(some, start):
                vectors[number, place] = array.ctypes.data, len(array)
        for place, product in enumerate(layer.products):
            blocks[number, place] = product.blocks.ctypes.data, *product.blocks.shape
    most_tokens = min(product.most_rows for layer in layers for product in layer.products)
    return Stack(layers, vectors, blocks, eps, weight_offset, most_tokens)


@njit(inline="always")
def _vector(like, place):
    return numbers_at(like, place[0], place[1])


@njit(inline="always")
def _matrix(like, place):
    return numbers_at(like, place[0], (place[1], place[2], place[3]))


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _rotate_and_write_some(
    begin, end, projected, q_norm, k_norm, eps, weight_offset, cos, sin, interleaved, q, k_cache, v_cache, slots
):  # fmt: skip
    """Of these tokens: queries, turned; keys, turned, and values into their slots. Norms of heads come first."""
    heads, kv_heads, block_size = q.shape[1], k_cache.shape[1], k_cache.shape[2]
    if len(q_norm):
        for token in range(begin, end):
            for head in range(heads):
                _normalise(projected[token, head], q_norm, projected[token, head], eps, weight_offset)
            for head in range(heads, heads + kv_heads):
                _normalise(projected[token, head], k_norm, projected[token, head], eps, weight_offset)
    for token in range(begin, end):
        for head in range(heads):
            _turn(projected[token, head], cos[token], sin[token], interleaved, q[token, head])
    for token in range(begin, end):
        if slots[token] >= 0:
            block, place = divmod(slots[token], block_size)
            for head in range(kv_heads):
                _turn(
                    projected[token, heads + head], cos[token], sin[token], interleaved, k_cache[block, head, place]
                )  # fmt: skip
                value, target = projected[token, heads + kv_heads + head], v_cache[block, head, place]
                for d in range(len(value)):
                    target[d] = value[d]


@njit(nogil=True, cache=True)
def _add(x, added):
    for token in range(x.shape[0]):
        for i in range(x.shape[1]):
            x[token, i] = write(x[token, i], read(x[token, i]) + read(added[token, i]))


@njit(nogil=True, cache=True, parallel=ONLY_PRANGE)
def _rotate_and_write(
    parts, projected, q_norm, k_norm, eps, weight_offset, cos, sin, interleaved, q, k_cache, v_cache, slots
):  # fmt: skip
    tokens, heads = len(slots), (projected, q_norm, k_norm, eps, weight_offset)
    places = (cos, sin, interleaved, q, k_cache, v_cache, slots)
    if parts == 1:
        _rotate_and_write_some(0, tokens, *heads, *places)
        return
    for part in prange(parts):
        _rotate_and_write_some(tokens * part // parts, tokens * (part + 1) // parts, *heads, *places)


@njit(nogil=True, cache=True)
def _gate(parts, gate_up, out):
    if parts == 1:
        _few(gate_up, out)
    else:
        _many(gate_up, out)


@njit(nogil=True, cache=True)
def _layers(
    threads, x, vectors, blocks, eps, weight_offset, cos, sin, interleaved, store, slots,
    tables, query_starts, seq_lens, windows, shared, few, nothing, words, scale, cap
):  # fmt: skip
    tokens = len(x)
    kv_heads, block_size, head_dim = store.shape[3], store.shape[4], store.shape[5]
    inputs = blocks[0, :, 2] * side_by_side(x)
    heads, intermediate = inputs[ATTENTION_OUT] // head_dim, inputs[DOWN]
    normed, added = np.empty_like(x), np.zeros_like(x)
    projected = np.empty((tokens, heads + 2 * kv_heads, head_dim), x.dtype)
    q, attended = np.empty((tokens, heads, head_dim), x.dtype), np.empty((tokens, heads, head_dim), x.dtype)
    gate_up, middle = np.empty((tokens, 2 * intermediate), x.dtype), np.empty((tokens, intermediate), x.dtype)
    by_many = threads if tokens >= MANY_TOKENS else 1
    common = shared if windows[0] == FAR else nothing
    seqs, lengths, ends = _rows(query_starts, seq_lens, windows[0], block_size, len(common))
    for layer in range(len(vectors)):
        norm, next_norm = _vector(x, vectors[layer, 0]), _vector(x, vectors[layer, 1])
        q_norm, k_norm = _vector(x, vectors[layer, 2]), _vector(x, vectors[layer, 3])
        bias = vectors[layer, NORMS + HEAD_NORMS :]
        weight = blocks[layer]
        k_cache, v_cache = store[0, layer], store[1, layer]

        _add_and_normalise(by_many, x, added, norm, normed, eps, weight_offset)
        multiply(threads, _matrix(x, weight[QKV]), normed, _vector(x, bias[QKV]), projected.reshape(tokens, -1))
        _rotate_and_write(
            by_many, projected, q_norm, k_norm, eps, weight_offset, cos, sin, interleaved, q, k_cache, v_cache, slots
        )  # fmt: skip
        if layer and windows[layer] != windows[layer - 1]:
            common = shared if windows[layer] == FAR else nothing
            seqs, lengths, ends = _rows(query_starts, seq_lens, windows[layer], block_size, len(common))
        parts = max(1, min(threads, ends[-1] * kv_heads // MIN_TILES_PER_THREAD))
        attended[:] = 0
        _attend(
            parts, words, q, k_cache, v_cache, tables, seqs, lengths, ends, windows[layer], common, few,
            scale, cap, attended
        )  # fmt: skip
        flat = attended.reshape(tokens, heads * head_dim)
        multiply(threads, _matrix(x, weight[ATTENTION_OUT]), flat, _vector(x, bias[ATTENTION_OUT]), added)

        _add_and_normalise(by_many, x, added, next_norm, normed, eps, weight_offset)
        multiply(threads, _matrix(x, weight[GATE_UP]), normed, _vector(x, bias[GATE_UP]), gate_up)
        _gate(by_many, gate_up, middle)
        multiply(threads, _matrix(x, weight[DOWN]), middle, _vector(x, bias[DOWN]), added)
    _add(x, added)


def takes(layers: Stack, tokens: int, plan: Plan) -> bool:
    """Whether `run` is for a step of so many tokens."""
    return tokens <= layers.most_tokens and not plan.many


def run(
    x: Float[Tensor, "tokens hidden"],
    layers: Stack,
    cos: Float[Tensor, "tokens half"],
    sin: Float[Tensor, "tokens half"],
    store: Float[Tensor, "two layers blocks kv_heads block_size head_dim"],
    slot_mapping: Int[Tensor, "tokens"],
    query_starts: Int[Tensor, "seqs_and_one"],
    seq_lens: Int[Tensor, "seqs"],
    plan: Plan,
    *,
    interleaved: bool,
    scale: float,
    windows: Sequence[int | None],
    soft_cap: float | None = None,
) -> None:
    """Make of x, in place, what the layers make of it; save the tokens' keys and values in their slots.

    Args:
        plan: that of layers which look back as far as there is.
        windows: how far each layer looks back.
    """
    _layers(
        use_torch_threads(),
        bits(x),
        layers.vectors,
        layers.blocks,
        layers.eps,
        layers.weight_offset,
        bits(cos),
        bits(sin),
        interleaved,
        bits(store),
        slot_mapping.numpy(),
        plan.tables,
        query_starts.numpy(),
        seq_lens.numpy(),
        np.array([FAR if window is None else window for window in windows]),
        plan.shared,
        plan.few,
        NOTHING,
        words_for(bits(store)),
        np.float32(scale * (1.0 if soft_cap is not None else LOG2_E)),
        np.float32(soft_cap or 0.0),
    )
