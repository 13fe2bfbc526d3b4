"""Paged attention on the GPU, in Triton: one kernel for prompts, pieces of prompts and single tokens, all in one batch.

What it computes: softmax(q·kᵀ·scale)·v, each query over the blocks that its sequence's table names (Kwon et al. 2023,
"PagedAttention", §4.1), with the online softmax (Milakov & Gimelshein 2018, §3; Dao et al. 2022, "FlashAttention",
§3.1).

How it maps to the hardware:

- A *program* has a tile of queries of one sequence, and one key/value head. The query heads that share this head are
  packed as further rows of the tile, so that a tile of keys is read once for all of them, and so that ``tl.dot`` has
  rows enough for the tensor cores: a single query of a group of 4 is 4 rows of 16.
- Which sequence a program belongs to is found by bisection in `query_starts`. The grid is an upper bound that depends
  on shapes only: nothing is asked of the GPU before the launch, so that the launch can be captured in a CUDA graph.
- Keys come in tiles of 32 or more, gathered through the block table whatever the block size: each row of a tile is
  contiguous memory of head_dim numbers, which is what coalesced loads need.
- Single queries want small tiles and prompts large ones. A step that has both is two launches of the same kernel, each
  of which passes over the sequences that are the other's.
- **Split-KV** (Dao et al. 2023, "Flash-Decoding"): a few single queries are far fewer programs than a GPU has
  multiprocessors. Then the keys of each sequence are divided among several programs, each of which leaves its largest
  score, its sum and its mean, and a second kernel puts these together. `num_splits` says into how many.

What bounds it: single queries, the reading of keys and values from memory; prompts, the matrix products.

Groups and head sizes that are no powers of two (9 heads on 3, or 80 channels) are padded inside the kernel.

Definition of right: `minillm.cache.reference.paged_attention`.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

LOG2_E = 1.4426950408889634
MAX_SPLITS = 64
MIN_KEYS_PER_SPLIT = 256
PROGRAMS_PER_PROCESSOR = 4
"""`minillm bench gpu-attention` tries other numbers of splits beside those that these give; see docs/benchmarks.md."""
MANY_ROWS = tl.constexpr(64)
"""Rows of a long prompt's tiles. On an H100 a prompt of 4,096 (32/8 heads of 128) takes 456 µs so, 466 by 128 rows."""


@triton.jit
def _sequence_of(query_starts, tile, num_seqs, QUERIES: tl.constexpr):
    """The sequence that tile number `tile` belongs to: sequence s has room for its tiles from start // QUERIES + s."""
    low, high = 0, num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_starts + middle) // QUERIES + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


NUMBERS = ("window", "num_seqs", "table_row", "num_splits", "fewest", "most")


@triton.jit(do_not_specialize=NUMBERS)  # else each new value may compile
def _attend(
    q,
    k_cache,
    v_cache,
    block_tables,
    query_starts,
    seq_lens,
    out,
    stats,
    scale,
    soft_cap,
    window,
    num_seqs,
    q_token,
    q_head,
    out_token,
    table_row,
    kv_block,
    kv_head_stride,
    num_splits,
    fewest,
    most,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
):
    QUERIES: tl.constexpr = ROWS // GROUP
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq = tile  # where one tile is enough for each
    if most > QUERIES:
        seq = _sequence_of(query_starts, tile, num_seqs, QUERIES)
    start, end = tl.load(query_starts + seq), tl.load(query_starts + seq + 1)
    first = tl.where(most > QUERIES, (tile - (start // QUERIES + seq)) * QUERIES, 0)
    if first >= end - start or end - start < fewest or end - start > most:
        return
    length = tl.load(seq_lens + seq)

    row = tl.arange(0, ROWS)
    query = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = (row < QUERIES * GROUP) & (query < end - start)
    position = length - (end - start) + query
    dim = tl.arange(0, DIM)
    is_dim = dim < HEAD_DIM
    at = (start + query).to(tl.int64)[:, None] * q_token + head[:, None] * q_head + dim[None, :]
    queries = tl.load(q + at, mask=is_row[:, None] & is_dim[None, :], other=0.0)
    if WIDEN:
        queries = queries.to(tl.float32)

    # Keys that some query of this tile sees, and of these the part that is this split's.
    last_position = length - (end - start) + tl.minimum(first + QUERIES, end - start) - 1
    to = last_position + 1
    since = 0
    if HAS_WINDOW:
        since = tl.maximum(length - (end - start) + first - window + 1, 0) // KEYS * KEYS
    if SPLIT:
        tiles = tl.cdiv(to - since, KEYS)
        share = tl.cdiv(tiles, num_splits) * KEYS
        since = since + split * share
        to = tl.minimum(to, since + share)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, DIM], tl.float32)
    table = block_tables + seq.to(tl.int64) * table_row
    # Tiles of keys that every query sees whole come first: nothing need be hidden there.
    HIDES_ALWAYS: tl.constexpr = HAS_WINDOW or ROWS < MANY_ROWS
    whole = since
    if not HIDES_ALWAYS:
        whole += tl.maximum(tl.minimum(to, length - (end - start) + first + 1) - since, 0) // KEYS * KEYS
    for hides in tl.static_range(1 if HIDES_ALWAYS else 0, 2):
        for begin in range(whole if hides else since, to if hides else whole, KEYS):
            key = begin + tl.arange(0, KEYS)
            is_key = key < to
            block = tl.load(table + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
            place = block * kv_block + kv_head * kv_head_stride + (key % BLOCK_SIZE) * HEAD_DIM
            kept = is_key[:, None] & is_dim[None, :]
            if hides or HEAD_DIM != DIM:
                keys = tl.load(k_cache + place[:, None] + dim[None, :], mask=kept, other=0.0)
                values = tl.load(v_cache + place[:, None] + dim[None, :], mask=kept, other=0.0)
            else:
                keys = tl.load(k_cache + place[:, None] + dim[None, :])
                values = tl.load(v_cache + place[:, None] + dim[None, :])
            if WIDEN:
                keys, values = keys.to(tl.float32), values.to(tl.float32)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
            if HAS_CAP:
                scores = soft_cap * (2.0 / (1.0 + tl.exp2(scores * (-2.0 * 1.4426950408889634 / soft_cap))) - 1.0)
            scores = scores * 1.4426950408889634
            if hides:
                sees = is_key[None, :] & (key[None, :] <= position[:, None])
                if HAS_WINDOW:
                    sees = sees & (key[None, :] > position[:, None] - window)
                scores = tl.where(sees, scores, float("-inf"))
            best = tl.maximum(largest, tl.max(scores, 1))
            # A row that has seen nothing yet: −inf − −inf is no number.
            finite = tl.where(best == float("-inf"), 0.0, best)
            weights = tl.exp2(scores - finite[:, None])
            shrink = tl.exp2(largest - finite)
            total = total * shrink + tl.sum(weights, 1)
            mean = mean * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            largest = best

    if SPLIT:
        # [token, head, split]: the split's mean, its largest score and its sum.
        place = ((start + query) * (tl.num_programs(1) * GROUP) + head).to(tl.int64) * num_splits + split
        tl.store(out + place[:, None] * HEAD_DIM + dim[None, :], mean, mask=is_row[:, None] & is_dim[None, :])
        tl.store(stats + 2 * place, largest, mask=is_row)
        tl.store(stats + 2 * place + 1, total, mask=is_row)
    else:
        mean = mean / tl.where(total == 0.0, 1.0, total)[:, None]
        at = (start + query).to(tl.int64)[:, None] * out_token + head[:, None] * HEAD_DIM + dim[None, :]
        tl.store(out + at, mean.to(out.dtype.element_ty), mask=is_row[:, None] & is_dim[None, :])


@triton.jit(do_not_specialize=["num_splits"])
def _merge(
    means,
    stats,
    out,
    num_splits,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One token's one head: put the splits' results together."""
    row = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, DIM)
    place = row * num_splits + split
    largest = tl.load(stats + 2 * place, mask=split < num_splits, other=float("-inf"))
    total = tl.load(stats + 2 * place + 1, mask=split < num_splits, other=0.0)
    best = tl.max(largest, 0)
    weight = tl.exp2(largest - tl.where(best == float("-inf"), 0.0, best))
    kept = (split < num_splits)[:, None] & (dim < HEAD_DIM)[None, :]
    mean = tl.load(means + place[:, None] * HEAD_DIM + dim[None, :], mask=kept, other=0.0)
    sum_of_weights = tl.sum(weight * total, 0)
    merged = tl.sum(weight[:, None] * mean, 0) / tl.where(sum_of_weights == 0.0, 1.0, sum_of_weights)
    tl.store(out + row * HEAD_DIM + dim, merged.to(out.dtype.element_ty), mask=dim < HEAD_DIM)


class Tile(NamedTuple):
    """What a program works on at a time, rows (queries × group) by keys; on how many warps; how many tiles ahead."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def tile_of(dtype: torch.dtype, head_dim: int, group: int, max_query_len: int) -> Tile:
    """Single queries: as few rows as `tl.dot` takes. Prompts: as many as registers hold."""
    least = max(16, triton.next_power_of_2(group))
    exact = dtype is torch.float32  # without tensor cores: takes more registers, of which more warps have more
    if max_query_len * group <= least:
        keys = 32 if exact else 128 if head_dim <= 128 else 64
        return Tile(least, keys, 8 if exact and head_dim > 128 else 4, 2)
    if exact:
        return Tile(least, 32, 8 if head_dim >= 128 else 4, 2)
    rows = min(MANY_ROWS.value, triton.next_power_of_2(max_query_len * group))
    return Tile(max(least, rows), 64, 8 if head_dim > 128 else 4, 2)


class Launch(NamedTuple):
    """One launch of the kernel, for the sequences that have from `fewest` to `most` queries.

    Attributes:
        num_tiles: of queries, as many as these sequences can have; each is a program for each head and split.
    """

    tile: Tile
    fewest: int
    most: int
    num_tiles: int


def launches(
    dtype: torch.dtype, head_dim: int, group: int, num_tokens: int, num_seqs: int, max_query_len: int
) -> list[Launch]:
    """One launch for all sequences, or, where some may have few queries and some have many, one for each kind."""
    few = tile_of(dtype, head_dim, group, 1).rows // group
    kinds = [(1, max_query_len)]
    if few < max_query_len and num_tokens < num_seqs * max_query_len:
        kinds = [(1, few), (few + 1, max_query_len)]
    found = []
    for fewest, most in kinds:
        tile = tile_of(dtype, head_dim, group, most)
        queries = tile.rows // group
        found.append(Launch(tile, fewest, most, num_seqs if most <= queries else num_tokens // queries + num_seqs))
    return found


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; Triton's interpreter has none to speak of."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def num_splits(programs: int, max_keys: int, processors: int) -> int:
    """Into how many parts to divide every sequence's keys, so that all multiprocessors have something to read.

    Args:
        programs: query tiles × key/value heads, which there are without splitting.
        max_keys: keys of the longest sequence.
    """
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, programs)
    worthwhile = max(1, max_keys // MIN_KEYS_PER_SPLIT)
    return min(wanted, worthwhile, MAX_SPLITS)


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
    """As `minillm.cache.reference.paged_attention`; a sequence without keys gets zeros.

    Keys are divided among programs only where every sequence has a single query: a step with a piece of a prompt has
    programs enough.
    """
    tokens, heads, head_dim = q.shape
    _, kv_heads, block_size, _ = k_cache.shape
    seqs = len(seq_lens)
    group = heads // kv_heads
    splits = 1
    if max_query_len == 1:
        max_keys = block_tables.shape[1] * block_size
        splits = num_splits(seqs * kv_heads, max_keys, _processors(q.device))
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    if splits == 1:
        target, stats = out, out
    else:
        target = torch.empty((tokens, heads, splits, head_dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((tokens, heads, splits, 2), dtype=torch.float32, device=q.device)
    for tile, fewest, most, num_tiles in launches(q.dtype, head_dim, group, tokens, seqs, max_query_len):
        _attend[(num_tiles, kv_heads, splits)](
            q,
            k_cache,
            v_cache,
            block_tables,
            query_starts,
            seq_lens,
            target,
            stats,
            scale,
            soft_cap or 1.0,
            window or 0,
            seqs,
            q.stride(0),
            q.stride(1),
            out.stride(0),
            block_tables.stride(0),
            k_cache.stride(0),
            k_cache.stride(1),
            splits,
            fewest,
            most,
            **constants(
                tile,
                group,
                head_dim,
                block_size,
                split=splits > 1,
                HAS_WINDOW=window is not None,
                HAS_CAP=soft_cap is not None,
                WIDEN=needs_widening(q.dtype),
            ),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    if splits > 1:
        _merge[(tokens * heads,)](
            target,
            stats,
            out,
            splits,
            HEAD_DIM=head_dim,
            DIM=_padded(head_dim),
            SPLITS=MAX_SPLITS,  # not the number itself: each would be compiled once
            num_warps=4,
        )
    return out


def constants(tile: Tile, group: int, head_dim: int, block_size: int, *, split: bool, **kinds: bool) -> dict[str, Any]:
    """The compile-time constants of the kernel; `kinds` are HAS_WINDOW, HAS_CAP and WIDEN."""
    kinds = {"HAS_WINDOW": False, "HAS_CAP": False, "WIDEN": False} | kinds
    sizes = {"GROUP": group, "HEAD_DIM": head_dim, "DIM": _padded(head_dim), "BLOCK_SIZE": block_size}
    return sizes | {"ROWS": tile.rows, "KEYS": tile.keys, "SPLIT": split} | kinds


def argument_types(dtype: str, *, split: bool) -> dict[str, str]:
    """What the kernel's other arguments are, for `compile_ahead`."""
    pointers = dict.fromkeys(("q", "k_cache", "v_cache"), f"*{dtype}:16")
    pointers |= dict.fromkeys(("block_tables", "query_starts", "seq_lens"), "*i64:16")
    pointers |= dict.fromkeys(("out", "stats"), "*fp32:16" if split else f"*{dtype}:16")
    strides = dict.fromkeys(("q_token", "q_head", "out_token", "kv_block", "kv_head_stride"), "i32:16")
    numbers = dict.fromkeys(NUMBERS, "i32")
    return pointers | strides | numbers | {"scale": "fp32", "soft_cap": "fp32"}


def needs_widening(dtype: torch.dtype) -> bool:
    """Triton's interpreter computes wrongly with bfloat16: there, what is read becomes float32 at once."""
    return dtype is torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
