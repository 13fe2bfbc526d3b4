# %% [markdown]
# # 09 · Paged attention
#
# The keys and values of a text lie in blocks, scattered over a pool. A query must look at all of them, in every layer,
# for every token that is written. This notebook computes the same attention five times: by the textbook, block by
# block, for a whole batch at once, compiled for the processor, and as a kernel for a GPU. Each version is checked
# against the one before. What changes is what has to be held, what has to be copied, and who works at the same time.
#
# **By the end of this notebook you will be able to**
#
# - write attention over a block table, and say which bytes it reads;
# - write the online softmax, and explain why the largest score is carried along;
# - merge two partial results of attention, and say why that lets many workers share one long text;
# - count what gathering copies for a batch of unequal lengths;
# - read the package's kernels for CPU and GPU, and predict which thread and which program reads which block;
# - say which comparisons of speed are fair.
#
# **You need** notebooks [03](03_attention.ipynb) (attention) and [08](08_paged_blocks.ipynb) (blocks and block tables).
# No GPU: the GPU kernel runs in Triton's interpreter, which exists on Linux only (section 6; on Windows, in WSL).
#
# **New here**: notebook 08 settled where keys and values lie. Now queries look at them, through the table, with a sum
# that is finished block by block.
#
# **Time**: about 90 minutes (it runs in about 30 s on two cores; longer where Numba has to compile first).

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # for section 6: before anything imports Triton

import time
from itertools import permutations
from math import ceil, inf, nan
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch

from minillm import LLM, SamplingParams
from minillm.cache import reference
from minillm.cache.block_pool import BlockPool
from minillm.cache.block_table import BlockTable
from minillm.cache.paged import PagedKVCache
from minillm.transformer.attention import dot_product_attention
from minillm.viz import (
    Gathered,
    explore_programs,
    plot_blocks,
    plot_explored_programs,
    plot_gather,
    plot_online,
    plot_programs,
    plot_shares,
    plot_times,
    program_grid,
    scattered_tables,
    shares_by_block,
    shares_by_sequence,
    show_part,
    show_source,
)

# %% [markdown]
# ## 1 · What must be computed
#
# A case small enough to print. One sequence has 10 tokens in blocks of 4, and they lie in the blocks 4, 1 and 3 of a
# pool of 6. (The queue of the pool is put into this order first, as in notebook 08.)

# %%
pool = BlockPool(num_blocks=6, block_size=4)
for _ in range(6):
    pool.allocate()
pool.free([4, 1, 3, 0, 2, 5])
table = BlockTable(pool)
table.append(10)
words = {"text": [f"key {i}" for i in range(10)]}
plot_blocks(pool, {"text": table}, tokens=words, title=f"Ten keys in the blocks {table.blocks}, the last one half full")
plt.show()

# %% [markdown]
# Two query heads share one key/value head (notebook 03: a group of two), and a head has 4 channels. We draw random
# keys and values and write them where the table says. Every other slot of the pool holds `nan`, which is not a number:
# whatever is computed with it is `nan` too. So if one of our five versions reads a slot that is not its own, we shall
# see it.

# %%
torch.manual_seed(9)
q = torch.randn(2, 4)  # [heads, head_dim]: the newest token's query
k, v = torch.randn(2, 10, 1, 4)  # [tokens, kv_heads, head_dim] each
k_cache, v_cache = torch.full((2, 6, 1, 4, 4), nan)  # [blocks, kv_heads, block_size, head_dim] each
reference.write_kv(k_cache, v_cache, k, v, torch.tensor(table.slots(0, 10)))
print("channel 0 of the keys, one row a block:")
print(k_cache[:, 0, :, 0].round(decimals=2))

# %% [markdown]
# What must come out? If the keys lay in one piece, notebook 03 has the answer, $\mathrm{softmax}(q\,K^T\!/\sqrt d)\,V$:

# %%
in_one_piece = (x.transpose(0, 1)[None] for x in (k, v))  # [1, kv_heads, tokens, head_dim]
expected = dot_product_attention(q[None, :, None], *in_one_piece)[0, :, 0]
print(expected.round(decimals=3))

# %% [markdown]
# ## 2 · The first way: the textbook
#
# The table translates a token's position into its slot, that is, into a block and a place in it. With that, the
# definition can be followed to the letter: for each query head, fetch one key after the other for the scores, take the
# softmax, fetch one value after the other for the mean.


# %%
def textbook(q, k_cache, v_cache, blocks, length):
    """Attention of one sequence's newest token: [heads, head_dim]."""
    size, group = k_cache.shape[2], len(q) // k_cache.shape[1]
    out = torch.empty_like(q)
    for head, query in enumerate(q * q.shape[-1] ** -0.5):
        rows = [(blocks[i // size], head // group, i % size) for i in range(length)]
        weights = torch.stack([query @ k_cache[row] for row in rows]).softmax(dim=0)
        out[head] = sum(weight * v_cache[row] for weight, row in zip(weights, rows, strict=True))
    return out


first_way = textbook(q, k_cache, v_cache, table.blocks, 10)
torch.testing.assert_close(first_way, expected)
print("equal to attention over keys in one piece")

# %% [markdown]
# This is right, and it is *all* that paged attention has to be: to find a key, ask the table. Kwon et al. (2023, §4.1)
# write it as an equation over blocks. What follows does not change the result. It changes the order of the work, for
# three reasons:
#
# - keys and values are fetched one by one, where memory delivers whole stretches;
# - all scores of a query are held until the last is known;
# - a query is one piece of work, which two workers cannot share.
#
# One idea, in the next section, helps with all three.
#
# ## 3 · The second way: block by block
#
# We should like to read a block once, use its keys and its values at once, and never come back. The values are in the
# way: their weights are $e^{s_i} / \sum_j e^{s_j}$, and the sum is known only at the end. But the division can wait.
# Carry two sums from block to block, and divide once, when all is read:
#
# $$ \ell = \sum_i e^{s_i}, \qquad o = \sum_i e^{s_i} v_i, \qquad \text{output} = o / \ell $$
#
# ### Why the maximum is needed
#
# On paper this is the whole solution. In a computer it fails, since the largest number in float32 is about
# $3.4 \cdot 10^{38}$, and $e^{89}$ is larger than that. Nothing forbids a score of 89, or of 100:

# %%
scores = torch.tensor([100.0, 99.0, 90.0])
print("exp(88), exp(89):  ", torch.tensor([88.0, 89.0]).exp())
print("as it is written:  ", scores.exp() / scores.exp().sum())
shifted = (scores - scores.max()).exp()
print("shifted:           ", shifted / shifted.sum())
torch.testing.assert_close(shifted / shifted.sum(), scores.softmax(dim=0))

# %% [markdown]
# Infinity divided by infinity is no number. The remedy is old: subtract the largest score $m$ from all scores.
# Numerator and denominator both shrink by the same factor $e^{-m}$, so the quotient stays the same, and no exponent is
# above 0. Softmax is computed like this in practice.
#
# But the largest of all scores, again, is known only at the end.
#
# ### The online softmax
#
# Milakov and Gimelshein (2018, §3) found the way out: use the largest score *so far*, and when a larger one turns up,
# correct what has been summed. All sums were relative to the old maximum $m$; to make them relative to the new one
# $m'$, multiply them once by $e^{m - m'}$, because $e^{s - m} \cdot e^{m - m'} = e^{s - m'}$. FlashAttention (Dao et
# al. 2022, §3.1) carries the weighted sum of values along in the same way.
#
# So three things are carried:


# %%
class Partial(NamedTuple):
    """Attention of one query over some of its keys."""

    largest: torch.Tensor  # the largest score so far
    total: torch.Tensor  # the sum of exp(score - largest)
    weighted: torch.Tensor  # the sum of exp(score - largest) · value, [head_dim]; divided at the very end


def nothing(head_dim):
    """Before the first key."""
    return Partial(torch.tensor(-inf), torch.tensor(0.0), torch.zeros(head_dim))


# %% [markdown]
# Taking in a block is now a handful of lines. Read them slowly; they are the heart of this notebook, and of
# FlashAttention and what was built on it.


# %%
def add_block(done, query, keys, values):
    """`done`, and one more block: keys and values [tokens, head_dim], the query scaled already."""
    scores = keys @ query  # [tokens]
    best = torch.maximum(done.largest, scores.max())
    shrink = (done.largest - best).exp()  # 1, unless this block has a new largest score
    weights = (scores - best).exp()
    return Partial(best, done.total * shrink + weights.sum(), done.weighted * shrink + weights @ values)


# %% [markdown]
# At the first block `largest` is $-\infty$, so `shrink` is $e^{-\infty} = 0$ and the zeros of the beginning stay zeros.
# Now over all blocks of the table. The last block is cut at the sequence's end, because the rest of it belongs to
# nobody.


# %%
def block_by_block(q, k_cache, v_cache, blocks, length):
    """As `textbook`, but each block is read once for each head, and no score is kept."""
    size, group = k_cache.shape[2], len(q) // k_cache.shape[1]
    out = torch.empty_like(q)
    for head, query in enumerate(q * q.shape[-1] ** -0.5):
        done = nothing(q.shape[-1])
        for number in range(ceil(length / size)):
            here = blocks[number], head // group, slice(length - number * size)  # a slice's end may lie beyond
            done = add_block(done, query, k_cache[here], v_cache[here])
        out[head] = done.weighted / done.total
    return out


second_way = block_by_block(q, k_cache, v_cache, table.blocks, 10)
torch.testing.assert_close(second_way, first_way)
print("equal to the textbook")

# %% [markdown]
# Let us watch head 0 at work. After each block we write down the state.

# %%
query = q[0] * 4**-0.5
content = {block: slice(10 - 4 * number) for number, block in enumerate(table.blocks)}  # block → its filled slots
pieces = [(k_cache[block, 0, filled], v_cache[block, 0, filled]) for block, filled in content.items()]
states = [nothing(4)]
for keys, values in pieces:
    states.append(add_block(states[-1], query, keys, values))

# %%
seen = states[1:]
plot_online(
    scores=[keys @ query for keys, _ in pieces],
    largest=[state.largest.item() for state in seen],
    total=[state.total.item() for state in seen],
    outputs=[state.weighted / state.total for state in seen],
    names=[f"block {block}" for block in content],
    title="After every block the state is that of the keys read so far",
)
plt.show()
torch.testing.assert_close(seen[-1].weighted / seen[-1].total, first_way[0])

# %% [markdown]
# Left, block 1 brings a larger score than block 4 had. In the middle, the old sum was therefore multiplied by the
# factor that is written above the bar, before the new exponentials were added. Block 3 brings no new maximum: the
# factor is 1. Right is what the output *would be* if the text ended here: at every moment a proper mean over the keys
# read so far.
#
# What does a query have to hold meanwhile? The textbook holds a score for each key. The online softmax holds $2 + d$
# numbers, and the scores of one block, however long the text is:

# %%
for length in (10, 1000, 100_000):
    print(f"{length:7,} keys: {length:7,} scores, or {2 + 64} numbers (heads of 64 channels)")
assert sum(part.numel() for part in seen[-1]) == 2 + 4

# %% [markdown]
# ### The order does not matter
#
# A sum does not care in which order its terms come, and the corrections take care of the maximum. So the blocks may be
# read in any order. Here are all six:

# %%
for order in permutations(range(3)):
    done = nothing(4)
    for number in order:
        done = add_block(done, query, *pieces[number])
    torch.testing.assert_close(done.weighted / done.total, first_way[0])
print("six orders, one result")

# %% [markdown]
# (Equal up to rounding. Floating-point sums in another order may differ in the last digit, which is why all
# comparisons here have a tolerance.)
#
# ### Two halves make a whole
#
# Now a step further. Let two workers each take a part of the blocks, both starting from nothing. Each ends with a
# `Partial` of its own, relative to its own maximum. Can the two be put together? By the same correction: bring both to
# the larger maximum, then add.


# %%
def merge(a, b):
    """The state over the keys of both."""
    best = torch.maximum(a.largest, b.largest)
    ours, theirs = (a.largest - best).exp(), (b.largest - best).exp()
    return Partial(best, a.total * ours + b.total * theirs, a.weighted * ours + b.weighted * theirs)


left = add_block(nothing(4), query, *pieces[0])  # one worker: block 4
right = add_block(add_block(nothing(4), query, *pieces[2]), query, *pieces[1])  # another: blocks 3 and 1
for whole in (merge(left, right), merge(right, left)):
    torch.testing.assert_close(whole.weighted / whole.total, first_way[0])
print("two halves, one result")

# %% [markdown]
# The two outputs themselves, already divided, could *not* be merged: their plain average is wrong, since it has
# forgotten how much weight each half had. This is why `total` and `largest` are handed over as well.

# %%
average = (left.weighted / left.total + right.weighted / right.total) / 2
print("the right result:      ", first_way[0].round(decimals=3))
print("average of the halves: ", average.round(decimals=3))
assert not torch.allclose(average, first_way[0], atol=0.01)

# %% [markdown]
# In fact `add_block` is nothing but a merge: of what is done, with the state of one block.

# %%
for state, (keys, values) in zip(states, pieces, strict=False):
    alone = add_block(nothing(4), query, keys, values)
    torch.testing.assert_close(merge(state, alone), add_block(state, query, keys, values))
print("adding a block is merging with it")

# %% [markdown]
# So the work over the keys of one query can be divided as one likes, among as many workers as there are, and the
# results merged in any order. For a decode on a large machine this is decisive: there is one query, and perhaps a
# hundred thousand keys. Dao et al. (2023) divide them among the processors of a GPU, which is called **split-KV**. We
# shall meet it twice below.
#
# ## 4 · The third way: a batch at once, gathered
#
# Our loops call PyTorch for every key or block, and each call costs some microseconds. PyTorch is fast when it gets
# large tensors. So bring together what lies scattered, once, and then do the usual attention. This is what the
# package's `cache/reference.py` does, the plain version that defines what is right.

# %%
show_source(reference._gather)

# %% [markdown]
# `cache[tables]` indexes a tensor with a tensor: for each sequence and each entry of its table, it fetches that block.
# On our case it gives keys in their logical order, and a rest that is `nan`:

# %%
gathered = reference._gather(k_cache, torch.tensor([table.blocks]))  # [seqs, kv_heads, keys, head_dim]
print(list(gathered.shape))
assert torch.equal(gathered[0, 0, :10], k[:, 0])
assert gathered[0, 0, 10:].isnan().all()

# %% [markdown]
# A batch of sequences becomes one rectangle, as long as the longest. A mask hides from each query what lies behind its
# sequence's end. A score that is masked becomes $-\infty$ and its weight 0. But 0 · nan is still nan, so the values
# there are set to 0 as well:

# %%
show_source(reference._attend)

# %% [markdown]
# `positions` says where each query stands. With several new tokens of one sequence, a piece of a prompt, each of them
# sees the tokens up to itself: that is notebook 03's causal mask, at the end of the text. The function around it
# divides the batch. Sequences with a single new token (decodes) go together in one rectangle, the others row by row:

# %%
show_part(reference.paged_attention, "starts, lengths", "return out")

# %% [markdown]
# Its arguments are those of notebook 08's `PagedBatch`: block tables, where each sequence's queries start in `q`, and
# how long each sequence is. For our case:

# %%
batch = torch.tensor([table.blocks]), torch.tensor([0, 1]), torch.tensor([10])
how = {"max_query_len": 1, "scale": 4**-0.5}
third_way = reference.paged_attention(q[None], k_cache, v_cache, *batch, **how)[0]
torch.testing.assert_close(third_way, second_way)
print("equal to block by block")

# %% [markdown]
# From here on we also want larger batches. This makes one: random keys and values in blocks that lie anywhere, `nan` in
# all slots that belong to nobody.


# %%
def make_batch(lengths, queries, *, kv_heads, group, head_dim, block_size):
    """The arguments of `paged_attention` for sequences of these lengths, with so many new tokens each."""
    tables = scattered_tables(lengths, block_size)
    num_blocks = sum(ceil(length / block_size) for length in lengths)
    k_cache, v_cache = torch.full((2, num_blocks, kv_heads, block_size, head_dim), nan)
    for row, length in enumerate(lengths):
        position = torch.arange(length)
        slots = tables[row, position // block_size] * block_size + position % block_size
        reference.write_kv(k_cache, v_cache, *torch.randn(2, length, kv_heads, head_dim), slots)
    q = torch.randn(sum(queries), kv_heads * group, head_dim)
    return q, k_cache, v_cache, tables, torch.tensor([0, *queries]).cumsum(0), torch.tensor(lengths)


# %% [markdown]
# Eight decodes of very different lengths, in the shapes of SmolLM2-135M: 9 query heads on 3 key/value heads of 64
# channels, blocks of 16. The two ways from above take them one after the other.

# %%
lengths = [500, 40, 300, 20, 80, 200, 60, 120]
smollm = {"kv_heads": 3, "group": 3, "head_dim": 64, "block_size": 16}
ragged = make_batch(lengths, [1] * 8, **smollm)


def one_by_one(way, q, k_cache, v_cache, tables, starts, lengths):
    rows = zip(q, tables.tolist(), lengths.tolist(), strict=True)
    return torch.stack([way(query, k_cache, v_cache, blocks, length) for query, blocks, length in rows])


at_once = reference.paged_attention(*ragged, max_query_len=1, scale=64**-0.5)
for way in (textbook, block_by_block):
    torch.testing.assert_close(one_by_one(way, *ragged), at_once, atol=1e-5, rtol=1e-5)
print("three ways, eight sequences, the same outputs")

# %% [markdown]
# ### What gathering costs
#
# The gather copies all keys and values of the batch, in each layer, for each new token, and throws the copy away
# afterwards. And since the copy is a rectangle, the short sequences are padded to the longest.

# %%
title = f"{sum(lengths):,} tokens are needed, {8 * 512:,} slots are copied"
plot_gather(lengths, block_size=16, title=title)
plt.show()
slots = Gathered.of(lengths, block_size=16)
assert sum(map(sum, slots)) == 8 * 512

# %% [markdown]
# In bytes, counted on the real tensors:

# %%
_, k_cache8, v_cache8, tables8, _, _ = ragged
copied = sum(reference._gather(cache, tables8).nbytes for cache in (k_cache8, v_cache8))
needed = 2 * sum(lengths) * 3 * 64 * 4  # keys and values · tokens · heads · channels · bytes
assert copied == needed * sum(map(sum, slots)) / sum(lengths)
assert not k_cache8[tables8].transpose(1, 2).is_contiguous()  # to flatten it is to copy once more
print(f"needed: {needed / 1e6:5.2f} MB to read")
print(f"copied: {copied / 1e6:5.2f} MB, {copied / needed:.1f} times as much")

# %% [markdown]
# And a copy moves every byte more than once: it is read from the blocks, written to the rectangle, and read again by
# the attention. (`_gather` even writes twice: bringing the heads in front of the blocks needs a second copy, and
# masking the values a further one.) Notebook 06 has shown that decode waits for memory. Here we make it wait for
# traffic that nobody needs.
#
# The second way had no copy at all. It was slow because it was written in Python. So take *its* order of work, and get
# rid of Python.
#
# ## 5 · The fourth way: compiled for the CPU
#
# Numba (Lam et al. 2015) translates a Python function into machine code when it is first called with
# arguments of some types. Loops over single numbers, which Python would interpret one operation at a time, become
# machine loops. `minillm/kernels/cpu/paged_attention.py` is written like that. Only the two innermost loops are written
# in terms of LLVM, Numba's own compiler, whose vectors hold several numbers each (`LANES`: 16 on a processor with
# AVX-512, else 8). Here `b` writes instructions, and this is what is done for so many channels `d` of a head, when the
# queries of a group meet four keys:

# %%
from minillm.kernels.cpu import paged_attention as cpu
from minillm.kernels.cpu import vectors

show_part(vectors._make_dots, "def body", "]")

# %% [markdown]
# Each number is loaded once and used three or four times, and each pair of a query and a key has a sum of its own that
# stays in a register. The channels of a head lie side by side in memory. That is why a block is stored as
# `[head, token, channel]`: what one head reads is one contiguous stretch. Around it stands the loop over the keys of a
# block, four at a time:

# %%
show_part(cpu._scores, "for t in range(first, fours", "head += left")

# %% [markdown]
# `prefetch` asks the memory for rows of the *next* block while this one is worked on. The hardware guesses such things
# itself when data lie in one piece. It cannot guess what a block table says.
#
# The sum of weighted values has the same form. A value is loaded once for all queries of a group:

# %%
show_part(vectors._make_add_weighted, "def body", "]")

# %% [markdown]
# Around them stands the loop over the blocks of a sequence. You know it already. It is `add_block`, for every head,
# with the same three names, and in place of $e^x$ it takes $2^x$ (the scores are multiplied by $\log_2 e$ beforehand),
# which is cheaper for a machine:

# %%
show_part(cpu._attend_tile, "best = largest[head]", "_add_values(")

# %% [markdown]
# All query heads of a group are served by one reading of the block. So a group costs one reading from memory.
#
# (Where registers have 512 bits, 16 scores fit into one. There, all that happens between a group and a block of 16 keys
# is one piece of vectors, with the same steps in the same order: `attend_to_block` in `minillm/kernels/cpu/tiles.py`.)
#
# Now run it. The first call compiles, which can take half a minute. Where Numba has stored the result of an earlier
# compilation on the disk, it only loads that.

# %% tags=["nbval-ignore-output"]
begin = time.perf_counter()
fourth_way = cpu.paged_attention(q[None], k_cache, v_cache, *batch, **how)[0]
print(f"the first call took {time.perf_counter() - begin:.1f} s")

# %%
torch.testing.assert_close(fourth_way, third_way, atol=1e-5, rtol=1e-5)
compiled = cpu.paged_attention(*ragged, max_query_len=1, scale=64**-0.5)
torch.testing.assert_close(compiled, at_once, atol=1e-5, rtol=1e-5)
print("equal to the reference, on the small case and on eight sequences")

# %% [markdown]
# ### Who does what: dividing the work among threads
#
# A processor has several cores. The obvious division gives each thread some of the sequences. With lengths like ours
# this is bad, since everybody waits for whoever has the longest. (The threads of this picture are 4; yours depend on
# your machine.)

# %%
plot_shares(lengths, block_size=16, threads=4, title="A long sequence keeps one thread busy, or all of them")
plt.show()

# %% [markdown]
# Below is what the kernel does. All blocks of all sequences are laid end to end and cut into equal parts, wherever the
# cut falls. (Osama et al. 2023 divide matrix products like this.) Where a cut goes through a sequence, two threads have
# a part of it, and each leaves a `Partial`. At the end these are merged, as in section 3.
#
# In numbers, for the longest-working thread:


# %%
def blocks_of_the_busiest(shares):
    return max(sum(end - begin for _, begin, end in mine) for mine in shares)


uneven, even = (divide(lengths, 16, 4) for divide in (shares_by_sequence, shares_by_block))
total = sum(ceil(length / 16) for length in lengths)
print(f"{total} blocks; by sequences the busiest thread reads {blocks_of_the_busiest(uneven)},")
print(f"by blocks {blocks_of_the_busiest(even)}")
assert blocks_of_the_busiest(even) == ceil(total / 4)
print("thread 0 has (sequence, from block, to block):", [tuple(share) for share in even[0]])

# %% [markdown]
# This is the beginning of `_attend_part`: a thread finds its part between `at` and `stop`, and the token that its part
# begins in.

# %%
show_part(cpu._attend_part, "at, stop =", "begin, end =")

# %% [markdown]
# (`window` belongs to models whose tokens look back only so far. Blocks before it are not read at all. Blocks that all
# sequences begin with are read once for all, see notebook 12, section 5.)
#
# ### A prompt: many queries at once
#
# One query makes a dot product with each key. Many queries of the same sequence make a *matrix product* with the keys
# of a block, and another with its values: FlashAttention's form of what you know (Dao et al. 2022, §3.1). A row below
# is one query of one head. 48 rows or so meet a tile of 64 keys, six at a time, which is as many as there are registers
# for: their scores, the online softmax of each, then the weighted values. Nothing of the score matrix but 6 × 64
# numbers ever exists.

# %%
from minillm.kernels.cpu import prompt_attention

show_part(prompt_attention.attend_rows, "for tile in range", "add_products_narrow")

# %% [markdown]
# A tile that none of the six sees is skipped (`continue`); so a causal prompt costs half. Only a tile on the edge is
# masked. The keys are laid out anew before, so that 64 of them lie side by side for each channel: that costs one pass
# over them, and each is then used by every row.

# %%
torch.manual_seed(0)
prompt = torch.randn(200, 3, 64)
keys, values = torch.randn(2, 13, 1, 16, 64)
where = (torch.arange(13)[None], torch.tensor([0, 200]), torch.tensor([200]))
by_tiles = cpu.paged_attention(prompt, keys, values, *where, max_query_len=200, scale=1 / 8)
by_reference = reference.paged_attention(prompt, keys, values, *where, max_query_len=200, scale=1 / 8)
torch.testing.assert_close(by_tiles, by_reference, atol=1e-5, rtol=1e-5)
print("200 queries of a prompt, by tiles: equal to the reference")

# %% [markdown]
# ## 6 · The fifth way: a kernel for the GPU
#
# A GPU has on the order of a hundred multiprocessors (an H100 SXM has 132, says NVIDIA's whitepaper on its
# architecture), and each works on several things at once. One does not write loops over the work for such a machine.
# One writes what is to be done for *one piece*, and says how many pieces there are.
#
# In **Triton** (Tillet et al. 2019) such a piece is a **program**. All programs run the same function. Each asks
# for its number, `tl.program_id`, and works out from it what is its own. The numbers form a **grid** of up to three
# axes. Which programs run at the same time, and in which order, is not known, so none may wait for another. (CUDA calls
# a program a thread block. How such a program becomes instructions is the subject of notebook 10.)
#
# Inside, a program does not compute with single numbers but with small tensors, **tiles**, whose sizes are known at
# compile time and are powers of two.
#
# **Without a GPU** the same source runs in Triton's interpreter, which goes through the programs one by one and
# computes their tiles with NumPy. The choice is made where a function is decorated with `@triton.jit`, and Triton's own
# functions are decorated when it is imported. Hence the very first cell.

# %%
from minillm.kernels.gpu import paged_attention as gpu

assert os.environ["TRITON_INTERPRET"] == "1"
print(type(gpu._attend).__name__)

# %% [markdown]
# The kernel first finds out who it is: a tile of queries, a key/value head, a split.

# %%
show_part(gpu._attend, "QUERIES: tl.constexpr", "length =")

# %% [markdown]
# A program has up to `QUERIES` queries of *one* sequence, with all query heads that share its key/value head. They are
# packed as the rows of one tile: `ROWS` = queries × group. A key that was fetched meets all of them in one matrix
# product. Where one tile is enough for each sequence, the tile's number is the sequence's; else `_sequence_of` finds it
# by bisection in `query_starts`. A step with prompts and decodes is launched twice, with large tiles for sequences of
# many queries and small ones for those of few: `fewest` and `most` say whose turn it is.
#
# Now the loop. It goes over the sequence's keys in steps of `KEYS`:

# %%
show_part(gpu._attend, "for begin in range(", "if hides or")

# %% [markdown]
# `key` is a tile of positions, and `key // BLOCK_SIZE` their logical blocks. `tl.load` fetches the physical ones from
# the table, all at once. Then `place` says where in the cache each key begins: it is notebook 08's slot formula, once
# more. The mask `kept` makes sure that nothing is read that is not there. Keys and values are loaded, queries and keys
# multiplied. (The loop is written once and stands twice in the compiled code, by `hides`: large tiles of queries first
# go over the keys that all of them see, where nothing need be hidden.) Then:

# %%
show_part(gpu._attend, "best = tl.maximum", "largest = best")

# %% [markdown]
# For the third time the same lines, for all rows of the tile together: maximum, weights, shrink, sum, mean. One is new.
# A row may have seen nothing yet when *all* keys of a tile are hidden from it, and $-\infty - (-\infty)$ is no number.
# `finite` takes care of that; exercise 5 looks into it.

# %%
fifth_way = gpu.paged_attention(q[None], k_cache, v_cache, *batch, **how)[0]
torch.testing.assert_close(fifth_way, fourth_way, atol=1e-5, rtol=1e-5)
interpreted = gpu.paged_attention(*ragged, max_query_len=1, scale=64**-0.5)
torch.testing.assert_close(interpreted, compiled, atol=1e-5, rtol=1e-5)
print("equal to the compiled one, on the small case and on eight sequences")

# %% [markdown]
# How much of a program's tile was used in the small case? One query of two heads is 2 rows, and `tl.dot` wants at least
# 16 rows and 16 channels. The rest is computed and thrown away. Notebook 10 (section 4) counts what that costs.

# %%
tile = gpu.tile_of(torch.float32, head_dim=4, group=2, max_query_len=1)
print(f"{tile.rows} rows of which 2 are used, {tile.keys} keys at a time of which 10 are there")
assert tile.rows == 16

# %% [markdown]
# ### The grid: which program reads which block
#
# A mixed batch, as the engine makes them: 16 tokens of a prompt whose first 8 tokens are stored already, and two
# decodes; two key/value heads with two query heads each, blocks of 4. `program_grid` lists the programs with the
# kernel's own functions (`launches`, `num_splits`) and the arithmetic of its first lines.

# %%
small = {"kv_heads": 2, "group": 2, "head_dim": 8, "block_size": 4}
mixed = make_batch([24, 37, 10], [16, 1, 1], **small)
programs = program_grid(*mixed[3:], **small)
plot_programs(programs, num_blocks=len(mixed[1]), title="Each program goes through the blocks of its own sequence")
plt.show()

# %% [markdown]
# What to see:
#
# - The batch has both kinds, so there are two launches: number 0 for the decodes, with a tile for each sequence, and
#   number 1 for the prompt. Each has programs for the other's sequences, which return at once.
# - Sequence 0 has 16 new tokens, and a tile of 16 rows has room for 8 with 2 heads each. So two tiles read its blocks,
#   the second one more of them: the queries of the first see nothing that stands behind them.
# - Each program reads the same blocks as its neighbour for the other head, but another part of them. (A block holds the
#   keys of all heads.)
# - The second grid is `tokens // QUERIES + sequences` tiles, which depends on shapes only. That is at least as many as
#   are needed, and nobody has to ask the GPU for the numbers before the launch.
#
# Is the picture true? We can find out without looking into the kernel. **Poison** one block: set its values to `nan`
# and see whose outputs become `nan`. Those have read it.


# %%
def who_reads(block):
    """(token, head) of all outputs that depend on this block's values."""
    q, k_cache, v_cache, *where = mixed
    poisoned = v_cache.clone()
    poisoned[block] = nan
    out = gpu.paged_attention(q, k_cache, poisoned, *where, max_query_len=16, scale=8**-0.5)
    return {tuple(pair) for pair in out.isnan().any(dim=-1).nonzero().tolist()}


def drawn_readers(block):
    """The same by the picture: all queries of the programs that read the block, in both heads of their group."""
    readers = [program for program in programs if block in program.blocks]
    return {(token, 2 * p.kv_head + turn) for p in readers for token in p.queries for turn in range(2)}


for block in range(len(mixed[1])):
    assert who_reads(block) == drawn_readers(block)
print(f"{len(mixed[1])} blocks poisoned one by one: exactly the drawn programs noticed")

# %% [markdown]
# And the result of this mixed batch, in all three versions that take one:

# %%
by_all = [way.paged_attention(*mixed, max_query_len=16, scale=8**-0.5) for way in (reference, cpu, gpu)]
for one in by_all[1:]:
    torch.testing.assert_close(one, by_all[0], atol=1e-5, rtol=1e-5)
print("reference, Numba and Triton agree on prompts and decodes in one batch")

# %% [markdown]
# ### Splits
#
# Three decodes with one key/value head are three programs, for 132 multiprocessors. Here is the second place of
# split-KV: if there are too few programs, each sequence's keys are divided among several, which leave their `Partial`s,
# and a second kernel merges them.

# %%
show_source(gpu.num_splits)

# %% [markdown]
# It asks for four programs for each multiprocessor: several fit on one at a time, and the last ones even out the load.
# But it gives nobody fewer than 256 keys, since a program and the merging cost something too. Here for a machine of 4
# multiprocessors, which is what the kernel assumes in the interpreter:

# %%
plot_explored_programs("three decodes")
plt.show()
lengths3 = [600, 40, 200]
decodes = make_batch(lengths3, [1, 1, 1], kv_heads=1, group=3, head_dim=64, block_size=32)
split = gpu.paged_attention(*decodes, max_query_len=1, scale=64**-0.5)
torch.testing.assert_close(split, reference.paged_attention(*decodes, max_query_len=1, scale=64**-0.5))

# %% [markdown]
# ### Try it
#
# With a running kernel, move the controls. Predict before you move:
#
# 1. *three decodes*: raise the key/value heads from 1 to 3. How many programs are there? How many of them read block 0?
# 2. *three decodes*, one key/value head: move the query heads for each from 1 to 8. What changes, and why?
# 3. *one long decode*: it has 1,000 tokens, in 4 splits. Will 8 multiprocessors make more of them?
# 4. *three decodes* with a sliding window of 32 tokens: how many of sequence 0's 19 blocks are still read?
# 5. *a whole prompt*: move the query heads per key/value head from 2 to 8. What happens to the number of programs?

# %% tags=["nbval-ignore-output"]
explore_programs()

# %% [markdown]
# <details><summary>Answers</summary>
#
# 1. 18: three sequences × three heads × two splits. Three of them read block 0, one for each head.
# 2. What is read stays the same: the query heads are rows of the same tile, which has 16 rows anyway. From 5 heads on,
#    the tile has room for 3 queries or fewer, and the bound on the number of tiles (3 // 3 + 3) adds programs that
#    return at once.
# 3. No: there would be fewer than 256 keys for each. (The table has room for 1,024, and 1,024 / 256 = 4.)
# 4. Two. The window begins in the middle of block 17, which is read as a whole and masked.
# 5. It grows from 6 to 21. A tile has 16 rows: room for 8 queries with 2 heads each, but only for 2 queries with 8
#    heads. So there are more tiles, and each block is read more often.
#
# </details>

# %% [markdown]
# Counted:


# %%
def grid_of(lengths, queries, block_size, *, kv_heads=1, group=3, **how):
    where = scattered_tables(lengths, block_size), torch.tensor([0, *queries]).cumsum(0), torch.tensor(lengths)
    return program_grid(*where, block_size=block_size, kv_heads=kv_heads, group=group, head_dim=64, **how)


three = lengths3, [1, 1, 1], 32
more_heads = grid_of(*three, kv_heads=3)
assert (len(more_heads), sum(0 in program.blocks for program in more_heads)) == (18, 3)
assert [p.blocks for p in grid_of(*three, group=8) if p.blocks] == [p.blocks for p in grid_of(*three)]
assert len(grid_of([1000], [1], 32, processors=8)) == 4
assert sum(len(program.blocks) for program in grid_of(*three, window=32) if program.seq == 0) == 2
assert [len(grid_of([40], [40], 4, group=heads)) for heads in (2, 8)] == [6, 21]

# %% [markdown]
# ## 7 · Measured, where it is fair
#
# Four of the five ways run on this processor, on the same tensors, and give the same numbers. So they can be compared:
# 32 decodes with 32 to 512 tokens each, in the shapes of SmolLM2, one layer. Each is run several times, and the best
# time counts.
#
# The fifth is *not* measured. The interpreter runs its programs one after the other in Python, and what a clock would
# tell is how fast Python interprets. It says nothing about the kernel, not even whether a change makes it better or
# worse. Triton is measured on a GPU or not at all.

# %%
many = make_batch([32 + 480 * row // 31 for row in range(32)], [1] * 32, **smollm)
ways = {
    "textbook, key by key": lambda: one_by_one(textbook, *many),
    "block by block": lambda: one_by_one(block_by_block, *many),
    "gathered (reference)": lambda: reference.paged_attention(*many, max_query_len=1, scale=64**-0.5),
    "compiled (Numba)": lambda: cpu.paged_attention(*many, max_query_len=1, scale=64**-0.5),
}
outputs = [way() for way in ways.values()]
for output in outputs[:-1]:
    torch.testing.assert_close(output, outputs[-1], atol=1e-5, rtol=1e-5)
print("four ways, the same outputs")


# %% tags=["nbval-ignore-output"]
def milliseconds(way, repeats):
    """The best of some trials."""
    trials = []
    for _ in range(repeats):
        begin = time.perf_counter()
        way()
        trials.append(1000 * (time.perf_counter() - begin))
    return min(trials)


times = dict.fromkeys(ways, inf)
for _ in range(4):  # in turns, so that a busy moment of the machine does not meet one way only
    for (name, way), repeats in zip(ways.items(), (1, 2, 12, 50), strict=True):
        times[name] = min(times[name], milliseconds(way, repeats))
plot_times(times, title="The same attention: 32 sequences, one layer, on this processor")
plt.show()

# %% [markdown]
# The axis is logarithmic: each mark is ten times the one before. Block by block beats key by key because it calls
# PyTorch once a block where the other calls it once a key, not because less is read. The step from the gather to the
# compiled loop is of another kind. Here both run in compiled code, and what is saved are the copies and the padding.
# The gathers alone:

# %% tags=["nbval-ignore-output"]
alone = milliseconds(lambda: [reference._gather(cache, many[3]) for cache in many[1:3]], 40)
print(f"copying keys and values: {alone:.2f} ms")
print(f"the whole Numba kernel:  {times['compiled (Numba)']:.2f} ms")

# %% [markdown]
# Be careful with such small numbers all the same. How much data is it?

# %%
kept = 2 * int(many[-1].sum()) * 3 * 64 * 4
print(f"keys and values of the batch: {kept / 1e6:.0f} MB")
assert kept < 16e6

# %% [markdown]
# That may fit into the last cache of a server's processor, and then it is the cache that was measured, not the memory.
# A real model has thirty such layers, and what one layer leaves in the cache is gone before the same layer comes again.
#
# ## 8 · In the engine
#
# The engine knows nothing of all this. The paged store of notebook 08 hands every layer's keys, values and queries to
# its **backend**, functions with the signatures of `reference.write_kv` and `reference.paged_attention`. A backend may
# also split attention in two: what all layers of a step have in common (where the work is cut) is planned once:

# %%
show_part(PagedKVCache.attend, "batch =", "return self._attend")

# %% [markdown]
# Where the backend can turn the keys while it writes them (notebook 10 says why), and the model's norms allow it, the
# engine calls this instead, and attention is the same:

# %%
show_part(PagedKVCache.rotate_and_attend, "q = operation(", "return self._attend")

# %%
show_source(PagedKVCache._attend)

# %% [markdown]
# `LLM(..., attention_backend=…)` chooses: `"reference"` on any device, `"numba"` on a CPU, `"triton"` on an NVIDIA
# card, and by default `"auto"`, which takes the device's own. Whoever attends, the tokens are the same:

# %%
params = SamplingParams(temperature=0, max_tokens=24)
prompts = [
    "Once upon a time, in a small house near the farm,",
    "Nora had a red hat.",
    "Sam was a clever boy. One evening",
]
answers, used = {}, {}
for name in ("reference", "auto"):
    with LLM("tiny", dtype="float32", device="cpu", attention_backend=name) as llm:
        used[name] = llm.engine.runner.kv.backend.name
        answers[name] = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
tokens = {name: [answer.token_ids for answer in all_three] for name, all_three in answers.items()}
assert tokens["reference"] == tokens["auto"]
assert used == {"reference": "reference", "auto": "numba"}
print(prompts[0] + answers["auto"][0].text)

# %% [markdown]
# ## What to take along
#
# | | reads keys and values | holds for each query | who works at the same time |
# | --- | --- | --- | --- |
# | textbook | one by one | all scores | nobody |
# | block by block | each block once a head | $2 + d$ numbers, a block's scores | nobody |
# | gathered | once, then a padded copy | all scores | whatever PyTorch does |
# | Numba | each block once a key/value head | $2 + d$ numbers, a block's scores | threads, with equally many blocks |
# | Triton | once a program | $2 + d$ numbers, a tile's scores | programs: query tiles × key/value heads × splits |
#
# - To find a key, ask the table. All else is the order of the work.
# - The online softmax carries a maximum, a sum and an undivided mean; a new maximum shrinks the other two.
# - Partial results merge in any order, so that the keys of one query can be divided among many workers.
# - Gathering is right and simple. It copies everything for each token, padded to the longest.
# - An interpreter can show that a kernel computes the right thing, never that it is fast.
#
# ## Sources
#
# - Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP.
# - Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", arXiv:1805.02867.
# - Dao, Fu, Ermon, Rudra and Ré 2022, "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
#   NeurIPS.
# - Dao, Haziza, Massa and Sizov 2023, "Flash-Decoding for long-context inference", blog of PyTorch.
# - Lam, Pitrou and Seibert 2015, "Numba: a LLVM-based Python JIT compiler", LLVM-HPC.
# - Osama, Merrill, Cecka, Garland and Owens 2023, "Stream-K: Work-Centric Parallel Decomposition for Dense
#   Matrix-Matrix Multiplication on the GPU", PPoPP.
# - Tillet, Kung and Cox 2019, "Triton: an intermediate language and compiler for tiled neural network computations",
#   MAPL.
#
# ## Exercises
#
# Replace each `None`; when the answer is right, the cell says so.
#
# **1.** Many workers have each left a `Partial`. Write `merge_all` without a loop: the *output* from stacked states,
# `largest` and `total` of shape `[parts]` and `mean` of shape `[parts, head_dim]`. (The kernels' `_merge` does this.)


# %%
def merge_all(largest, total, mean):
    """The output of attention over all parts' keys: [head_dim]."""
    return None


parts = [add_block(nothing(4), query, *piece) for piece in pieces]
stacked = [torch.stack(numbers) for numbers in zip(*parts, strict=True)]
if merge_all(*stacked) is not None:
    torch.testing.assert_close(merge_all(*stacked), first_way[0])
    high = stacked[0] + 200, *stacked[1:]  # all scores larger by 200: the same output
    torch.testing.assert_close(merge_all(*high), first_way[0], msg="subtract the largest of the maxima first")
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def merge_all(largest, total, mean):
#     weight = (largest - largest.max()).exp()
#     return weight @ mean / (weight @ total)
# ```
#
# </details>
#
# **2.** In a model with a sliding window, a token sees the last `window` tokens only, itself included. Write the block
# loop for one head: read no block that lies wholly before the window, and of the first one that is left only the part
# inside.


# %%
def with_window(query, k_cache, v_cache, blocks, length, window):
    """Output of one query (scaled already) on key/value head 0: [head_dim]."""
    return None


if with_window(query, k_cache, v_cache, table.blocks, 10, 4) is not None:
    for window in (1, 2, 3, 4, 7, 10, 50):
        ours = with_window(query, k_cache, v_cache, table.blocks, 10, window)
        theirs = reference.paged_attention(q[None], k_cache, v_cache, *batch, **how, window=window)[0, 0]
        torch.testing.assert_close(ours, theirs, msg=f"wrong with a window of {window}")
    with_window(query, k_cache, v_cache, [999, 1, 3], 10, 4)  # block 999 does not exist: it must not be read
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def with_window(query, k_cache, v_cache, blocks, length, window):
#     size, since = k_cache.shape[2], max(0, length - window)
#     done = nothing(len(query))
#     for number in range(since // size, ceil(length / size)):
#         inside = slice(max(0, since - number * size), length - number * size)
#         here = blocks[number], 0, inside
#         done = add_block(done, query, k_cache[here], v_cache[here])
#     return done.weighted / done.total
# ```
# The engine can even give the blocks before the window back, if every layer has one.
#
# </details>
#
# **3.** One user, one sequence of 32,768 tokens, 8 key/value heads with 4 query heads each, on an H100 with its 132
# multiprocessors. How many programs does the kernel launch for a decode? How many would it be without splits?

# %%
launched, without_splits = None, None

if launched is not None and without_splits is not None:
    tables = torch.arange(2048)[None]  # blocks of 16
    shape = {"block_size": 16, "kv_heads": 8, "group": 4, "head_dim": 128, "dtype": torch.bfloat16}
    grid = program_grid(tables, torch.tensor([0, 1]), torch.tensor([32_768]), **shape, processors=132)
    assert without_splits == sum(program.split == 0 for program in grid), "query tiles × key/value heads"
    assert launched == len(grid), "4 · 132 wanted, at most MAX_SPLITS = 64 splits"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `launched, without_splits = 512, 8`. Wanted are ⌈4 · 132 / 8⌉ = 66 splits; 32,768 / 256 = 128 would be worthwhile;
# at most 64 are made. Without them, 124 of the 132 multiprocessors would have nothing to do.
#
# </details>
#
# **4.** A server decodes 63 chats of 100 tokens and one document of 4,000, in the shapes of SmolLM2 (3 key/value heads
# of 64 channels), bfloat16, blocks of 16. How many bytes of keys and values must a layer's attention read, and how many
# does the gather's rectangle have?

# %%
must_read, rectangle = None, None

if must_read is not None and rectangle is not None:
    crowd = Gathered.of([100] * 63 + [4000], block_size=16)
    token_bytes = 2 * 3 * 64 * 2
    assert must_read == sum(crowd.needed) * token_bytes, "keys and values, 2 bytes a number"
    assert rectangle == sum(map(sum, crowd)) * token_bytes, "64 rows, each as long as the longest"
    print(f"right: {rectangle / must_read:.0f} times as much")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `must_read, rectangle = (63 * 100 + 4000) * 768, 64 * 4000 * 768`, where 768 = 2 · 3 · 64 · 2 are the bytes of a
# token: 7.9 MB and 197 MB. One long text makes the gather of all the short ones expensive.
#
# </details>
#
# **5.** With a mask, a block may hold nothing that a query sees: all its scores are $-\infty$. If that happens at the
# *first* block, `add_block` gives `nan`. Why? Write a version that is safe.


# %%
hidden = torch.full((4,), -inf)
broken = (hidden - torch.maximum(torch.tensor(-inf), hidden.max())).exp()
print("weights of a block that is hidden:", broken.tolist())


def add_scores(done, scores, values):
    """As `add_block`, from scores of which any may be -inf."""
    return None


if add_scores(nothing(4), hidden, v[:4, 0]) is not None:
    done = add_scores(nothing(4), hidden, v[:4, 0])
    assert not any(part.isnan().any() for part in done), "-inf - (-inf) is no number"
    assert done.total == 0, "nothing has been seen yet"
    for keys, values in pieces:
        done = add_scores(done, keys @ query, values)
    torch.testing.assert_close(done.weighted / done.total, first_way[0])
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def add_scores(done, scores, values):
#     best = torch.maximum(done.largest, scores.max())
#     finite = torch.where(best == -inf, 0.0, best)
#     shrink, weights = (done.largest - finite).exp(), (scores - finite).exp()
#     return Partial(best, done.total * shrink + weights.sum(), done.weighted * shrink + weights @ values)
# ```
# Both differences were $-\infty - (-\infty)$, which is `nan`. With a finite number in place of the maximum they are
# $-\infty$, and $e^{-\infty} = 0$. It is the line with `finite` of the Triton kernel.
#
# </details>
#
# ---
# **Back:** [08_paged_blocks](08_paged_blocks.ipynb) · **Next:** [10_triton_kernels](10_triton_kernels.ipynb): how a
# Triton kernel is written, from adding two vectors on, and how one tells without a GPU what it will do.
