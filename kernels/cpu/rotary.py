"""Rotary positions on the CPU, queries and keys in one call (Su et al. 2021, "RoFormer", §3.2.2).

What it computes: each pair of channels (a, b) of each head becomes (a·cos − b·sin, b·cos + a·sin); channels behind the
rotary ones are copied.

How it maps to the hardware: some KiB are read once and written once. PyTorch's way is a chain of seven operations for
the queries and seven for the keys, each of which costs microseconds to call and goes over everything again; that, and
nothing of the hardware, is what bounds it. `rotate_and_write` saves the next call too: it puts the turned keys, and the
values, into their slots of the paged cache, for nobody else reads them. And it reads queries, keys and values where the
packed projection left them, a token's side by side, without putting them together first.

Definition of right: `minillm.transformer.positions.apply_rotary`, then `minillm.cache.reference.write_kv`.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from numba import njit, prange
from torch import Tensor

from minillm.kernels.cpu.bfloat16 import DTYPES, bits, read, write
from minillm.kernels.cpu.fast_math import FASTMATH, ONLY_PRANGE, use_torch_threads
from minillm.kernels.cpu.vectors import numbers_at

MANY_TOKENS = 32
"""So many are worth waking another thread."""


@njit(inline="always")  # with the caller's FASTMATH; a call with rows of arrays takes 90 ns, what it does 6
def _turn(source, c, s, interleaved, target):
    """One head of one token."""
    half = len(c)
    if interleaved:
        for i in range(half):
            a, b = read(source[2 * i]), read(source[2 * i + 1])
            target[2 * i] = write(target[2 * i], a * read(c[i]) - b * read(s[i]))
            target[2 * i + 1] = write(target[2 * i + 1], b * read(c[i]) + a * read(s[i]))
    else:
        for i in range(half):
            a, b = read(source[i]), read(source[half + i])
            target[i] = write(target[i], a * read(c[i]) - b * read(s[i]))
            target[half + i] = write(target[half + i], b * read(c[i]) + a * read(s[i]))
    for i in range(2 * half, len(source)):
        target[i] = source[i]


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _rotate(x, cos, sin, interleaved, out):
    for token in range(x.shape[0]):
        for head in range(x.shape[1]):
            _turn(x[token, head], cos[token], sin[token], interleaved, out[token, head])


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _rotate_and_write_one(token, places, cos, sin, interleaved, q_out, k_cache, v_cache, slots):
    """One token's queries, keys and values; `places` has each one's address and bytes from token to token."""
    heads, head_dim = q_out.shape[1:]
    kv_heads = k_cache.shape[1]
    q = numbers_at(q_out, places[0, 0] + token * places[0, 1], (heads, head_dim))
    for head in range(heads):
        _turn(q[head], cos[token], sin[token], interleaved, q_out[token, head])
    if slots[token] >= 0:
        k = numbers_at(q_out, places[1, 0] + token * places[1, 1], (kv_heads, head_dim))
        v = numbers_at(q_out, places[2, 0] + token * places[2, 1], (kv_heads, head_dim))
        block, place = divmod(slots[token], k_cache.shape[2])
        for head in range(kv_heads):
            _turn(k[head], cos[token], sin[token], interleaved, k_cache[block, head, place])
            target = v_cache[block, head, place]
            for d in range(head_dim):
                target[d] = v[head, d]


@njit(nogil=True, cache=True)
def _rotate_and_write_few(places, cos, sin, interleaved, q_out, k_cache, v_cache, slots):
    for token in range(len(slots)):
        _rotate_and_write_one(token, places, cos, sin, interleaved, q_out, k_cache, v_cache, slots)


@njit(nogil=True, cache=True, parallel=ONLY_PRANGE)
def _rotate_and_write_many(places, cos, sin, interleaved, q_out, k_cache, v_cache, slots):
    for token in prange(len(slots)):
        _rotate_and_write_one(token, places, cos, sin, interleaved, q_out, k_cache, v_cache, slots)


def supports(q: Tensor, k: Tensor) -> bool:
    """Whether `rotate` takes these: flat batches, all float32 or all bfloat16."""
    return q.ndim == 3 and q.dtype is k.dtype and q.dtype in DTYPES


def rotate(
    q: Float[Tensor, "tokens heads head_dim"],
    k: Float[Tensor, "tokens kv_heads head_dim"],
    cos: Float[Tensor, "tokens half"],
    sin: Float[Tensor, "tokens half"],
    *,
    interleaved: bool,
) -> tuple[Float[Tensor, "tokens heads head_dim"], Float[Tensor, "tokens kv_heads head_dim"]]:
    """Queries and keys turned by their tokens' angles, computed in float32. Has no gradient."""
    q_out, k_out = torch.empty(q.shape, dtype=q.dtype), torch.empty(k.shape, dtype=k.dtype)
    cosines, sines = bits(cos), bits(sin)
    _rotate(bits(q.contiguous()), cosines, sines, interleaved, bits(q_out))
    _rotate(bits(k.contiguous()), cosines, sines, interleaved, bits(k_out))
    return q_out, k_out


def rotate_and_write(
    q: Float[Tensor, "tokens heads head_dim"],
    k: Float[Tensor, "tokens kv_heads head_dim"],
    v: Float[Tensor, "tokens kv_heads head_dim"],
    cos: Float[Tensor, "tokens half"],
    sin: Float[Tensor, "tokens half"],
    k_cache: Float[Tensor, "blocks kv_heads block_size head_dim"],
    v_cache: Float[Tensor, "blocks kv_heads block_size head_dim"],
    slot_mapping: Int[Tensor, "tokens"],
    *,
    interleaved: bool,
) -> Float[Tensor, "tokens heads head_dim"]:
    """`rotate`, and `write_kv` of the turned keys and the values; returns the turned queries."""
    q_out = torch.empty(q.shape, dtype=q.dtype)
    parts = [x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q, k, v)]
    places = np.array([(x.data_ptr(), x.stride(0) * x.itemsize) for x in parts])
    arrays = (bits(cos), bits(sin), interleaved, bits(q_out), bits(k_cache), bits(v_cache), slot_mapping.numpy())
    if len(q) < MANY_TOKENS:
        _rotate_and_write_few(places, *arrays)
    else:
        use_torch_threads()
        _rotate_and_write_many(places, *arrays)
    return q_out
