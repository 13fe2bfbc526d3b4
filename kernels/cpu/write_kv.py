"""Saving new keys and values in their slots, on the CPU.

What it computes: token i's key goes to block ``slot // block_size``, place ``slot % block_size``, for every head.

How it maps to the hardware: a copy of a few KiB, which takes next to nothing. PyTorch's way is a chain of eight
operations (which slots are real, block, place, gather, scatter, twice), each of which costs microseconds to call; this
is one call. What bounds it is that call.

Definition of right: `minillm.cache.reference.write_kv`.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from numba import njit
from torch import Tensor

from minillm.cache import reference
from minillm.kernels.cpu.bfloat16 import bits


@njit(nogil=True, cache=True)
def _write(k_cache, v_cache, k, v, slots):
    block_size = k_cache.shape[2]
    for token in range(len(slots)):
        if slots[token] >= 0:
            block, place = divmod(slots[token], block_size)
            for head in range(k.shape[1]):
                k_cache[block, head, place] = k[token, head]
                v_cache[block, head, place] = v[token, head]


def write_kv(
    k_cache: Float[Tensor, "blocks kv_heads block_size head_dim"],
    v_cache: Float[Tensor, "blocks kv_heads block_size head_dim"],
    k: Float[Tensor, "tokens kv_heads head_dim"],
    v: Float[Tensor, "tokens kv_heads head_dim"],
    slot_mapping: Int[Tensor, "tokens"],
) -> None:
    """As `minillm.cache.reference.write_kv`, for numbers of 16 or 32 bits on the CPU."""
    if k_cache.device.type != "cpu" or k.dtype is not k_cache.dtype or k.dtype.itemsize not in (2, 4):
        reference.write_kv(k_cache, v_cache, k, v, slot_mapping)
        return
    _write(bits(k_cache), bits(v_cache), bits(k.contiguous()), bits(v.contiguous()), slot_mapping.numpy())
