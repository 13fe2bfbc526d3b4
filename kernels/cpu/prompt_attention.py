"""Attention of many queries to the same keys on the CPU: prompts, and what many sequences have in common.

What it computes: softmax(q·kᵀ·scale)·v, as `minillm.kernels.cpu.paged_attention` does, by the same online softmax, for
tiles of 64 keys and 48 or so rows (a row is a query of one head). Both products of a tile are matrix products
(`minillm.kernels.cpu.tiles`), and the scores between them never leave the first-level cache (Dao et al. 2022,
"FlashAttention", §3.1).

How it maps to the hardware: keys and values are first laid out for the products, once for all rows: of keys, the 64 of
a tile beside each other for each channel; of values, the channels beside each other for each key. In bfloat16, where
the processor multiplies pairs of them, two channels (two keys) share a word, and scores' exponentials are rounded to
bfloat16 as in FlashAttention; elsewhere all is laid out as float32. A tile, its rows and their sums stay in the
first-level cache. Tiles that no row of six sees are left out, and only those on the edge of what a row sees are masked.
The rows of a head are dealt out to threads in turn, so that those who see much are not all with one.

What bounds it: arithmetic.

Definition of right: `minillm.cache.reference.paged_attention`.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

from minillm.kernels.cpu.bfloat16 import read, write
from minillm.kernels.cpu.compiler import HAS_PAIRS
from minillm.kernels.cpu.fast_math import FASTMATH, LOG2_E, ONLY_PRANGE, exp2
from minillm.kernels.cpu.tiles import (
    KEYS,
    MASKED,
    NARROW,
    ROWS,
    WIDE,
    add_products_narrow,
    add_products_wide,
    products_wide,
    softmax_step,
)
from minillm.kernels.cpu.vectors import CACHE_LINE

ROWS_AT_A_TIME = 48
"""Rows that meet a tile together: they, their sums and the tile stay in the first-level cache."""
WORDS = {"float32": np.float32, "uint16": np.uint32 if HAS_PAIRS else np.float32}
"""What numbers are laid out as, by what they are stored as."""


def words_for(stored):
    """An empty array of the words that these numbers are laid out as."""
    return np.empty(0, WORDS[stored.dtype.name])


def in_a_word(words):  # pragma: no cover
    """How many numbers a word holds."""
    raise NotImplementedError("only inside compiled code")


@overload(in_a_word, inline="always")
def _in_a_word(words):
    count = 1 if words.dtype == types.float32 else 2
    return lambda words: count


def word(like, first, second):  # pragma: no cover
    """A word of two stored numbers, or of the first."""
    raise NotImplementedError("only inside compiled code")


@overload(word, inline="always")
def _word(like, first, second):
    if like.dtype == types.float32:
        return lambda like, first, second: read(first)
    return lambda like, first, second: np.uint32(first) | (np.uint32(second) << np.uint32(16))


@njit(nogil=True, cache=True)
def lay_out_tile(tile, count, k_cache, v_cache, blocks, kv_head, keys, values):
    """A tile's keys as ``[channels, KEYS]`` and values as ``[KEYS, channels]``; 0 behind the last of `count`."""
    block_size, head_dim = k_cache.shape[2], k_cache.shape[3]
    size, zero = in_a_word(keys), k_cache.dtype.type(0)
    start = tile * KEYS
    stop = min(KEYS, count - start)
    if stop < KEYS or head_dim < values.shape[1] or head_dim % size:
        keys[:], values[:] = 0, 0
    for t in range(stop):
        block, place = divmod(start + t, block_size)
        key = k_cache[blocks[block], kv_head, place]
        for d in range(0, head_dim, size):
            keys[d // size, t] = word(keys, key[d], key[d + size - 1] if d + size <= head_dim else zero)
    for t in range(0, stop, size):
        block, place = divmod(start + t, block_size)
        value = v_cache[blocks[block], kv_head, place]
        if size == 1 or t + 1 == stop:
            for d in range(head_dim):
                values[t // size, d] = word(values, value[d], zero)
        else:
            block, place = divmod(start + t + 1, block_size)
            following = v_cache[blocks[block], kv_head, place]
            for d in range(head_dim):
                values[t // size, d] = word(values, value[d], following[d])


@njit(inline="always")
def lay_out_query(query, words):
    """One row's query, as words."""
    size, head_dim = in_a_word(words), len(query)
    for d in range(0, head_dim, size):
        last = query[d + size - 1] if d + size <= head_dim else query.dtype.type(0)
        words[d // size] = word(words, query[d], last)


@njit(fastmath=FASTMATH, inline="always")
def cap_scores(scores, first, end, cap):
    """cap · tanh(s / cap), in units of ln 2; tanh by the exponential that we have."""
    for t in range(first, end):
        shrunk = exp2(np.float32(-2 * LOG2_E) * abs(scores[t]) / cap)
        capped = cap * np.float32(LOG2_E) * (np.float32(1) - shrunk) / (np.float32(1) + shrunk)
        scores[t] = capped if scores[t] > 0 else -capped


@njit(fastmath=FASTMATH, nogil=True, cache=True, error_model="numpy")
def attend_rows(queries, lows, highs, keys, values, scale, cap, largest, total, sums):
    """The online softmax of a multiple of `ROWS` rows, of which each sees the keys low ≤ key < high.

    Leaves in sums the weighted sums of values, whose weights' sum is total, relative to 2 to the power of largest.
    """
    scores, shrink = np.empty((ROWS, KEYS), np.float32), np.empty(ROWS, np.float32)
    weights = np.empty((ROWS, values.shape[1]), values.dtype)
    width = sums.shape[1]
    largest[:], total[:], sums[:] = MASKED, 0, 0
    groups = len(queries) // ROWS
    lowest, highest = np.empty((groups, 2), np.int64), np.empty((groups, 2), np.int64)
    for group in range(groups):
        some = slice(group * ROWS, (group + 1) * ROWS)
        lowest[group] = lows[some].min(), lows[some].max()
        highest[group] = highs[some].min(), highs[some].max()
    end = -(-highest[:, 1].max() // KEYS)
    for tile in range(lowest[:, 0].min() // KEYS, end):
        start = tile * KEYS
        tile_keys, tile_values = keys[tile], values[tile]
        next_keys, next_values = keys[min(tile + 1, end - 1)].ctypes.data, values[min(tile + 1, end - 1)].ctypes.data
        for group in range(groups):
            if highest[group, 1] <= start or lowest[group, 0] >= start + KEYS:
                continue
            row = group * ROWS
            for column in range(0, KEYS, WIDE):
                products_wide(queries, row, tile_keys, column, shrink, scores, 0, next_keys)
            next_keys += keys.shape[1] * CACHE_LINE
            factor = scale
            if cap > 0:
                for i in range(ROWS):
                    for t in range(KEYS):
                        scores[i, t] *= scale
                    cap_scores(scores[i], 0, KEYS, cap)
                factor = np.float32(1)
            if lowest[group, 1] > start or highest[group, 0] < start + KEYS:
                for i in range(ROWS):
                    scores[i, : max(0, min(KEYS, lows[row + i] - start))] = MASKED
                    scores[i, max(0, min(KEYS, highs[row + i] - start)) :] = MASKED
            for i in range(ROWS):
                softmax_step(scores, i, factor, row + i, largest, total, shrink, weights)
            whole = width // WIDE * WIDE
            for column in range(0, whole, WIDE):
                add_products_wide(weights, 0, tile_values, column, shrink, sums, row, next_values)
            for column in range(whole, width, NARROW):
                add_products_narrow(weights, 0, tile_values, column, shrink, sums, row, next_values)
            next_values += values.shape[1] * CACHE_LINE


@njit(nogil=True, cache=True, parallel=ONLY_PRANGE)
def lay_out(words, first, count, k_cache, v_cache, blocks):
    """The first `count` keys and values of these blocks, for all heads, tile by tile; not those before tile `first`."""
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    tiles, size, width = -(-count // KEYS), in_a_word(words), -(-head_dim // NARROW) * NARROW
    keys = np.empty((kv_heads, tiles, -(-head_dim // size), KEYS), words.dtype)
    values = np.empty((kv_heads, tiles, KEYS // size, width), words.dtype)
    for number in prange(kv_heads * (tiles - first)):
        head, tile = divmod(np.int64(number), tiles - first)
        tile += first
        lay_out_tile(tile, count, k_cache, v_cache, blocks, head, keys[head, tile], values[head, tile])
    return keys, values


@njit(nogil=True, cache=True)
def _attend_some(tokens, seen, window, q, kv_head, keys, values, scale, cap):
    """These tokens' queries of one head's group, of which each sees so many keys from the front, or a window of them.

    A row for each query of each token: see `attend_rows`.
    """
    group = q.shape[1] // keys.shape[0]
    count = len(tokens) * group
    padded = -(-count // ROWS) * ROWS
    queries = np.zeros((padded, keys.shape[2]), keys.dtype)
    lows, highs = np.empty(padded, np.int64), np.empty(padded, np.int64)
    for row in range(padded):
        at = min(row, count - 1) // group
        highs[row], lows[row] = seen[at], max(0, seen[at] - window)
        if row < count:
            lay_out_query(q[tokens[at], kv_head * group + row % group], queries[row])
    largest, total = np.empty(padded, np.float32), np.empty(padded, np.float32)
    sums = np.empty((padded, values.shape[3]), np.float32)
    attend_rows(queries, lows, highs, keys[kv_head], values[kv_head], scale, cap, largest, total, sums)
    return largest, total, sums


@njit(nogil=True, cache=True)
def _attend_piece(first, last, before, window, q, kv_head, keys, values, scale, cap, out):
    """The queries first ≤ i < last of a sequence, of which `before` keys come before q[0]'s own."""
    group, tokens = q.shape[1] // keys.shape[0], np.arange(first, last)
    _, total, sums = _attend_some(tokens, before + tokens + 1, window, q, kv_head, keys, values, scale, cap)
    for row in range(len(tokens) * group):
        target, share = out[first + row // group, kv_head * group + row % group], np.float32(1) / total[row]
        for d in range(len(target)):
            target[d] = write(target[d], sums[row, d] * share)


@njit(nogil=True, cache=True, parallel=ONLY_PRANGE)
def attend_prompt(threads, words, q, k_cache, v_cache, blocks, length, window, scale, cap, out):
    """A sequence's last queries, each against the keys up to its own; `length` is that of the whole sequence.

    Args:
        words: `words_for` the cache.
        q, out: ``[queries, heads, head_dim]``, as they are stored.
        blocks: where the sequence lies.
        window: how far a query looks back.
        scale, cap: as `minillm.kernels.cpu.paged_attention` takes them.
    """
    count, kv_heads = len(q), k_cache.shape[1]
    first_tile = max(0, length - count + 1 - window) // KEYS
    keys, values = lay_out(words, first_tile, length, k_cache, v_cache, blocks)
    at_a_time = max(1, ROWS_AT_A_TIME * kv_heads // q.shape[1])
    pieces = -(-count // at_a_time)
    for part in prange(threads):
        for number in range(part, kv_heads * pieces, threads):
            head, piece = divmod(number, pieces)
            first, last = piece * at_a_time, min(count, (piece + 1) * at_a_time)
            _attend_piece(first, last, length - count, window, q, head, keys, values, scale, cap, out)


@njit(nogil=True, cache=True)
def _attend_to_common(tokens, count, q, kv_head, keys, values, scale, cap, lse, mean):
    group, seen = q.shape[1] // keys.shape[0], np.full(len(tokens), count)
    largest, total, sums = _attend_some(tokens, seen, count, q, kv_head, keys, values, scale, cap)
    for row in range(len(tokens) * group):
        token, head = tokens[row // group], kv_head * group + row % group
        lse[token, head] = largest[row] + np.log2(total[row])
        target, share = mean[token, head], np.float32(1) / total[row]
        for d in range(len(target)):
            target[d] = sums[row, d] * share


@njit(nogil=True, cache=True, parallel=ONLY_PRANGE)
def attend_to_common(words, tokens, q, k_cache, v_cache, blocks, scale, cap, lse, mean):
    """These tokens' queries against all keys of these blocks: log₂ of the sum of 2^score, and the mean value."""
    kv_heads, count = k_cache.shape[1], len(blocks) * k_cache.shape[2]
    keys, values = lay_out(words, 0, count, k_cache, v_cache, blocks)
    at_a_time = max(1, ROWS_AT_A_TIME * kv_heads // q.shape[1])
    pieces = -(-len(tokens) // at_a_time)
    for number in prange(kv_heads * pieces):
        head, piece = divmod(np.int64(number), pieces)
        some = tokens[piece * at_a_time : (piece + 1) * at_a_time]
        _attend_to_common(some, count, q, head, keys, values, scale, cap, lse, mean)
