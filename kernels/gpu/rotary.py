"""Rotary positions on the GPU, queries and keys in one launch (Su et al. 2021, "RoFormer", §3.2.2).

What it computes: each pair of channels (a, b) of each head becomes (a·cos − b·sin, b·cos + a·sin); channels behind the
rotary ones are copied.

How it maps to the hardware: one program a token and some heads; query heads and key heads are rows of the same tile. In
PyTorch it is a dozen kernels, each of which reads and writes everything. What bounds it: memory, for many tokens; the
launch, for few. `rotate_and_write` therefore puts the turned keys, and the values, where the paged cache wants them:
nobody else reads them, so that they need not be written anywhere else.

Definition of right: `minillm.transformer.positions.apply_rotary`, then `minillm.cache.reference.write_kv`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

HEADS = 8
"""Heads of a program."""


@triton.jit
def _rotate(
    q, k, v, cos, sin, q_out, k_out, v_out, slots, q_token, k_token, v_token, cache_block, cache_head,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, WRITE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr,
    PADDED_REST: tl.constexpr, PADDED_HEAD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_q, is_k = head < Q_HEADS, (head >= Q_HEADS) & (head < Q_HEADS + K_HEADS)
    q_from, k_from = q + token * q_token + head * HEAD_DIM, k + token * k_token + (head - Q_HEADS) * HEAD_DIM
    q_to = q_out + (token * Q_HEADS + head) * HEAD_DIM
    if WRITE:
        slot = tl.load(slots + token).to(tl.int64)
        is_k = is_k & (slot >= 0)
        start = slot // BLOCK_SIZE * cache_block + slot % BLOCK_SIZE * HEAD_DIM
        k_to = k_out + start + (head - Q_HEADS) * cache_head
        is_v = (head >= Q_HEADS + K_HEADS) & (head < Q_HEADS + 2 * K_HEADS) & (slot >= 0)
        v_head, dim = head - Q_HEADS - K_HEADS, tl.arange(0, PADDED_HEAD)
        copied = is_v[:, None] & (dim < HEAD_DIM)[None, :]
        values = tl.load(v + token * v_token + v_head[:, None] * HEAD_DIM + dim[None, :], mask=copied)
        tl.store(v_out + start + v_head[:, None] * cache_head + dim[None, :], values, mask=copied)
    else:
        k_to = k_out + (token * K_HEADS + head - Q_HEADS) * HEAD_DIM

    pair = tl.arange(0, PADDED)
    is_pair = (pair < HALF)[None, :]
    c = tl.load(cos + token * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    if INTERLEAVED:
        first, second = (2 * pair)[None, :], (2 * pair + 1)[None, :]
    else:
        first, second = pair[None, :], (pair + HALF)[None, :]
    in_q, in_k = is_q[:, None] & is_pair, is_k[:, None] & is_pair
    a = tl.load(q_from[:, None] + first, mask=in_q, other=0.0).to(tl.float32)
    b = tl.load(q_from[:, None] + second, mask=in_q, other=0.0).to(tl.float32)
    a += tl.load(k_from[:, None] + first, mask=in_k, other=0.0).to(tl.float32)
    b += tl.load(k_from[:, None] + second, mask=in_k, other=0.0).to(tl.float32)
    turned_a, turned_b = (a * c - b * s).to(q_out.dtype.element_ty), (b * c + a * s).to(q_out.dtype.element_ty)
    tl.store(q_to[:, None] + first, turned_a, mask=in_q)
    tl.store(q_to[:, None] + second, turned_b, mask=in_q)
    tl.store(k_to[:, None] + first, turned_a, mask=in_k)
    tl.store(k_to[:, None] + second, turned_b, mask=in_k)
    if 2 * HALF < HEAD_DIM:
        rest = 2 * HALF + tl.arange(0, PADDED_REST)
        is_rest = (rest < HEAD_DIM)[None, :]
        passed_q, passed_k = is_q[:, None] & is_rest, is_k[:, None] & is_rest
        tl.store(q_to[:, None] + rest[None, :], tl.load(q_from[:, None] + rest[None, :], mask=passed_q), mask=passed_q)
        tl.store(k_to[:, None] + rest[None, :], tl.load(k_from[:, None] + rest[None, :], mask=passed_k), mask=passed_k)


def supports(q: Tensor, k: Tensor) -> bool:
    """Whether `rotate` takes these: flat batches, each token's heads contiguous, as the packed projection has them."""
    return q.ndim == 3 and all(x.stride()[1:] == (x.shape[2], 1) for x in (q, k))


def rotate(
    q: Float[Tensor, "tokens heads head_dim"],
    k: Float[Tensor, "tokens kv_heads head_dim"],
    cos: Float[Tensor, "tokens half"],
    sin: Float[Tensor, "tokens half"],
    *,
    interleaved: bool,
) -> tuple[Float[Tensor, "tokens heads head_dim"], Float[Tensor, "tokens kv_heads head_dim"]]:
    """Queries and keys turned by their tokens' angles, computed in float32. Has no gradient."""
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    _launch(q, k, k, cos, sin, q_out, k_out, k_out, k_out, (0, 0), BLOCK_SIZE=1, WRITE=False, INTERLEAVED=interleaved)
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
    q, k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q, k, v))
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    strides = (k_cache.stride(0), k_cache.stride(1))
    _launch(
        q, k, v, cos, sin, q_out, k_cache, v_cache, slot_mapping, strides,
        BLOCK_SIZE=k_cache.shape[2], WRITE=True, INTERLEAVED=interleaved,
    )  # fmt: skip
    return q_out


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    slots: Tensor,
    cache_strides: tuple[int, int],
    **constants: int,
) -> None:
    tokens, heads, head_dim = q.shape
    kv_heads, half = k.shape[1], cos.shape[1]
    all_heads = heads + kv_heads * (2 if constants["WRITE"] else 1)
    _rotate[(tokens, triton.cdiv(all_heads, HEADS))](
        q, k, v, cos, sin, q_out, k_out, v_out, slots, q.stride(0), k.stride(0), v.stride(0), *cache_strides,
        Q_HEADS=heads, K_HEADS=kv_heads, HEAD_DIM=head_dim, HALF=half, HEADS=HEADS,
        PADDED=triton.next_power_of_2(half), PADDED_REST=triton.next_power_of_2(max(1, head_dim - 2 * half)),
        PADDED_HEAD=triton.next_power_of_2(head_dim), **constants,
    )  # fmt: skip
