"""Saving new keys and values in their slots, on the GPU.

What it computes: token i's key goes to block ``slot // block_size``, place ``slot % block_size``, for every head.

How it maps to the hardware: one program a token. What it reads is contiguous, what it writes is contiguous for each
head. What bounds it: the launch, as nearly always for so few bytes; in a CUDA graph not even that is seen.

Definition of right: `minillm.cache.reference.write_kv`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor


@triton.jit
def _write(
    k_cache,
    v_cache,
    k,
    v,
    slot_mapping,
    k_token,
    v_token,
    cache_block,
    cache_head,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot >= 0:
        number = tl.arange(0, PADDED)
        head, dim = number // HEAD_DIM, number % HEAD_DIM
        target = slot // BLOCK_SIZE * cache_block + head * cache_head + slot % BLOCK_SIZE * HEAD_DIM + dim
        tl.store(k_cache + target, tl.load(k + token * k_token + number, mask=number < SIZE), mask=number < SIZE)
        tl.store(v_cache + target, tl.load(v + token * v_token + number, mask=number < SIZE), mask=number < SIZE)


def write_kv(
    k_cache: Float[Tensor, "blocks kv_heads block_size head_dim"],
    v_cache: Float[Tensor, "blocks kv_heads block_size head_dim"],
    k: Float[Tensor, "tokens kv_heads head_dim"],
    v: Float[Tensor, "tokens kv_heads head_dim"],
    slot_mapping: Int[Tensor, "tokens"],
) -> None:
    """As `minillm.cache.reference.write_kv`."""
    _, kv_heads, block_size, head_dim = k_cache.shape
    k, v = (x if x.stride()[1:] == (head_dim, 1) else x.contiguous() for x in (k, v))
    size = kv_heads * head_dim
    _write[(len(slot_mapping),)](
        _bits(k_cache),
        _bits(v_cache),
        _bits(k),
        _bits(v),
        slot_mapping,
        k.stride(0),
        v.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        SIZE=size,
        PADDED=triton.next_power_of_2(size),
        num_warps=1 if size <= 512 else 4,
    )


def _bits(x: Tensor) -> Tensor:
    """A copy need not know what the bits mean."""
    return x.view(torch.int16) if x.dtype.itemsize == 2 else x
