# %% [markdown]
# # Assignment 5 · Paged attention
#
# You write the attention of a serving engine: over keys and values that lie in scattered blocks, without ever holding
# all scores. First on a single row of scores, then over a block table, then as a kernel for a graphics card. At the
# end the engine tells a story with what you have written.
#
# **Goals.** When you are done, you can
#
# - compute a softmax over scores that come in pieces, each seen once;
# - write attention over a block table, with grouped heads and a partly filled last block;
# - merge what two workers have found out about two halves of a text;
# - write a Triton kernel with program ids, masks and tiles, and test it without a GPU.
#
# **You need** notebooks 08 (blocks and block tables), 09 (paged attention) and, for task 5, 10 (sections 2 and 4). No
# GPU. Linux, since Triton runs there (on Windows, in WSL). **Time**: 90 to 120 minutes.
#
# | task | cells that are graded | points |
# | --- | --- | --- |
# | 1 · a softmax in pieces | `online_sum` | 10 |
# | 2 · attention in pieces | `add_block` | 15 |
# | 3 · over a block table | `paged_decode` | 20 |
# | 4 · two workers | `merge`, `merge_empty` | 10 + 5 |
# | 5 · the kernel | `kernel_one_tile`, `kernel` | 10 + 10 |
# | 6 · in the engine | `engine`, `engine_kernel` | 10 + 10 |
#
# **How it works.** Put your code in the place of `raise NotImplementedError()`. Below each task is a cell with checks.
# Run it as often as you like; it says what is wrong and where. When it is graded, further checks are run, with random
# numbers that are new each time. Each task is checked on its own: where a later task calls an earlier function, a right
# one is lent for the time of the check. While your function runs, the package's attention and PyTorch's `softmax` are
# closed.
#
# The first cell must come first: Triton asks whether to interpret when it is imported.

# %% tags=["locked:setup"]
import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

from collections.abc import Iterable
from math import ceil, inf, log, nan
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm import LLM, SamplingParams
from minillm.cache import reference
from minillm.cache.backends import AttentionBackend
from minillm.course.partial_attention import Partial, nothing

# %% [markdown]
# ## Task 1 · A softmax in pieces (10 points)
#
# The weights of a softmax are $e^{s_i - m} / \ell$ with $m = \max_j s_j$ and $\ell = \sum_j e^{s_j - m}$. Subtracting
# $m$ keeps the exponentials from overflowing. But the scores of a long text come in pieces, and each piece shall be
# seen once. Milakov and Gimelshein 2018 ("Online normalizer calculation for softmax", §3, algorithm 3) carry two
# numbers along:
#
# - the largest score *so far*;
# - the sum of $e^{s - m}$ of the scores so far, relative to that largest one. When a larger one turns up, the old sum
#   is corrected.
#
# **Write** `online_sum(pieces)`: `pieces` gives tensors `[n]` of float32, n ≥ 1, one after the other; return the pair
# `(largest, total)` of tensors `[]`.
#
# **By hand.** Take the logarithms of 2 and 8, then of 4, then of 16, so that the exponentials are easy:
#
# | piece | largest | total |
# | --- | --- | --- |
# | log 2, log 8 | log 8 | 2/8 + 8/8 = 1.25 |
# | log 4 | log 8 | 1.25 + 4/8 = 1.75 |
# | log 16 | log 16 | 1.75 · 8/16 + 16/16 = 1.875 |
#
# And indeed (2 + 8 + 4 + 16) / 16 = 1.875.
#
# *Hints.* Begin with a largest score of −∞ and a sum of 0: $e^{-\infty - m} = 0$. A `for` loop over `pieces` is
# enough, and it may be gone through once only: as soon as the next piece is asked for, the one before is overwritten.


# %% tags=["solution:my_online_sum"]
def online_sum(pieces: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The largest of all scores, and the sum of exp(score - largest); each piece is seen once."""
    ### BEGIN SOLUTION
    largest, total = torch.tensor(-inf), torch.tensor(0.0)
    for scores in pieces:
        best = torch.maximum(largest, scores.max())
        total = total * (largest - best).exp() + (scores - best).exp().sum()
        largest = best
    return largest, total
    ### END SOLUTION


# %% tags=["tests:online_sum:10"]
from minillm.course.check_paged_attention import check_online_sum

by_hand = [torch.tensor([2.0, 8.0]).log(), torch.tensor([4.0]).log(), torch.tensor([16.0]).log()]
check_online_sum(online_sum, by_hand[:1], "This is a single piece.")
check_online_sum(online_sum, by_hand[:2], "The second piece has no new largest score.")
check_online_sum(online_sum, by_hand, "Is the old sum multiplied by exp(old largest − new largest)?")
large = [torch.tensor([100.0, 90.0]), torch.tensor([99.0])]
check_online_sum(online_sum, large, "exp(89) is infinite in float32: subtract first.")
### BEGIN HIDDEN TESTS
import secrets

seed = secrets.randbelow(10**9)
torch.manual_seed(seed)
for level in (0, 150, -150):
    fresh = [level + 3 * torch.randn(size) for size in torch.randint(1, 9, (12,)).tolist()]
    where = f"(Scores around {level}, fresh numbers, seed {seed}.)"
    check_online_sum(online_sum, fresh, f"Is the old sum corrected? {where}")
    fresh.sort(key=lambda piece: piece.max())
    check_online_sum(online_sum, fresh, f"Every piece has a new largest score. {where}")
    check_online_sum(online_sum, fresh[::-1], f"The first piece has the largest score. {where}")
### END HIDDEN TESTS
print("right")

# %% [markdown]
# ## Task 2 · Attention in pieces (15 points)
#
# Attention wants the weighted sum of the values, not the weights. FlashAttention (Dao et al. 2022, §3.1) carries it
# along in the same way: a third quantity, relative to the same largest score and corrected by the same factor. As in
# notebook 09, the three are one thing:
#
# ```python
# class Partial(NamedTuple):
#     largest: Tensor   # [rows]
#     total: Tensor     # [rows]            sum of exp(score − largest)
#     weighted: Tensor  # [rows, head_dim]  sum of exp(score − largest) · value
#
# nothing(rows, head_dim)  # before the first key: −inf, 0, 0
# ```
#
# A *row* is a query. We take several at once, since the query heads of a group meet the same keys; each row has its own
# largest score.
#
# **Write** `add_block(done, queries, keys, values)`: return the `Partial` after one more block. `queries` is
# `[rows, head_dim]` and scaled already, `keys` and `values` are `[tokens, head_dim]`. Do not change what you are given.
#
# **By hand.** One query (1, 0). A first block with the keys (log 2, 0) and (log 8, 0) and the values (1, 0) and (0, 1);
# a second one with the key (log 16, 0) and the value (1, 1):
#
# | block | largest | total | weighted |
# | --- | --- | --- | --- |
# | first | log 8 | 2/8 + 8/8 = 1.25 | 2/8 · (1, 0) + (0, 1) = (0.25, 1) |
# | second | log 16 | 1.25 · 8/16 + 1 = 1.625 | (0.25, 1) · 8/16 + (1, 1) = (1.125, 1.5) |
#
# The output, `weighted / total`, is (18/26, 24/26), as it should be: the weights are 2/26, 8/26 and 16/26.
#
# *Hints.* The scores are `[rows, tokens]`, one matrix product. A factor `[rows]` becomes a column by `[:, None]`.


# %% tags=["solution:my_add_block"]
def add_block(done: Partial, queries: Tensor, keys: Tensor, values: Tensor) -> Partial:
    """`done`, and one more block."""
    ### BEGIN SOLUTION
    scores = queries @ keys.T  # [rows, tokens]
    largest = torch.maximum(done.largest, scores.amax(dim=1))
    shrink = (done.largest - largest).exp()
    weights = (scores - largest[:, None]).exp()
    weighted = done.weighted * shrink[:, None] + weights @ values
    return Partial(largest, done.total * shrink + weights.sum(dim=1), weighted)
    ### END SOLUTION


# %% tags=["tests:add_block:15"]
from minillm.course.check_paged_attention import check_add_block

keys = torch.tensor([[log(2), 0.0], [log(8), 0.0], [log(16), 0.0]])
values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
one_row, two_rows = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
hint = "Are total and weighted corrected by the same factor?"
check_add_block(add_block, one_row, keys, values, [2, 1], hint)
check_add_block(add_block, two_rows, keys, values, [2, 1], "Each row has a largest score of its own.")
### BEGIN HIDDEN TESTS
import secrets

seed = secrets.randbelow(10**9)
torch.manual_seed(seed)
for rows, head_dim in ((1, 8), (3, 16), (4, 5)):
    sizes = torch.randint(1, 7, (6,)).tolist()
    queries, keys, values = (torch.randn(count, head_dim) for count in (rows, sum(sizes), sum(sizes)))
    hint = f"Is what was there corrected? (Fresh numbers, seed {seed}.)"
    check_add_block(add_block, queries, keys, values, sizes, hint)
    queries, keys = torch.zeros(rows, head_dim), torch.randint(130, 170, (sum(sizes), head_dim)).float()
    queries[:, 0] = torch.randint(1, 3, (rows,)).float()  # whole numbers: scores without rounding
    hint = f"The scores are above 100: subtract before exp. (Fresh numbers, seed {seed}.)"
    check_add_block(add_block, queries, keys, values, sizes, hint)
### END HIDDEN TESTS
print("right")

# %% [markdown]
# ## Task 3 · Over a block table (20 points)
#
# Now the keys lie in blocks of a pool, and a block table says which. Token $i$ of a sequence is in block
# `table[i // block_size]`, at place `i % block_size` (Kwon et al. 2023, "PagedAttention", §4.1 and §4.2). Several
# sequences decode at once, and each brings one query per head.
#
# | argument | shape | |
# | --- | --- | --- |
# | `q` | `[seqs, heads, head_dim]` | one new token's queries for each sequence |
# | `k_cache`, `v_cache` | `[blocks, kv_heads, block_size, head_dim]` | the pool |
# | `tables` | `[seqs, max_blocks]` | each sequence's blocks in order; behind them stands anything |
# | `lengths` | `[seqs]` | how many tokens each sequence has, the new one included |
# | `scale` | a number | the scores are $q \cdot k$ times this |
#
# Query head `h` belongs to key/value head `h // group` with `group = heads // kv_heads` (Ainslie et al. 2023, "GQA").
#
# **Write** `paged_decode(...)`: return the attention, `[seqs, heads, head_dim]`. Use `add_block` with all query heads
# of a group as its rows, so that a block is read once for the whole group.
#
# **By hand.** If all queries are zero, all scores are 0 and attention is the plain mean of the values. Two sequences
# with 3 and 5 tokens, blocks of 2, tables (4, 1) and (0, 5, 2). In the check, the values of the first key/value head
# are 1, 2, 3, … along each sequence, and those of the second are 10, 20, 30, … So the four query heads of the first
# sequence get 2, 2, 20, 20, and those of the second 3, 3, 30, 30.
#
# *Hints.*
#
# - Slots that belong to nobody hold NaN, as do the blocks behind a table's end. Cut the last block at the sequence's
#   end. A weight of 0 does not help: 0 · NaN is NaN.
# - `tables[seq].tolist()` and `lengths.tolist()` give Python numbers. Loops over sequences, key/value heads and blocks
#   are right here.
# - The division comes at the end, once.


# %% tags=["solution:my_paged_decode"]
def paged_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Attention of each sequence's newest token over its blocks: [seqs, heads, head_dim]."""
    ### BEGIN SOLUTION
    out = torch.empty_like(q)
    kv_heads, block_size, head_dim = k_cache.shape[1:]
    group = q.shape[1] // kv_heads
    for seq, length in enumerate(lengths.tolist()):
        blocks = tables[seq, : ceil(length / block_size)].tolist()
        for kv_head in range(kv_heads):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            done = nothing(group, head_dim)
            for number, block in enumerate(blocks):
                here = block, kv_head, slice(length - number * block_size)  # a slice's end may lie beyond the block
                done = add_block(done, q[seq, heads] * scale, k_cache[here], v_cache[here])
            out[seq, heads] = done.weighted / done.total[:, None]
    return out
    ### END SOLUTION


# %% tags=["tests:paged_decode:20"]
from minillm.course.check_paged_attention import ANSWERS, check_decode, scattered
from minillm.course.checks import check_close, without
from minillm.course.partial_attention import add_block as right_add_block

lengths, tables = torch.tensor([3, 5]), torch.tensor([[4, 1, 3], [0, 5, 2]])  # block 3 belongs to nobody
k_cache, v_cache = torch.full((2, 6, 2, 2, 1), nan)  # [blocks, kv_heads, block_size, head_dim] each
for table, length in zip(tables, (3, 5), strict=True):
    slots = torch.tensor([2 * table[i // 2] + i % 2 for i in range(length)])
    counted = torch.arange(1.0, length + 1)[:, None, None] * torch.tensor([[1.0], [10.0]])
    reference.write_kv(k_cache, v_cache, torch.zeros_like(counted), counted, slots)
with patch("__main__.add_block", right_add_block), without(*ANSWERS):
    means = paged_decode(torch.zeros(2, 4, 1), k_cache, v_cache, tables, lengths, 1.0)
hint = "NaN: a slot that belongs to nobody was read. Another number: which key/value head belongs to the query head?"
check_close(means, torch.tensor([[2.0, 2, 20, 20], [3, 3, 30, 30]])[..., None], "the mean of the values", hint=hint)
torch.manual_seed(5)
with patch("__main__.add_block", right_add_block):
    decodes = scattered([7, 4, 1, 10], kv_heads=2, group=3, head_dim=8, block_size=4)
    check_decode(paged_decode, decodes, 0.3, "The means are right: are the scores scaled?")
### BEGIN HIDDEN TESTS
import secrets

seed = secrets.randbelow(10**9)
torch.manual_seed(seed)
for kv_heads, group, head_dim, block_size in ((1, 1, 4, 1), (2, 3, 16, 4), (3, 2, 8, 16)):
    lengths = [1, block_size, block_size + 1, *torch.randint(1, 40, (3,)).tolist()]
    shape = f"lengths {lengths}, {kv_heads} key/value heads, groups of {group}, blocks of {block_size}"
    decodes, scale = scattered(lengths, kv_heads, group, head_dim, block_size), 0.1 + torch.rand(()).item()
    with patch("__main__.add_block", right_add_block):
        check_decode(paged_decode, decodes, scale, f"(With {shape}; fresh numbers, seed {seed}.)")
### END HIDDEN TESTS
print("right")

# %% [markdown]
# ## Task 4 · Two workers (10 + 5 points)
#
# One user, one text of a hundred thousand tokens: a single worker would go through all of its blocks alone. Let two
# workers take a half each, both beginning with `nothing`. Dao et al. 2023 ("Flash-Decoding for long-context
# inference") put their results together at the end; notebooks 09 and 10 call it split-KV.
#
# **Write** `merge(a, b)`: the `Partial` over the keys of both, of the same rows. Either of them may have seen no key at
# all, for some rows or for all: then the other one is the result, and if *both* are `nothing`, so is the result.
#
# **By hand.** The first worker has the keys of task 2's first block: log 8, 1.25, (0.25, 1). The second one has the
# second block: log 16, 1, (1, 1). Relative to log 16, what the first one has must be halved: 0.625, (0.125, 0.5). The
# sums are 1.625 and (1.125, 1.5), as in task 2.
#
# *Hint.* −∞ − (−∞) is NaN. `largest.masked_fill(largest == -inf, 0)` is a number to subtract that never is −∞.


# %% tags=["solution:my_merge"]
def merge(a: Partial, b: Partial) -> Partial:
    """The state over the keys of both."""
    ### BEGIN SOLUTION
    largest = torch.maximum(a.largest, b.largest)
    finite = largest.masked_fill(largest == -inf, 0)
    ours, theirs = (a.largest - finite).exp(), (b.largest - finite).exp()
    weighted = a.weighted * ours[:, None] + b.weighted * theirs[:, None]
    return Partial(largest, a.total * ours + b.total * theirs, weighted)
    ### END SOLUTION


# %% tags=["tests:merge:10"]
from minillm.course.check_paged_attention import check_merge, partial_of

scores, values = torch.tensor([[2.0, 8.0, 16.0]]).log(), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
first, second = partial_of(scores[:, :2], values[:2]), partial_of(scores[:, 2:], values[2:])
whole = partial_of(scores, values)
check_merge(merge, first, second, whole, "Are both brought to the larger of the two maxima?")
check_merge(merge, second, first, whole, "The other way round it must be the same.")
### BEGIN HIDDEN TESTS
import secrets
from itertools import pairwise

seed = secrets.randbelow(10**9)
torch.manual_seed(seed)
for level in (0, 120):
    scores, values = level + 4 * torch.randn(3, 20), torch.randn(20, 8)
    cuts = [0, *sorted((1 + torch.randperm(19)[:4]).tolist()), 20]
    parts = [(i, j, partial_of(scores[:, i:j], values[i:j])) for i, j in pairwise(cuts)]
    while len(parts) > 1:  # neighbours become one, in any order
        at = int(torch.randint(len(parts) - 1, ()))
        (i, _, one), (_, j, other) = parts[at : at + 2]
        hint = f"These are keys {i} to {j - 1}, scores around {level}. (Fresh numbers, seed {seed}.)"
        right = partial_of(scores[:, i:j], values[i:j])
        parts[at : at + 2] = [(i, j, check_merge(merge, one, other, right, hint))]
### END HIDDEN TESTS
print("right")

# %% tags=["tests:merge_empty:5"]
from minillm.course.check_paged_attention import check_merge, partial_of, rows_of

full, empty = partial_of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 3)), nothing(2, 3)
check_merge(merge, full, empty, full, "b has seen nothing.")
check_merge(merge, empty, full, full, "a has seen nothing.")
check_merge(merge, empty, empty, empty, "Both have seen nothing: −∞ − (−∞) is NaN.")
### BEGIN HIDDEN TESTS
import secrets

seed = secrets.randbelow(10**9)
torch.manual_seed(seed)
for _ in range(4):
    state, seen_by = partial_of(5 * torch.randn(6, 9), torch.randn(9, 4)), torch.randint(3, (6,))
    a, b, both = (rows_of(state, rows) for rows in (seen_by == 0, seen_by == 1, seen_by < 2))
    hint = f"Rows are seen by a (0), by b (1) or by nobody (2): {seen_by.tolist()}. (Fresh numbers, seed {seed}.)"
    check_merge(merge, a, b, both, hint)
### END HIDDEN TESTS
print("right")

# %% [markdown]
# ## Task 5 · The kernel (10 + 10 points)
#
# On a graphics card nobody loops over sequences and heads. A *program* does one sequence and one key/value head, and
# the grid has one for each pair (notebook 09, section 6; Tillet et al. 2019, "Triton"). Here Triton's interpreter runs
# them, one after the other.
#
# The beginning is given. Read it:
#
# - `row` are the query heads of the group, padded to `ROWS` = 16, since `tl.dot` wants at least 16 rows; `is_row` says
#   which are real. `queries` is `[ROWS, HEAD_DIM]`, scaled, and 0 in the padded rows.
# - `largest`, `total`, `weighted` are `nothing`, for all rows.
#
# **Write** the rest. Go over the keys in tiles of `KEYS` positions: `for begin in range(0, length, KEYS)`. A tile need
# not be a block; it may have keys of several blocks. For each tile:
#
# 1. `key = begin + tl.arange(0, KEYS)`, the positions, and which of them are there: `key < length`.
# 2. Load the block of each key from the table: the row of this sequence begins at `tables + seq * table_row`.
# 3. The first channel of token $i$ in block $b$ lies at `((b * kv_heads + kv_head) * BLOCK_SIZE + i % BLOCK_SIZE) *
#    HEAD_DIM` in both caches. Add `dim`, and load keys and values `[KEYS, HEAD_DIM]`.
# 4. `tl.dot(queries, tl.trans(keys))` are the scores `[ROWS, KEYS]`. Those of keys that are not there become −∞ with
#    `tl.where`.
# 5. Maximum, shrink, weights, sum, weighted sum, as in task 2.
#
# After the loop, store `weighted / total` at `out + at`.
#
# **By hand.** A sequence of 10 tokens, blocks of 4, table (2, 0, 5), `KEYS` = 16. `key` is 0 … 15, and 10 of them are
# there. The table's entries are `key // 4`: 0 0 0 0 1 1 1 1 2 2 and then six that must not be read. The blocks are
# 2 2 2 2 0 0 0 0 5 5.
#
# *Hints.*
#
# - **Every** `tl.load` in the loop needs `mask=…, other=0`, and the store needs `mask=is_row`. A load from an address
#   that does not exist kills the notebook's kernel without a message. If that happens: restart it, run the cells again,
#   and look at the masks and at step 3.
# - `tl.max(x, 1)` and `tl.sum(x, 1)` go along the columns: `[ROWS, KEYS]` becomes `[ROWS]`. `tl.maximum(a, b)` compares
#   two tiles, `tl.exp` is the exponential.
# - Begin with a single tile: the first check has sequences of at most `KEYS` tokens.


# %% tags=["solution:my_decode_kernel"]
@triton.jit
def decode_kernel(
    q,  # [seqs, heads, HEAD_DIM]
    k_cache,  # [blocks, kv_heads, BLOCK_SIZE, HEAD_DIM]
    v_cache,
    tables,  # [seqs, table_row]
    lengths,  # [seqs]
    out,  # as q
    scale,
    table_row,
    GROUP: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
):
    seq, kv_head, kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    length = tl.load(lengths + seq)
    row, dim = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    is_row = (row < GROUP)[:, None]
    at = ((seq * kv_heads + kv_head) * GROUP + row)[:, None] * HEAD_DIM + dim[None, :]
    queries = tl.load(q + at, mask=is_row, other=0.0) * scale
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    ### BEGIN SOLUTION
    for begin in range(0, length, KEYS):
        key = begin + tl.arange(0, KEYS)
        is_key = key < length
        block = tl.load(tables + seq * table_row + key // BLOCK_SIZE, mask=is_key, other=0)
        place = ((block * kv_heads + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE) * HEAD_DIM
        keys = tl.load(k_cache + place[:, None] + dim[None, :], mask=is_key[:, None], other=0.0)
        values = tl.load(v_cache + place[:, None] + dim[None, :], mask=is_key[:, None], other=0.0)
        scores = tl.where(is_key[None, :], tl.dot(queries, tl.trans(keys)), float("-inf"))
        best = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - best)
        weights = tl.exp(scores - best[:, None])
        total = total * shrink + tl.sum(weights, 1)
        weighted = weighted * shrink[:, None] + tl.dot(weights, values)
        largest = best
    tl.store(out + at, weighted / total[:, None], mask=is_row)
    ### END SOLUTION


# %% [markdown]
# This launches it: two axes, sequences and key/value heads.


# %% tags=["locked:kernel_decode"]
def kernel_decode(q, k_cache, v_cache, tables, lengths, scale):
    """As `paged_decode`, by the kernel."""
    _, kv_heads, block_size, head_dim = k_cache.shape
    memory = torch.full((q.numel() + 4096,), nan)  # what is not stored is seen; room behind it, for a missing mask
    out = memory[: q.numel()].view(q.shape)
    arguments = (q.contiguous(), k_cache, v_cache, tables, lengths, out, scale, tables.stride(0))
    sizes = {"GROUP": q.shape[1] // kv_heads, "HEAD_DIM": head_dim, "BLOCK_SIZE": block_size}
    decode_kernel[(len(q), kv_heads)](*arguments, **sizes, ROWS=16, KEYS=32)
    return out


# %% tags=["tests:kernel_one_tile:10"]
from minillm.course.check_paged_attention import check_kernel, scattered

torch.manual_seed(5)
nans = "NaN: nothing was stored, or a load has no mask, or the scores of keys that are not there are not −∞."
check_kernel(decode_kernel, scattered([16], 1, 1, 16, 16), 1.0, "One sequence, one head, one full block.")
check_kernel(decode_kernel, scattered([10], 1, 1, 16, 4), 0.1, f"One sequence of 10 tokens in blocks of 4. {nans}")
hint = f"Three sequences, two key/value heads with three query heads each. {nans}"
check_kernel(decode_kernel, scattered([5, 16, 1], 2, 3, 16, 4), 0.3, hint)
### BEGIN HIDDEN TESTS
import secrets

seed = secrets.randbelow(10**9)
torch.manual_seed(seed)
for kv_heads, group, block_size in ((3, 2, 2), (2, 5, 16)):
    lengths = torch.randint(1, 17, (3,)).tolist()
    hint = f"(Lengths {lengths}, groups of {group}, blocks of {block_size}, fresh numbers, seed {seed}.)"
    scale, decodes = 0.2 + torch.rand(()).item(), scattered(lengths, kv_heads, group, 16, block_size)
    check_kernel(decode_kernel, decodes, scale, hint)
### END HIDDEN TESTS
print("right")

# %% tags=["tests:kernel:10"]
from minillm.course.check_paged_attention import check_kernel, scattered

torch.manual_seed(5)
decodes = scattered([40, 17, 33], 2, 3, 16, 4)
check_kernel(decode_kernel, decodes, 0.5, "More than one tile: are total and weighted multiplied by shrink?")
### BEGIN HIDDEN TESTS
import secrets

seed = secrets.randbelow(10**9)
torch.manual_seed(seed)
for kv_heads, group, block_size in ((1, 4, 2), (2, 3, 16), (3, 1, 32)):
    lengths = [17, *torch.randint(33, 90, (2,)).tolist()]
    hint = f"(Lengths {lengths}, groups of {group}, blocks of {block_size}, fresh numbers, seed {seed}.)"
    scale, decodes = 0.5 + torch.rand(()).item(), scattered(lengths, kv_heads, group, 16, block_size)
    check_kernel(decode_kernel, decodes, scale, hint)
### END HIDDEN TESTS
print("right")

# %% [markdown]
# ## Task 6 · In the engine (10 + 10 points)
#
# The engine's store hands every layer's queries to a **backend** (notebook 09, section 8). Yours knows decodes only:
# one query a sequence. That is enough. A prompt of $n$ tokens is $n$ queries, and query $i$ sees the tokens up to
# itself; so it is the same as $n$ sequences with the same table and the lengths 1, 2, …, $n$. (A kernel for prompts is
# faster because it reads each key once for many queries. The results are the same.)
#
# Nothing is to be written here. `every_query_alone` turns your function into what the engine calls, and `engine_with`
# puts it in the place of the package's own.


# %% tags=["locked:engine_with"]
def every_query_alone(decode):
    """The engine's `paged_attention`, from a function for decodes."""

    def paged_attention(q, k_cache, v_cache, block_tables, query_starts, seq_lens, *, scale, **_):
        counts = query_starts.diff()
        seq = torch.repeat_interleave(torch.arange(len(counts)), counts)  # whose query it is
        behind = query_starts[1:][seq] - torch.arange(len(q)) - 1  # how many tokens it does not see
        return decode(q, k_cache, v_cache, block_tables[seq], seq_lens[seq] - behind, scale)

    return paged_attention


def engine_with(decode):
    """The tiny model, whose attention is `decode`."""
    plain = {"dtype": "float32", "device": "cpu", "attention_backend": "reference"}
    llm = LLM("tiny", **plain, num_gpu_blocks_override=64)
    llm.engine.runner.kv.backend = AttentionBackend("mine", reference.write_kv, every_query_alone(decode))
    return llm


# %% [markdown]
# A story, told with everything that you have written:

# %%
with engine_with(paged_decode) as llm:
    params = SamplingParams(temperature=0, max_tokens=24)
    prompt = "Once upon a time, in a small house near the farm,"
    print(prompt + llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].text)

# %% [markdown]
# The checks compare the tokens with those of the package's attention, for three prompts that the engine answers
# together.

# %% tags=["tests:engine:10"]
from minillm.course.check_paged_attention import check_engine
from minillm.course.partial_attention import add_block as right_add_block

told = ["Once upon a time, in a small house near the farm,", "Nora had a red hat.", "Sam was a clever boy. One evening"]
with patch("__main__.add_block", right_add_block):
    check_engine(engine_with, paged_decode, told, steps=12)
### BEGIN HIDDEN TESTS
import secrets

names, starts = ("Nora", "Sam", "Lily", "Ben"), ("{} had a red hat.", "{} was a clever child.", "One day {} went to")
fresh = [secrets.choice(starts).format(secrets.choice(names)) for _ in range(3)]
with patch("__main__.add_block", right_add_block):
    check_engine(engine_with, paged_decode, fresh, steps=12)
### END HIDDEN TESTS
print("right")

# %% tags=["tests:engine_kernel:10"]
from minillm.course.check_paged_attention import check_engine

check_engine(engine_with, kernel_decode, ["Nora had a red hat.", "Sam was a clever boy. One evening"], steps=4)
### BEGIN HIDDEN TESTS
import secrets

names, starts = ("Nora", "Sam", "Lily", "Ben"), ("{} had a red hat.", "{} was a clever child.", "One day {} went to")
fresh = secrets.choice(starts).format(secrets.choice(names))
check_engine(engine_with, kernel_decode, [fresh], steps=3)
### END HIDDEN TESTS
print("right")

# %% [markdown]
# ## What to hand in
#
# This notebook, with its name unchanged. Before you do: restart the kernel, run all cells, and see that it goes
# through. Cells that are locked are put back as they were before grading; what you add elsewhere does no harm.
#
# ## If you want to go on (not graded)
#
# 1. **A window.** In some models a token sees only the last $w$ tokens. Give `paged_decode` a parameter for it, and
#    read no block that lies wholly before the window. Compare with `reference.paged_attention(…, window=w)`.
# 2. **Split-KV in the kernel.** Give the grid a third axis: each program takes a part of the tiles and stores its
#    `largest`, `total` and `weighted`. Merge them with your `merge`. Why must the parts be merged before dividing?
# 3. **Less to read.** Count the numbers that `kernel_decode` loads for a prompt of $n$ tokens in task 6, and compare
#    with $2 n$ keys and values per head. From which $n$ on would you rather write a kernel for prompts?
