"""Rotary positions on the CPU, queries and keys in one call (Su et al. 2021, "RoFormer", §3.2.2).

What it computes: each pair of channels (a, b) of each head becomes (a·cos − b·sin, b·cos + a·sin); channels behind the
rotary ones are copied.

How it maps to the hardware: some KiB are read once and written once. PyTorch's way is a chain of seven operations for
the queries and seven for the keys, each of which costs microseconds to call and goes over everything again; that, and
nothing of the hardware, is what bounds it.

Definition of right: `minillm.transformer.positions.apply_rotary`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from numba import njit
from torch import Tensor

from minillm.kernels.cpu.bfloat16 import bits, read, write
from minillm.kernels.cpu.fast_math import FASTMATH


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _rotate(x, cos, sin, interleaved, out):
    tokens, heads, head_dim = x.shape
    half = cos.shape[1]
    for token in range(tokens):
        c, s = cos[token], sin[token]
        for head in range(heads):
            source, target = x[token, head], out[token, head]
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
            for i in range(2 * half, head_dim):
                target[i] = source[i]


def supports(q: Tensor, k: Tensor) -> bool:
    """Whether `rotate` takes these: flat batches, all float32 or all bfloat16."""
    return q.ndim == 3 and q.dtype is k.dtype and q.dtype in (torch.float32, torch.bfloat16)


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
