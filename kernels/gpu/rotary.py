"""Rotary positions on the GPU, queries and keys in one launch (Su et al. 2021, "RoFormer", §3.2.2).

What it computes: each pair of channels (a, b) of each head becomes (a·cos − b·sin, b·cos + a·sin); channels behind the
rotary ones are copied.

How it maps to the hardware: one program a token and some heads; query heads and key heads are rows of the same tile. In
PyTorch it is a dozen kernels, each of which reads and writes everything. What bounds it: memory, for many tokens; the
launch, for few.

Definition of right: `minillm.transformer.positions.apply_rotary`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

HEADS = 8
"""Heads of a program."""


@triton.jit
def _rotate(
    q, k, cos, sin, q_out, k_out, q_token, k_token,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr, PADDED_REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_q, is_k = head < Q_HEADS, (head >= Q_HEADS) & (head < Q_HEADS + K_HEADS)
    q_from, k_from = q + token * q_token + head * HEAD_DIM, k + token * k_token + (head - Q_HEADS) * HEAD_DIM
    q_to = q_out + (token * Q_HEADS + head) * HEAD_DIM
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
    tokens, heads, head_dim = q.shape
    kv_heads, half = k.shape[1], cos.shape[1]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    _rotate[(tokens, triton.cdiv(heads + kv_heads, HEADS))](
        q, k, cos, sin, q_out, k_out, q.stride(0), k.stride(0),
        Q_HEADS=heads, K_HEADS=kv_heads, HEAD_DIM=head_dim, HALF=half, INTERLEAVED=interleaved, HEADS=HEADS,
        PADDED=triton.next_power_of_2(half), PADDED_REST=triton.next_power_of_2(max(1, head_dim - 2 * half)),
    )  # fmt: skip
    return q_out, k_out
