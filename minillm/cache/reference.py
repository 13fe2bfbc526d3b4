"""What is right: paged attention and the key/value write in plain PyTorch, on any device.

The engine can always run on these two. Faster twins of them, in ``kernels/``, are tested against them.

A sequence's keys and values lie in the blocks that its row of the block table names, in order (Kwon et al. 2023,
"Efficient Memory Management for Large Language Model Serving with PagedAttention", §4.1). Here they are gathered into
one stretch first and attended to as usual: right, simple, and a copy of all keys and values at each step, which is what
the kernels save.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minillm.transformer.attention import attend, attention_mask

NO_SLOT = -1
"""The slot of a token whose key and value are stored already."""


def write_kv(
    k_cache: Float[Tensor, "blocks kv_heads block_size head_dim"],
    v_cache: Float[Tensor, "blocks kv_heads block_size head_dim"],
    k: Float[Tensor, "tokens kv_heads head_dim"],
    v: Float[Tensor, "tokens kv_heads head_dim"],
    slot_mapping: Int[Tensor, "tokens"],
) -> None:
    """Save each token's key and value in its slot (block × block_size + place); `NO_SLOT` saves nothing."""
    new = slot_mapping >= 0
    slots = slot_mapping[new]
    block, place = slots // k_cache.shape[2], slots % k_cache.shape[2]
    k_cache[block, :, place] = k[new]
    v_cache[block, :, place] = v[new]


def paged_attention(
    q: Float[Tensor, "tokens heads head_dim"],
    k_cache: Float[Tensor, "blocks kv_heads block_size head_dim"],
    v_cache: Float[Tensor, "blocks kv_heads block_size head_dim"],
    block_tables: Int[Tensor, "seqs max_blocks"],
    query_starts: Int[Tensor, "seqs_and_one"],
    seq_lens: Int[Tensor, "seqs"],
    *,
    max_query_len: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Float[Tensor, "tokens heads head_dim"]:
    """Causal attention of a ragged batch: each sequence's queries are the last of its `seq_lens` positions.

    Args:
        block_tables: a sequence's blocks in order; what lies behind its last block is not read.
        query_starts: where each sequence's queries begin in `q`, and the end of the last one's.
        seq_lens: tokens whose keys and values are stored, those of this call included.
        max_query_len: the most queries of one sequence, for twins that cannot ask `query_starts` without waiting for
            a GPU.
    """
    starts, lengths = query_starts.tolist(), seq_lens.tolist()
    out = torch.empty_like(q)
    causal_attention = partial(_attend, scale=scale, window=window, soft_cap=soft_cap)
    single = [row for row in range(len(lengths)) if starts[row + 1] - starts[row] == 1]
    if single:  # decodes: one padded batch of all of them
        at = torch.tensor(single, device=q.device)
        tokens = query_starts[at].long()
        blocks = -(-max(lengths[row] for row in single) // k_cache.shape[2])
        k, v = (_gather(cache, block_tables[at, :blocks]) for cache in (k_cache, v_cache))
        out[tokens] = causal_attention(q[tokens][:, :, None], k, v, seq_lens[at])[:, :, 0]
    for row in set(range(len(lengths))).difference(single):
        queries, length = slice(starts[row], starts[row + 1]), lengths[row]
        table = block_tables[row : row + 1, : -(-length // k_cache.shape[2])]
        k, v = (_gather(cache, table)[:, :, :length] for cache in (k_cache, v_cache))
        seen = causal_attention(q[queries].transpose(0, 1)[None], k, v, seq_lens[row : row + 1])
        out[queries] = seen[0].transpose(0, 1)
    return out


def _gather(
    cache: Float[Tensor, "blocks kv_heads block_size head_dim"], tables: Int[Tensor, "seqs table"]
) -> Float[Tensor, "seqs kv_heads keys head_dim"]:
    """Each sequence's blocks as one stretch."""
    return cache[tables].transpose(1, 2).flatten(2, 3)


def _attend(
    q: Float[Tensor, "seqs heads queries head_dim"],
    k: Float[Tensor, "seqs kv_heads keys head_dim"],
    v: Float[Tensor, "seqs kv_heads keys head_dim"],
    lengths: Int[Tensor, "seqs"],
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Float[Tensor, "seqs heads queries head_dim"]:
    queries, keys = q.shape[2], k.shape[2]
    key_positions = torch.arange(keys, device=q.device)
    positions = lengths[:, None] - queries + torch.arange(queries, device=q.device)
    mask = attention_mask(positions, key_positions.expand(len(lengths), -1), window=window)[:, None]
    # What stands behind a sequence's end is masked, and its value is multiplied by 0: it must be a number.
    v = v.masked_fill((key_positions >= lengths[:, None])[:, None, :, None], 0)
    return attend(q, k, v, mask, scale=scale, soft_cap=soft_cap)
