"""Paged attention on the CPU: each query against its sequence's keys and values, read where they lie.

What it computes: softmax(q·kᵀ·scale)·v, over the blocks that a sequence's block table names (Kwon et al. 2023,
"PagedAttention", §4.1). `minillm.cache.reference` copies the blocks into one stretch first; here nothing is copied.

The algorithm is the online softmax (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", §3): a tile
of keys is one block, and for each query row three things are carried from tile to tile: the largest score so far, the
sum of exponentials, and the weighted sum of values, both relative to that largest score.

How it maps to the hardware:

- A tile [key, channel] is contiguous, some KiB, and stays in first-level cache while all query heads of its group meet
  it.
- Scores are computed for four keys and all queries of a group (up to three or four) at a time, values are added for all
  queries at a time: keys and values are read, and widened from bfloat16, once for the group, and the sums stay in
  registers (`minillm.kernels.cpu.vectors`). On two cores without AVX-512, a tile and head took 336 ns with one query at
  a time and takes 268; in bfloat16 284 and 199.
- While a tile is worked on, the next one is asked for, some rows at a time. The blocks of a table lie anywhere, so that
  the hardware cannot guess it, and asking for all of it at once would fill the queue to memory and stop the arithmetic.
  Measured: 1.73 ms without asking, 1.50 all at once, 0.94 in between (64 sequences, float32, from memory).
- Work is divided by blocks, not by sequences: all tokens' blocks are laid end to end and cut into as many equal parts
  as there are threads (the idea of Osama et al. 2023, "Stream-K", for matrix products). A token that a cut goes through
  has several partial results, which are merged (Dao et al. 2023, "Flash-Decoding"). So one long sequence keeps all
  cores busy, and a batch of unequal ones ends everywhere at once.
- Blocks that all sequences begin with (a system prompt, found by prefix caching) are read once for many: the queries of
  all sequences meet a tile together, as if they were one large group (Juravsky et al. 2024, "Hydragen", §3). The online
  softmax of each query then begins with what that came to, instead of with nothing.
- Where registers have 512 bits, blocks of 16 keys and heads of 64, 128, … channels are attended to in one stretch of
  vectors (`minillm.kernels.cpu.tiles`), in bfloat16 by instructions that multiply pairs: 34 sequences of 200 keys took
  267 µs a layer and take 206.

What bounds it: reading keys and values, each used for one group of queries. docs/benchmarks.md has how near it comes.

Sequences that bring many queries (a prompt, or a long piece of one), and what sequences have in common, are matrix
products: `minillm.kernels.cpu.prompt_attention`, from `MANY_QUERIES` and `MANY_SCORES` on.

Definition of right: `minillm.cache.reference.paged_attention`.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numba import njit, prange, types
from numba.extending import overload
from torch import Tensor

from minillm.cache import reference
from minillm.kernels.cpu.bfloat16 import DTYPES, bits, read, write
from minillm.kernels.cpu.compiler import HAS_512_BITS, HAS_PAIRS
from minillm.kernels.cpu.fast_math import FASTMATH, LOG2_E, ONLY_PRANGE, exp2, use_torch_threads
from minillm.kernels.cpu.prompt_attention import (
    attend_prompt,
    attend_to_common,
    cap_scores,
    words_for,
)
from minillm.kernels.cpu.tiles import (
    BLOCK,
    CHANNELS,
    attend_to_block_1,
    attend_to_block_2,
    attend_to_block_3,
    attend_to_block_4,
)
from minillm.kernels.cpu.tiles import words as in_words
from minillm.kernels.cpu.vectors import (
    HEADS_AT_A_TIME,
    KEYS_AT_A_TIME,
    LANES,
    add_weighted_1,
    add_weighted_2,
    add_weighted_3,
    add_weighted_4,
    dots_of_1,
    dots_of_2,
    dots_of_3,
    dots_of_4,
    prefetch,
)

FAR = np.iinfo(np.int64).max // 2
"""A window that hides nothing."""
MANY_QUERIES, MANY_SCORES = 16, 2**14
"""So many queries of one sequence, with so many scores (queries × keys), are matrix products."""
MIN_SHARED = 8192
"""Queries × common keys, from which on reading them once for all pays."""
MIN_TILES_PER_THREAD = 48
"""Fewer are done before another thread has woken up."""


@njit(fastmath=FASTMATH, inline="always")
def _scores(queries, begin, end, keys, first, last, scores, coming):
    """scores[h, t] = queries[h] · keys[t], for begin ≤ h < end, first ≤ t < last; `coming` is asked for on the way."""
    head_dim = queries.shape[1]
    whole = head_dim // LANES * LANES if head_dim >= LANES else 0
    fours = first + (last - first) // KEYS_AT_A_TIME * KEYS_AT_A_TIME if whole else first
    for t in range(first, fours, KEYS_AT_A_TIME):
        for row in range(t, t + KEYS_AT_A_TIME):
            prefetch(coming[row])
        head = begin
        while head < end:
            left = min(end - head, HEADS_AT_A_TIME)
            if left == 4:
                dots_of_4(queries, head, keys, t, whole, scores)
            elif left == 3:
                dots_of_3(queries, head, keys, t, whole, scores)
            elif left == 2:
                dots_of_2(queries, head, keys, t, whole, scores)
            else:
                dots_of_1(queries, head, keys, t, whole, scores)
            head += left
    for head in range(begin, end):
        q = queries[head]
        for t in range(first, last):
            start = whole if t < fours else 0
            if start < head_dim:
                key, score = keys[t], scores[head, t] if start else np.float32(0)
                for d in range(start, head_dim):
                    score += q[d] * read(key[d])
                scores[head, t] = score


@njit(fastmath=FASTMATH, inline="always")
def _add_values(weights, begin, end, values, first, last, shrink, sums, coming):
    """sums[h] = shrink[h] · sums[h] + Σ weights[h, t] · values[t], for begin ≤ h < end, first ≤ t < last; asks for
    `coming` on the way."""
    head_dim = sums.shape[1]
    whole = head_dim // (2 * LANES) * (2 * LANES)
    for dim in range(0, whole, 2 * LANES):
        for row in range(len(coming) * dim // whole, len(coming) * (dim + 2 * LANES) // whole):
            prefetch(coming[row])
        head = begin
        while head < end:
            left = min(end - head, HEADS_AT_A_TIME)
            if left == 4:
                add_weighted_4(weights, head, values, first, last, dim, shrink, sums)
            elif left == 3:
                add_weighted_3(weights, head, values, first, last, dim, shrink, sums)
            elif left == 2:
                add_weighted_2(weights, head, values, first, last, dim, shrink, sums)
            else:
                add_weighted_1(weights, head, values, first, last, dim, shrink, sums)
            head += left
    if whole < head_dim:
        for head in range(begin, end):
            for d in range(whole, head_dim):
                sums[head, d] *= shrink[head]
            for t in range(first, last):
                weight, value = weights[head, t], values[t]
                for d in range(whole, head_dim):
                    sums[head, d] += weight * read(value[d])


@njit(fastmath=FASTMATH, nogil=True, cache=True, error_model="numpy")
def _attend_tile(
    queries, begin, end, keys, values, first, last, cap, weights, largest, total, shrink, sums, next_keys, next_values
):  # fmt: skip
    """The online softmax's next step, for the queries begin ≤ h < end and the tile's keys first ≤ t < last."""
    _scores(queries, begin, end, keys, first, last, weights, next_keys)
    for head in range(begin, end):
        row = weights[head]
        if cap > 0:
            cap_scores(row, first, last, cap)
        best = largest[head]
        for t in range(first, last):
            best = max(best, row[t])
        shrink[head] = exp2(largest[head] - best)
        added = np.float32(0)
        for t in range(first, last):
            row[t] = exp2(row[t] - best)
            added += row[t]
        largest[head], total[head] = best, total[head] * shrink[head] + added
    _add_values(weights, begin, end, values, first, last, shrink, sums, next_values)


def _takes_blocks(k_cache, cap):  # pragma: no cover
    """Whether `_attend_block` is for such a cache, and such scores."""
    raise NotImplementedError("only inside compiled code")


@overload(_takes_blocks, inline="always")
def _takes_blocks_here(k_cache, cap):
    if not HAS_512_BITS or not (k_cache.dtype == types.float32 or HAS_PAIRS):
        return lambda k_cache, cap: False
    return lambda k_cache, cap: cap == 0 and k_cache.shape[2] == BLOCK and k_cache.shape[3] % CHANNELS == 0


def _attend_block(queries, begin, end, k_cache, v_cache, place, scale, state):  # pragma: no cover
    """`_attend_tile` of a block.

    Args:
        place: the block, its head, the block that comes next, and first and last key.
        state: largest, total, weights and sums.
    """
    raise NotImplementedError("only inside compiled code")


@overload(_attend_block, inline="always")
def _attend_block_here(queries, begin, end, k_cache, v_cache, place, scale, state):
    def skip(queries, begin, end, k_cache, v_cache, place, scale, state):
        pass

    def attend_block(queries, begin, end, k_cache, v_cache, place, scale, state):
        head = begin
        while head < end:
            left = min(end - head, 4)
            if left == 4:
                attend_to_block_4(queries, head, k_cache, v_cache, *place, scale, *state)
            elif left == 3:
                attend_to_block_3(queries, head, k_cache, v_cache, *place, scale, *state)
            elif left == 2:
                attend_to_block_2(queries, head, k_cache, v_cache, *place, scale, *state)
            else:
                attend_to_block_1(queries, head, k_cache, v_cache, *place, scale, *state)
            head += left

    return attend_block if HAS_512_BITS and (k_cache.dtype == types.float32 or HAS_PAIRS) else skip


@njit(fastmath=FASTMATH, inline="always")
def _finish(out, token, total, mean):
    """Write a token's result."""
    for head in range(len(total)):
        target, share = out[token, head], np.float32(1) / total[head]
        for d in range(mean.shape[1]):
            target[d] = write(target[d], mean[head, d] * share)


@njit(fastmath=FASTMATH, nogil=True, cache=True, error_model="numpy")
def _attend_part(
    part, parts, words, q, k_cache, v_cache, tables, seqs, lengths, ends, window, shared, common_lse, common_mean,
    scale, cap, out, tokens, stats, means
):  # fmt: skip
    """One thread's blocks. A token that begins or ends in another part is left as partial result 0 or 1."""
    _, kv_heads, block_size, head_dim = k_cache.shape
    heads = q.shape[1]
    group = heads // kv_heads
    query, mean = np.empty((heads, head_dim), np.float32), np.empty((heads, head_dim), np.float32)
    weights, weight_words = np.empty((heads, block_size), np.float32), np.empty((heads, block_size), words.dtype)
    takes_blocks = _takes_blocks(k_cache, cap)
    queries = in_words(q if takes_blocks else np.empty((0, heads, 2), q.dtype))
    largest, total, shrink = np.empty(heads, np.float32), np.empty(heads, np.float32), np.empty(heads, np.float32)
    tokens[part, 0] = tokens[part, 1] = -1
    at, stop = ends[-1] * part // parts, ends[-1] * (part + 1) // parts
    token = np.searchsorted(ends, at, "right") - 1
    while at < stop:
        length, table = lengths[token], tables[seqs[token]]
        seen = max(shared * block_size, length - window)
        first_block = seen // block_size
        begin, end = first_block + at - ends[token], first_block + min(ends[token + 1], stop) - ends[token]
        largest[:], total[:], mean[:] = -np.inf, 0, 0
        if not takes_blocks:
            for head in range(heads):
                for d in range(head_dim):
                    query[head, d] = read(q[token, head, d]) * scale
        if shared and at == ends[token]:
            for head in range(heads):
                largest[head], total[head] = common_lse[token, head], 1
                mean[head] = common_mean[token, head]
        for number in range(begin, end):
            first, last = max(0, seen - number * block_size), min(block_size, length - number * block_size)
            block, coming = table[number], table[min(number + 1, end - 1)]
            for kv_head in range(kv_heads):
                head, end_head = kv_head * group, (kv_head + 1) * group
                if takes_blocks:
                    where, state = (block, kv_head, coming, first, last), (largest, total, weight_words, mean)
                    _attend_block(queries[token], head, end_head, k_cache, v_cache, where, scale, state)
                else:
                    _attend_tile(
                        query, head, end_head, k_cache[block, kv_head], v_cache[block, kv_head], first, last, cap,
                        weights, largest, total, shrink, mean, k_cache[coming, kv_head], v_cache[coming, kv_head]
                    )  # fmt: skip
        if end - begin == ends[token + 1] - ends[token]:
            _finish(out, token, total, mean)
        else:
            place = 0 if at > ends[token] else 1
            tokens[part, place] = token
            stats[part, place, 0], stats[part, place, 1], means[part, place] = largest, total, mean
        at += end - begin
        while token + 1 < len(lengths) and at >= ends[token + 1]:
            token += 1


@njit(fastmath=FASTMATH, nogil=True, cache=True, error_model="numpy")
def _merge(out, tokens, stats, means):
    """Put the partial results of each token together; those of one token follow each other."""
    token = -1
    largest, total, mean = stats[0, 0, 0].copy(), stats[0, 0, 1].copy(), means[0, 0].copy()
    for part in range(len(tokens)):
        for place in range(2):
            if tokens[part, place] < 0:
                continue
            if tokens[part, place] != token:
                if token >= 0:
                    _finish(out, token, total, mean)
                token = tokens[part, place]
                largest[:], total[:], mean[:] = stats[part, place, 0], stats[part, place, 1], means[part, place]
                continue
            for head in range(len(largest)):
                best = max(largest[head], stats[part, place, 0, head])
                ours, theirs = exp2(largest[head] - best), exp2(stats[part, place, 0, head] - best)
                largest[head], total[head] = best, total[head] * ours + stats[part, place, 1, head] * theirs
                for d in range(mean.shape[1]):
                    mean[head, d] = mean[head, d] * ours + means[part, place, head, d] * theirs
    if token >= 0:
        _finish(out, token, total, mean)


@njit(nogil=True, cache=True, parallel=ONLY_PRANGE)
def _attend(
    parts, words, q, k_cache, v_cache, tables, seqs, lengths, ends, window, common, few, scale, cap, out
):  # fmt: skip
    """All tokens of sequences with few queries; `few` are their numbers, `common` the blocks that they begin with."""
    count, heads, head_dim = q.shape
    lse, mean = np.empty((count, heads), np.float32), np.empty((count, heads, head_dim), np.float32)
    if len(common):
        attend_to_common(words, few, q, k_cache, v_cache, common, scale, cap, lse, mean)
    tokens, stats = np.empty((parts, 2), np.int64), np.empty((parts, 2, 2, heads), np.float32)
    means = np.empty((parts, 2, heads, head_dim), np.float32)
    for part in prange(parts):
        _attend_part(
            part, parts, words, q, k_cache, v_cache, tables, seqs, lengths, ends, window, len(common), lse, mean,
            scale, cap, out, tokens, stats, means
        )  # fmt: skip
    _merge(out, tokens, stats, means)


@njit(nogil=True, cache=True)
def _are_many(queries, keys):
    """Whether a sequence's queries are left to matrix products."""
    return queries >= MANY_QUERIES and queries * keys >= MANY_SCORES


@njit(nogil=True, cache=True)
def _rows(query_starts, seq_lens, window, block_size, shared):
    """For every query token of a sequence with few: its sequence, how much it sees from the front, tiles so far."""
    tokens = query_starts[-1]
    seqs, lengths = np.zeros(tokens, np.int64), np.zeros(tokens, np.int64)
    ends = np.zeros(tokens + 1, np.int64)
    for seq in range(len(seq_lens)):
        start, end = query_starts[seq], query_starts[seq + 1]
        for token in range(start, end):
            length = seq_lens[seq] - (end - 1 - token)
            seqs[token], lengths[token] = seq, length
            tiles = -(-length // block_size) - max(shared, (length - window) // block_size)
            ends[token + 1] = ends[token] + (0 if _are_many(end - start, seq_lens[seq]) else max(0, tiles))
    return seqs, lengths, ends


@njit(nogil=True, cache=True)
def _shared_blocks(tables, query_starts, seq_lens, block_size):
    """What all sequences with few queries begin with, before their queries: the first such sequence, and of its blocks
    how many."""
    first, shared = -1, 0
    for seq in range(len(seq_lens)):
        queries = query_starts[seq + 1] - query_starts[seq]
        if _are_many(queries, seq_lens[seq]):
            continue
        before = (seq_lens[seq] - queries) // block_size
        if first < 0:
            first, shared = seq, before
        shared = min(shared, before)
        for block in range(shared):
            if tables[seq, block] != tables[first, block]:
                shared = block
                break
    return first, max(shared, 0)


NOTHING = np.empty(0, np.int64)


class Plan(NamedTuple):
    """What all layers of a step have in common, worked out once.

    Attributes:
        tables: the step's block tables.
        many: of each sequence with many queries: its number, where its queries begin and end, and its keys.
        seqs, lengths, ends: of each query of the others (see `_rows`).
        tiles: blocks that those have together.
        window: how far a token looks back, or `FAR`.
        shared: the blocks that those begin with, all of them, where there is enough in common.
        few: the numbers of their queries, where there is.
    """

    tables: Any
    many: list[tuple[int, int, int, int]]
    seqs: Any
    lengths: Any
    ends: Any
    tiles: int
    window: int
    shared: Any
    few: Any


def plan(
    block_tables: Int[Tensor, "seqs max_blocks"],
    query_starts: Int[Tensor, "seqs_and_one"],
    seq_lens: Int[Tensor, "seqs"],
    *,
    block_size: int,
    max_query_len: int,
    window: int | None,
) -> Plan:
    """How to attend in a step, for all layers with this window."""
    far = FAR if window is None else window
    many = []
    if max_query_len >= MANY_QUERIES:
        edges = enumerate(itertools.pairwise(query_starts.tolist()))
        keys = seq_lens.tolist()
        many = [(seq, start, end, keys[seq]) for seq, (start, end) in edges if _are_many(end - start, keys[seq])]
    # Contiguous, else Numba compiles once more, for rows that are not.
    tables, starts, lens = np.ascontiguousarray(block_tables.numpy()), query_starts.numpy(), seq_lens.numpy()
    first, shared = _shared_blocks(tables, starts, lens, block_size) if window is None else (0, 0)
    queries = int(starts[-1]) - sum(end - start for _, start, end, _ in many)
    if queries * shared * block_size < MIN_SHARED:
        shared = 0
    seqs, lengths, ends = _rows(starts, lens, far, block_size, shared)
    common, few = (tables[first, :shared], np.flatnonzero(np.diff(ends))) if shared else (NOTHING, NOTHING)
    return Plan(tables, many, seqs, lengths, ends, int(ends[-1]), far, common, few)


def attend(
    q: Float[Tensor, "tokens heads head_dim"],
    k_cache: Float[Tensor, "blocks kv_heads block_size head_dim"],
    v_cache: Float[Tensor, "blocks kv_heads block_size head_dim"],
    plan: Plan,
    *,
    scale: float,
    soft_cap: float | None = None,
) -> Float[Tensor, "tokens heads head_dim"]:
    """`paged_attention` of one layer of a step."""
    out = torch.zeros(q.shape, dtype=q.dtype)  # where a sequence has no keys
    factors = np.float32(scale * (1.0 if soft_cap is not None else LOG2_E)), np.float32(soft_cap or 0.0)
    arrays = bits(k_cache), bits(v_cache)
    for seq, start, end, keys in plan.many:
        attend_prompt(
            use_torch_threads(), words_for(arrays[0]), bits(q[start:end].contiguous()), *arrays,
            plan.tables[seq], keys, plan.window, *factors, bits(out[start:end])
        )  # fmt: skip
    if plan.tiles:
        _attend(
            max(1, min(use_torch_threads(), plan.tiles * k_cache.shape[1] // MIN_TILES_PER_THREAD)),
            words_for(arrays[0]),
            bits(q.contiguous()),
            *arrays,
            plan.tables,
            plan.seqs,
            plan.lengths,
            plan.ends,
            plan.window,
            plan.shared,
            plan.few,
            *factors,
            bits(out),
        )
    return out


def supports(q: Tensor, k_cache: Tensor) -> bool:
    """Whether the kernel takes these: on the CPU, all float32 or all bfloat16."""
    return q.device.type == "cpu" and q.dtype is k_cache.dtype and q.dtype in DTYPES


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
    """As `minillm.cache.reference.paged_attention`, which it falls back to for numbers that it does not take."""
    batch = (block_tables, query_starts, seq_lens)
    if not supports(q, k_cache):
        return reference.paged_attention(
            q, k_cache, v_cache, *batch, max_query_len=max_query_len, scale=scale, window=window, soft_cap=soft_cap
        )
    step = plan(*batch, block_size=k_cache.shape[2], max_query_len=max_query_len, window=window)
    return attend(q, k_cache, v_cache, step, scale=scale, soft_cap=soft_cap)
