# %% [markdown]
# # 08 · Blocks and block tables
#
# A sequence should get memory as it grows, a little at a time, from wherever some is free. Operating systems give
# memory to programs in this way. This notebook builds it for keys and values: a pool of blocks, and a table for each
# sequence.
#
# **By the end of this notebook you will be able to**
#
# - translate a token's position into the slot where its key and value lie, through a block table;
# - say after any allocation and release which blocks are free, and which one is given out next;
# - show that a model gives the same logits when its memory lies in scattered blocks;
# - explain reference counts, forks, and when a write needs a copy first;
# - explain how a prompt's beginning is found by its content, why the hashes are chained, and what is evicted when.
#
# **You need** notebooks [06](06_kv_cache.ipynb) (the KV cache) and [07](07_memory_waste.ipynb) (what
# reservation wastes). No GPU.
#
# **New here**: notebook 07 counted what blocks save; here they are built. Two things come with them that no stretch of
# memory could do: sequences share blocks, and a prompt's beginning that was computed once is found again.
#
# **Time**: about 75 minutes (it runs in about 15 s on two cores).

# %%
import random
from collections import Counter

import matplotlib.pyplot as plt
import torch

import minillm
from minillm import LLM, SamplingParams
from minillm.cache.block_pool import ROOT, BlockPool, block_hash
from minillm.cache.block_table import BlockTable
from minillm.cache.contiguous import ContiguousCache
from minillm.cache.paged import PagedBatch, PagedKVCache
from minillm.cache.reference import write_kv
from minillm.errors import CacheFullError
from minillm.transformer.kv import PaddedBatch
from minillm.viz import explore_blocks, plot_blocks, show_source, token_names

model = minillm.load_model("tiny", dtype="float32", device="cpu")
tokenizer = minillm.get_tokenizer("tiny")
config = model.config

# %% [markdown]
# ## 1 · The idea: pages
#
# A program sees its memory as one long stretch of bytes. It does not lie like that. The operating system cuts the
# machine's memory into **pages** of equal size, gives a program pages from anywhere, and keeps a **page table** for
# each: the first stretch of its memory is in page 71, the next in page 12, and so on. (The Atlas computer did this
# first: Kilburn et al. 1962, "One-Level Storage System".) Because all pages are equal, any free page fits anybody.
#
# Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", §4.1–4.3, do
# the same with keys and values. They give the dictionary themselves (§1):
#
# | operating system | language model |
# | --- | --- |
# | byte | token (its keys and values) |
# | page | block of `block_size` tokens |
# | process | request |
# | page table | block table |
#
# What is a block, physically? Nothing but a number. All keys and values lie in one large tensor, and one axis of it
# counts the blocks. Block 3 stands for the same few slots in **every layer**, for keys and for values, so one table
# serves the whole model.

# %%
cache = PagedKVCache(config, num_blocks=6, block_size=4)
print("[keys or values, layers, blocks, kv_heads, block_size, head_dim]")
print(list(cache.store.shape))
block_bytes = cache.store[:, :, 3].numel() * cache.store.element_size()
assert block_bytes == 4 * config.kv_bytes_per_token(torch.float32)
print(f"one block of 4 tokens: {block_bytes / 2**10:.0f} KiB over all {config.num_layers} layers")

# %% [markdown]
# The cache does not know who owns what. That is bookkeeping with small integers, and it is done by two classes of
# about a hundred lines each: `BlockPool` and `BlockTable`. Blocks in this notebook hold 4 tokens, so that they can be
# drawn. In the engine it is 16.
#
# ## 2 · The pool
#
# The pool knows for each block how many hold it (0: it is free), and it keeps the free ones in a queue.

# %%
show_source(BlockPool.__init__)

# %% [markdown]
# `hashes` and `_by_hash` are for section 6. To **allocate** is to take the block at the front of the queue. To
# **free** is to put a block at the back, once nobody holds it any more:

# %%
show_source(BlockPool.allocate)

# %%
show_source(BlockPool.free)

# %% [markdown]
# Let us take three blocks, and give the middle one back.

# %%
pool = BlockPool(num_blocks=6, block_size=4)
taken = [pool.allocate() for _ in range(3)]
plot_blocks(pool, title=f"Blocks {taken} are taken; the next one is block {pool.free_blocks[0]}")
plt.show()

# %%
pool.free([1])
assert pool.ref_counts == [1, 0, 1, 0, 0, 0]
assert pool.free_blocks == (3, 4, 5, 1)
plot_blocks(pool, title="Block 1 is free again, and goes to the end of the queue")
plt.show()

# %% [markdown]
# There is a hole now, and it does not matter: nobody will ever ask for two neighbouring blocks. What was given back
# last is given out last. Why not at once? A free block keeps its content until somebody else writes into it, and
# section 7 makes use of that.
#
# The queue is an `OrderedDict` and not a list, because a block must also be taken out of its *middle* at once. So each
# operation takes the same time, however many blocks there are. When the queue is empty, an error says so:

# %%
rest = [pool.allocate() for _ in range(pool.num_free)]
print("the rest, in order:", rest)
try:
    pool.allocate()
except CacheFullError as error:
    print("CacheFullError:", error)

# %% [markdown]
# ## 3 · The table
#
# A `BlockTable` is one sequence's list of blocks, in the order of its tokens. It grows by `append`. Read the end of
# the method first: as many blocks are allocated as are needed. The two branches above it are for blocks that others
# hold or know, and their turn comes in sections 5 and 8.

# %%
show_source(BlockTable.append)

# %% [markdown]
# Now two requests, A and B. Both have read their prompts, and both write one token after the other, in turns.

# %%
story = "There was once a curious girl whose name was Nora. She had a red hat and a small white cup."
text = tokenizer(story).input_ids
other = tokenizer("Once upon a time, in a small house near the farm, lived a clever boy.").input_ids
names = {"A": token_names(tokenizer, text), "B": token_names(tokenizer, other)}

pool = BlockPool(num_blocks=6, block_size=4)
a, b = BlockTable(pool), BlockTable(pool)
a.append(6)
b.append(3)
for _ in range(4):
    a.append(1)
    b.append(1)
    print(f"A: {a.num_tokens:2d} tokens in blocks {a.blocks}    B: {b.num_tokens} tokens in blocks {b.blocks}")

# %% [markdown]
# A new block is taken only when the last one is full. A's blocks do not lie together, since B took one in between.
# Above, the pool in **physical** order. Below, each request's blocks in **logical** order: its own.

# %%
assert (a.blocks, b.blocks) == ([0, 1, 4], [2, 3])
title = "Each request sees one text; its blocks lie where there was room"
plot_blocks(pool, {"A": a, "B": b}, tokens=names, title=title)
plt.show()

# %% [markdown]
# ### From a position to a slot
#
# The pool has `num_blocks × block_size` slots, counted through. Where does token $i$ of a sequence lie? It belongs to
# the sequence's logical block $\lfloor i / \text{block size} \rfloor$, at place $i \bmod \text{block size}$ in it. The
# table says which physical block that is. So
#
# **slot = blocks[i // block_size] · block_size + i % block_size**
#
# By hand for A's tokens, and then by the package:

# %%
by_hand = [a.blocks[i // 4] * 4 + i % 4 for i in range(a.num_tokens)]
print("position", list(range(a.num_tokens)))
print("slot    ", by_hand)
assert by_hand == a.slots(0, a.num_tokens)

# %% [markdown]
# These numbers are what the engine sends to the model in each step, under the name **slot mapping**:

# %%
show_source(BlockTable.slots)

# %% [markdown]
# ## 4 · Does it give the same?
#
# So far we have moved integers. Does a model whose memory is scattered like this still compute the same? We put it to
# the test on `tiny`, with blocks of which none lies beside its neighbour. First the pool's queue is shuffled, by taking
# every block and giving them back in another order:

# %%
pool = BlockPool(num_blocks=6, block_size=4)
for _ in range(6):
    pool.allocate()
pool.free([4, 1, 5, 0, 3, 2])
table = BlockTable(pool)
table.append(18)
assert table.blocks == [4, 1, 5, 0, 3]
title = "18 tokens in five blocks, none beside its neighbour"
plot_blocks(pool, {"text": table}, tokens={"text": names["A"]}, title=title)
plt.show()

# %% [markdown]
# Then the model. A `PagedBatch` is what this store must be told about a call's tokens. They come without padding, one
# sequence after the other. Here is a call with a single sequence, whose tokens stand at `start` and after:


# %%
@torch.inference_mode()
def run_paged(ids, start, table, cache, copies=()):
    """Logits after each of `ids`, whose slots `table` has: [len(ids), vocab]."""
    end = start + len(ids)
    batch = PagedBatch(
        slot_mapping=torch.tensor(table.slots(start, end)),  # where each new key and value goes
        query_starts=torch.tensor([0, len(ids)]),  # which of the tokens are whose
        seq_lens=torch.tensor([end]),  # how far each sequence reaches now
        block_tables=torch.tensor([table.blocks]),  # where its older tokens are
        max_query_len=len(ids),  # the most tokens that one sequence brings
        copies=copies,  # section 5
    )
    cache.begin(batch)
    return model(torch.tensor(ids), torch.arange(start, end), cache)


# %% [markdown]
# For comparison, the contiguous store of notebook 06. The same text goes through both.


# %%
@torch.inference_mode()
def run_contiguous(ids, start, cache):
    """The same on a contiguous store of one row."""
    batch = PaddedBatch.full(1, len(ids), start)
    cache.begin(batch)
    return model(torch.tensor([ids]), batch.positions(), cache)[0]


cache = PagedKVCache(config, num_blocks=6, block_size=4)
plain = ContiguousCache.for_decoder(model, max_len=24)
assert torch.allclose(run_paged(text[:18], 0, table, cache), run_contiguous(text[:18], 0, plain), atol=1e-4)
print("the same logits for all 18 tokens")

# %% [markdown]
# Each layer has written its keys and values by the slot mapping. This is the writing, in the form that defines what is
# right:

# %%
show_source(write_kv)

# %% [markdown]
# Let us read them back by hand, slot by slot, and compare with the contiguous store, where slot and position are the
# same. If the tokens are read in physical order instead, they do not agree:


# %%
def stored(blocks, num_tokens):
    """Keys and values of tokens, their blocks read in this order: [2, layers, kv_heads, num_tokens, head_dim]."""
    in_order = cache.store[:, :, blocks]  # [2, layers, blocks, kv_heads, block_size, head_dim]
    return in_order.transpose(2, 3).flatten(3, 4)[:, :, :, :num_tokens]


contiguous = torch.stack([torch.stack(plain.k), torch.stack(plain.v)])[:, :, 0, :, :18]
assert torch.allclose(stored(table.blocks, 18), contiguous, atol=1e-4)
assert not torch.allclose(stored(sorted(table.blocks), 18), contiguous, atol=1e-1)
print("in logical order, every key and value of every layer is where it should be")

# %% [markdown]
# It goes on like this token by token. Each `append` may take a block, and the model does not notice.

# %%
for position in range(18, 22):
    table.append(1)
    logits = run_paged([text[position]], position, table, cache)
    assert torch.allclose(logits, run_contiguous([text[position]], position, plain), atol=1e-4)
    print(f"token {position}: slot {table.slots(position, position + 1)[0]:2d}, block {table.blocks[-1]}, same logits")

# %% [markdown]
# How a query *looks at* keys that lie scattered, and how to do it fast, is the subject of notebook 09. In this one it
# is enough that it can.
#
# ## 5 · Sharing: reference counts, fork, copy-on-write
#
# A user asks for three answers to one prompt. The keys and values of the prompt are the same for all three. In a
# contiguous store each row needs its own copy. With tables, three lists may simply name the same blocks. This is what
# the **reference count** is for: a block is free when the last holder gives it back, not the first.

# %%
show_source(BlockTable.fork)

# %% [markdown]
# A prompt of 10 tokens lies in three blocks, the last one half full:

# %%
pool = BlockPool(num_blocks=6, block_size=4)
cache = PagedKVCache(config, num_blocks=6, block_size=4)
parent = BlockTable(pool)
parent.append(10)
run_paged(text[:10], 0, parent, cache)
words = {"parent": names["A"], "child": names["A"]}
plot_blocks(pool, {"parent": parent}, tokens=words, title="Before the fork: one sequence in three blocks")
plt.show()

# %%
child = parent.fork()
assert child.blocks == parent.blocks
assert pool.ref_counts == [2, 2, 2, 0, 0, 0]
both = {"parent": parent, "child": child}
plot_blocks(pool, both, tokens=words, title="After the fork: two sequences, the memory of one")
plt.show()

# %% [markdown]
# No key was copied. But now the two answers go on with different tokens, and the next token of both belongs into the
# third slot of block 2. Whoever comes first must not write there, since the other one still reads this block. So it
# takes a block of its own, and what the shared block holds must be **copied** before it writes. This is
# **copy-on-write**, again from operating systems (Kwon et al. 2023, §4.4).
#
# `append` does the bookkeeping and returns the copies that somebody has to make:

# %%
copies = parent.append(1)
print(copies)
assert copies == [(2, 3)]
assert pool.ref_counts == [2, 2, 1, 1, 0, 0]
words = {"parent": [*names["A"][:10], "␣first"], "child": names["A"]}
plot_blocks(pool, both, tokens=words, title="After the parent's first write: only the last block exists twice")
plt.show()

# %% [markdown]
# The table knows nothing of tensors. The store makes the copies, in all layers, at the beginning of the call and before
# anything is written:

# %%
show_source(PagedKVCache.begin)

# %% [markdown]
# When the child writes, nobody shares its last block any more. It needs no copy. Both then have to get the logits that
# they would get alone:

# %%
first, second = tokenizer(" first").input_ids[-1], tokenizer(" Hana").input_ids[-1]
from_parent = run_paged([first], 10, parent, cache, copies)
assert child.append(1) == []
from_child = run_paged([second], 10, child, cache)
for token, logits in ((first, from_parent), (second, from_child)):
    alone = run_contiguous([*text[:10], token], 0, ContiguousCache.for_decoder(model))
    assert torch.allclose(logits[-1], alone[-1], atol=1e-4)
print("two sequences on shared blocks, each with its own logits")

# %% [markdown]
# What if the copy is forgotten? Then the parent's new block would have two tokens missing, and nothing would tell us
# but the logits. Section 9 looks for mistakes of this kind.
#
# **Full blocks are never copied.** Tokens are only added behind a sequence's end, so a full block is not written again.
# (Section 8 takes tokens back, and must take care.) However long the prompt, each further answer costs at most one
# block for the copy, and those for its own tokens. With a prompt that ends at the end of a block, there is no copy at
# all:

# %%
pool = BlockPool(num_blocks=6, block_size=4)
parent = BlockTable(pool)
parent.append(8)
forks = [parent, parent.fork(), parent.fork()]
assert [fork.append(1) for fork in forks] == [[], [], []]
print("blocks:", [fork.blocks for fork in forks], "counts:", pool.ref_counts)
assert pool.ref_counts == [3, 3, 1, 1, 1, 0]

# %% [markdown]
# Notebook 12 measures what this saves, for several answers and for beams.
#
# ## 6 · Meeting again: prefix reuse
#
# A fork shares what *one* request computed. But different requests often begin alike: the same instructions before
# every user's question, or the whole conversation so far before the next message. Their tables know nothing of each
# other. Can the second request find the first one's blocks?
#
# It can if blocks are known by their **content**. A full block never changes, so a hash of its content can be its name.
# But of which content?
#
# Not just of the block's own tokens. We compute the keys of the same four tokens at the same positions, once after one
# beginning and once after another:

# %%
ending = text[4:8]
beginnings = [text[:4], other[:4]]
keys = []
for beginning in beginnings:
    plain = ContiguousCache.for_decoder(model, max_len=8)
    run_contiguous([*beginning, *ending], 0, plain)
    keys.append(torch.stack(plain.k)[:, 0, :, 4:8])  # [layers, kv_heads, 4, head_dim]

# %%
differences = (keys[0] - keys[1]).abs().amax(dim=(1, 2, 3))
for layer, difference in enumerate(differences):
    print(f"layer {layer}: the keys of {''.join(names['A'][4:8])} differ by up to {difference:.2f}")
assert differences[0] < 1e-5
assert (differences[1:] > 0.1).all()

# %% [markdown]
# In layer 0 a key is made of its own token and position only. In every later layer it is made of vectors that have
# attended to all tokens before. So keys and values of a block depend on **everything up to its end**, and the name must
# as well. Hashing the whole beginning for each block would take time that grows with the square of its length. Instead,
# each hash takes in the hash of the block before, and through it all that came earlier:

# %%
show_source(block_hash)


# %%
def chain(tokens, size=4):
    """The names of the full blocks of a text, each made of the one before and its own tokens."""
    hashes = [ROOT]
    for start in range(0, len(tokens) - size + 1, size):
        hashes.append(block_hash(hashes[-1], tokens[start : start + size]))
    return hashes[1:]


after_text, after_other = (chain([*beginning, *ending])[-1] for beginning in beginnings)
print(after_text.hex(), after_other.hex(), sep="\n")
assert after_text != after_other
assert chain(text[:12]) == chain(text[:19])[:3]  # what comes later changes no name

# %% [markdown]
# The position need not be hashed: it follows from how many blocks stand before. (`extra` is for whatever else changes
# keys, such as weights that only some requests use.)
#
# The pool keeps a dictionary from names to blocks. `remember` adds a block that has just become full, `find` asks:

# %%
show_source(BlockPool.remember)

# %%
show_source(BlockPool.find)

# %% [markdown]
# The first request, C, computes 10 tokens. Its two full blocks can be found from now on (`#` in the picture). The
# third is not full: it will still change, so it has no name.

# %%
pool = BlockPool(num_blocks=6, block_size=4)
cache = PagedKVCache(config, num_blocks=6, block_size=4)
c = BlockTable(pool)
c.append(10)
run_paged(text[:10], 0, c, cache)
for block, content in zip(c.blocks, chain(text[:10]), strict=False):
    pool.remember(block, content)

# %% [markdown]
# Then comes D. Its first 8 tokens are C's, the rest is its own. It looks for its blocks one after the other, stops at
# the first that is not there, and **adopts** what it has found: one more reference for each, and 8 tokens are done.


# %%
def beginning_found(pool, tokens):
    """The blocks that hold the text's beginning already."""
    found = []
    for content in chain(tokens):
        block = pool.find(content)
        if block is None:
            break
        found.append(block)
    return found


d_text = [*text[:8], *other[8:12]]
d = BlockTable(pool)
d.adopt(beginning_found(pool, d_text))
assert (d.blocks, d.num_tokens) == ([0, 1], 8)

# %% [markdown]
# Only the other four tokens go through the model. Their logits are those of a model that reads all of it:

# %%
d.append(4)
logits = run_paged(d_text[8:], 8, d, cache)
alone = run_contiguous(d_text, 0, ContiguousCache.for_decoder(model))
assert torch.allclose(logits, alone[8:], atol=1e-4)
words = {"C": names["A"], "D": token_names(tokenizer, d_text)}
plot_blocks(pool, {"C": c, "D": d}, tokens=words, title="D found two of its blocks and computed one")
plt.show()

# %% [markdown]
# The idea of a shared beginning is in Kwon et al. 2023, §4.4, for prefixes that the server's operator sets aside.
# Finding any beginning, of any earlier request, came with SGLang's radix tree (Zheng et al. 2024, §3). The chained
# hashes are vLLM's way, and ours.
#
# ### On the real engine
#
# The engine does exactly this. A request keeps the hashes of its blocks, the scheduler looks for them before it gives
# the request its first step, and the output says how many tokens were found:

# %%
sizes = {"block_size": 4, "num_gpu_blocks_override": 18, "max_model_len": 48}
llm = LLM("tiny", dtype="float32", device="cpu", **sizes)
greedy = SamplingParams(temperature=0, max_tokens=4)
for prompt in (text[:10], d_text, d_text):
    [output] = llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
    print(f"{len(prompt)} tokens, {output.num_cached_tokens:2d} found: {output.outputs[0].text!r}")

# %% [markdown]
# The first request finds nothing. The second finds the 8 tokens that it shares with the first. The third is the second
# once more, and *all* its 12 tokens are in memory, in three full blocks. Yet it reports 11. Why?
#
# Because of the answer's first token. It is drawn from the **logits** after the last prompt token, and logits are not
# kept, only keys and values. So at least one token must go through the model. Its key and value are there already, so
# it is computed but not stored a second time (`num_stored` in the scheduler; its slot is `NO_SLOT`).

# %%
assert output.num_cached_tokens == len(d_text) - 1
without = LLM("tiny", dtype="float32", device="cpu", enable_prefix_caching=False, **sizes)
[plain_output] = without.generate([{"prompt_token_ids": d_text}], greedy, use_tqdm=False)
assert plain_output.num_cached_tokens == 0
assert plain_output.outputs[0].token_ids == output.outputs[0].token_ids
print("with and without reuse: the same answer")

# %% [markdown]
# ### Which hash?
#
# Suppose two different beginnings had the same hash. The second request would silently continue *somebody else's text*:
# a wrong answer, and possibly one that gives away another user's words. The pool does not compare tokens, it trusts the
# hash. So it must be one for which nobody can find two inputs with the same result, not even on purpose. Python's own
# `hash` is not made for that:

# %%
print(hash((7, 0)) == hash((7, 2**61 - 1)))
assert hash((7, 0)) == hash((7, 2**61 - 1))
assert block_hash(ROOT, [7, 0]) != block_hash(ROOT, [7, 2**61 - 1])

# %% [markdown]
# (No vocabulary has $2^{61}$ tokens. The point is that collisions of `hash` can be computed.) vLLM began with Python's
# `hash`. Its advisory GHSA-rm76-4mrf-v9r8 of 2025 explains how predictable collisions could make one prompt run on
# another's cache. Today it takes SHA-256 by default (its design page "Automatic Prefix Caching"). This package takes
# `blake2b` with 128 bits.
#
# ## 7 · Eviction
#
# When a request ends, its blocks become free. Should their names be forgotten? That would be a pity: the user's next
# message will probably begin with this very conversation. And nothing is gained by it, since a free block lies idle
# anyway. So a free block **keeps its content and its name until it is given out again**; `allocate` is what forgets.
# All memory that nobody needs works as a cache.

# %%
pool = BlockPool(num_blocks=6, block_size=4)
e = BlockTable(pool)
e.append(11)
for block, content in zip(e.blocks, chain(text[:11]), strict=False):
    pool.remember(block, content)
assert e.blocks == [0, 1, 2]
e.free()
assert pool.num_free == 6
assert beginning_found(pool, text[:11]) == [0, 1]
plot_blocks(pool, title="E has ended: all blocks are free, and two of them can still be found")
plt.show()

# %% [markdown]
# The numbers are places in the queue. E's blocks are at its end, behind those that were never used: the queue is in
# the order of last use, and what was **least recently used** is given out first.
#
# Among E's own blocks the order is 2, 1, 0: a table gives its **tail back first**. A beginning without its end is
# useful. An end without its beginning is not, since the search stops at the first block that is missing.

# %%
assert pool.free_blocks == (3, 4, 5, 2, 1, 0)
f = BlockTable(pool)
f.append(18)
assert f.blocks == [3, 4, 5, 2, 1]
assert beginning_found(pool, text[:11]) == [0]
plot_blocks(pool, {"F": f}, title="F needed five blocks: E's second one is lost, its first can still be found")
plt.show()

# %% [markdown]
# One more block for F, and nothing of E can be found:

# %%
f.append(4)
print("found:", beginning_found(pool, text[:11]))
assert f.blocks == [3, 4, 5, 2, 1, 0]
assert beginning_found(pool, text[:11]) == []

# %% [markdown]
# Whoever finds a block takes it out of the queue, wherever it stands; when it is given back, it goes to the very end.
# So a beginning that is used again and again stays, and what is asked for once drifts to the front.

# %%
pool = BlockPool(num_blocks=6, block_size=4)
old, new = pool.allocate(), pool.allocate()
pool.remember(old, chain(text[:4])[0])
pool.free([old, new])
before = pool.free_blocks
again = BlockTable(pool)
again.adopt(beginning_found(pool, text[:4]))
again.free()
print("before", before, "after", pool.free_blocks)
assert before == (2, 3, 4, 5, old, new)
assert pool.free_blocks == (2, 3, 4, 5, new, old)

# %% [markdown]
# ## 8 · Taking tokens back
#
# A sequence can also shrink. `truncate` keeps the first tokens and gives the blocks behind them back. (`free` is
# `truncate(0)`. A method that guesses several tokens ahead needs it for the guesses that were wrong.)

# %%
show_source(BlockTable.truncate)

# %%
pool = BlockPool(num_blocks=6, block_size=4)
table = BlockTable(pool)
table.append(16)
for block, content in zip(table.blocks, chain(text[:16]), strict=False):
    pool.remember(block, content)
table.truncate(6)
assert (table.blocks, pool.free_blocks) == ([0, 1], (4, 5, 3, 2))
plot_blocks(pool, {"T": table}, tokens={"T": names["A"]}, title="Cut from 16 tokens to 6: two blocks are free")
plt.show()

# %% [markdown]
# Look at block 1. It was full and has a name, and now it is the half-filled last block. The name is not wrong yet: all
# four tokens are still there, although the table no longer counts two of them. But the next token will be written over
# the third. This is the second branch of `append`: the name must go before the content does.

# %%
assert beginning_found(pool, text[:16]) == [0, 1, 2, 3]
table.append(1)
assert beginning_found(pool, text[:16]) == [0]
print("after the next token, the search gets as far as block 0")

# %% [markdown]
# The search stops at block 1. Blocks 2 and 3 still have their names, but nobody will get as far as them.
#
# ## 9 · Does it always hold?
#
# We have looked at a dozen cases. The dangerous ones are those that nobody thought of: a fork of a truncated table,
# say, that shares a block with a request that has ended. So write down what must be true **at all times**, do thousands
# of random operations, and check it after each:
#
# 1. a block's reference count is the number of tables that it stands in; so no block is in two hands unnoticed;
# 2. the free blocks are exactly those in no table; so none is lost;
# 3. every sequence reads back what it has written, whatever the others have done.
#
# For the third we need a memory. A list with one token for each slot will do.


# %%
def check(pool, sequences, memory):
    held = Counter(block for table, _ in sequences for block in table.blocks)
    assert pool.ref_counts == [held[block] for block in range(pool.num_blocks)]
    assert sorted(pool.free_blocks) == [block for block in range(pool.num_blocks) if not held[block]]
    for table, tokens in sequences:
        assert [memory[slot] for slot in table.slots(0, len(tokens))] == tokens, "reads another's tokens"


# %% [markdown]
# A sequence is a table and the tokens that it should hold. To write is to do what the engine does: make slots, make the
# copies, put each token into its slot.


# %%
def write(sequence, new, memory, make_copies):
    table, tokens = sequence
    size, start = table.pool.block_size, table.num_tokens
    for source, target in table.append(len(new)):
        if make_copies:
            memory[target * size : (target + 1) * size] = memory[source * size : (source + 1) * size]
    for slot, token in zip(table.slots(start, table.num_tokens), new, strict=True):
        memory[slot] = token
    tokens += new


# %% [markdown]
# An act begins a sequence, or picks one and lets it grow, fork, shrink or end.


# %%
def act(rng, pool, sequences, memory, make_copies):
    what = rng.choice(["begin", "grow", "grow", "fork", "cut", "end"]) if sequences else "begin"
    if what == "begin":
        sequences.append((BlockTable(pool), []))
        return what
    table, tokens = sequence = rng.choice(sequences)
    new = [rng.randrange(1000) for _ in range(rng.randrange(1, 7))]
    if what == "grow" and table.blocks_for(len(new)) <= pool.num_free:
        write(sequence, new, memory, make_copies)
    elif what == "fork":
        sequences.append((table.fork(), list(tokens)))
    elif what == "cut":
        table.truncate(rng.randrange(len(tokens) + 1))
        del tokens[table.num_tokens :]
    elif what == "end":
        table.free()
        sequences.remove(sequence)
    return what


# %%
def walk(steps, make_copies=True):
    """How often each act was done; the invariants are checked after every one."""
    rng, done = random.Random(9), Counter()
    pool, sequences = BlockPool(num_blocks=10, block_size=4), []
    memory = [None] * 40
    for _ in range(steps):
        done[act(rng, pool, sequences, memory, make_copies)] += 1
        check(pool, sequences, memory)
    return done


print(dict(sorted(walk(5000).items())))

# %% [markdown]
# All invariants hold, 5,000 times. A check that cannot fail is worth nothing, so we break something on purpose: the
# walk without the copies that `append` asks for.

# %%
try:
    walk(5000, make_copies=False)
    caught = "nothing"
except AssertionError as error:
    caught = str(error)
print("caught:", caught)
assert caught == "reads another's tokens"

# %% [markdown]
# The package's own test, `tests/cache/test_block_pool.py`, does the same with the library `hypothesis` and adds the
# prefix cache. `hypothesis` also shortens a failing walk to the few steps that matter.
#
# ## 10 · A live engine
#
# Finally the real thing: an engine like that of section 6, with requests in it. `plot_blocks` reads the scheduler's
# running requests, their tables, and the pool. A is added and takes a step. Then come B, which begins like A, and C,
# which asks for two answers, and the engine takes another step.

# %%
llm = LLM("tiny", dtype="float32", device="cpu", **sizes)
prompts = {
    "A": ("There was once a curious girl whose name was Nora. She had", SamplingParams(temperature=0)),
    "B": ("There was once a curious girl whose name was Nora. One evening", SamplingParams(temperature=0)),
    "C": ("Sam was a clever boy. One sunny evening", SamplingParams(n=2, temperature=0.8, seed=8)),
}
for name, (prompt, params) in prompts.items():
    llm.engine.add_request(name, tokenizer(prompt).input_ids, params, prompt=prompt)
    if name in "AC":
        llm.engine.step()

# %%
plot_blocks(llm)
plt.show()
running = {request.name: request for request in llm.engine.scheduler.running}
assert running["B"].num_cached_tokens == 8
assert running["A"].table.blocks[:2] == running["B"].table.blocks[:2]
assert running["C/0"].table.blocks == running["C/1"].table.blocks
assert running["A"].hashes(8) == running["B"].hashes(8) == chain(running["A"].prompt_token_ids)[:2]

# %% [markdown]
# A and B share their first two blocks: B came a step later and found them, by the names that our `chain` gives too. C's
# two answers have just been forked and share everything, the last block included. Their first tokens are chosen, but
# not computed yet, so they have no slot. With the next step one of them gets a copy:

# %%
llm.engine.step()
assert running["C/0"].table.blocks[-1] != running["C/1"].table.blocks[-1]
plot_blocks(llm)
plt.show()
llm.close()

# %% [markdown]
# ### Try it
#
# With a running kernel, here it is with buttons, as it stood before that last step. *add* puts the chosen prompt into
# the queue, *step* lets the engine take one step, *abort the oldest* takes the oldest request out. Under the buttons
# stands what was done last. Predict before you press:
#
# 1. Press *step*: which request gets a copy, and of which block? Why not the other one?
# 2. Step until A ends. Its blocks are freed. Which of them stay coloured, and why?
# 3. When all have ended, add "Nora, and what she had" again and step. How many of its tokens are found?
# 4. When that has ended too, add "something else" six times and step on. The pool has 18 blocks. What happens when none
#    is free, and whom does it hit?

# %% tags=["nbval-ignore-output"]
explore_blocks(LLM("tiny", dtype="float32", device="cpu", **sizes))

# %% [markdown]
# <details><summary>Answers</summary>
#
# 1. C/0, which is served first. It finds two holders of the last block and takes a new one. When C/1 is served, it is
#    the only holder of the old one, and may write there.
# 2. Those that B holds as well: their count goes from 2 to 1. The others turn grey (`kept`) if they were full, else
#    white.
# 3. 12 of its 13 tokens: the first three blocks are full and still in the pool.
# 4. The last of the running requests (the lowest table) is *preempted*: it gives its blocks back, waits, and starts
#    again later. Here most of what it had computed is found again. Notebook 11 tells more of this. (Five would just
#    fit, since all of them share the prompt's full blocks.)
#
# </details>

# %% [markdown]
# ## What to take along
#
# | | costs | because |
# | --- | --- | --- |
# | one more token | a block for every `block_size`-th token, else nothing | the last block has room |
# | a fork | nothing | tables name the same blocks |
# | the first write after a fork | a block and a copy, at most | only the last, partly filled block is written |
# | a beginning that is found | nothing | full blocks never change |
# | the end of a request | nothing | its blocks are free, and can be found until they are needed |
#
# - A block is a number. Slot = blocks[i // block_size] · block_size + i % block_size, the same in every layer.
# - Logical order is the sequence's, physical order is the pool's. Keys and values do not care.
# - A block's name is a chained hash: its tokens, and all that stands before it.
# - Free blocks are a cache: given out least recently used first, a sequence's tail before its beginning.
#
# ## Sources
#
# - Kilburn et al. 1962, "One-Level Storage System"
# - Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP: §4
# - Zheng et al. 2024, "SGLang: Efficient Execution of Structured Language Model Programs": §3
#
# ## Exercises
#
# Replace each `None`; when the answer is right, the cell says so.
#
# **1.** Write `slots_of`: the slots of a sequence's tokens, from its blocks, the block size and the number of tokens.


# %%
def slots_of(blocks, block_size, num_tokens):
    """The slot of each token, in order."""
    return None


if slots_of([0], 4, 1) is not None:
    pool = BlockPool(40, 16)
    pool.free(random.Random(1).sample([pool.allocate() for _ in range(40)], 40))
    table = BlockTable(pool)
    table.append(100)
    assert slots_of([7, 2], 4, 6) == [28, 29, 30, 31, 8, 9], "the second block is number 2: slots 8 to 11"
    assert slots_of(table.blocks, 16, 100) == table.slots(0, 100)
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def slots_of(blocks, block_size, num_tokens):
#     return [blocks[i // block_size] * block_size + i % block_size for i in range(num_tokens)]
# ```
#
# </details>
#
# **2.** Blocks hold 16 tokens. A prompt has 100 tokens and gets three answers of 30 tokens each (`n=3`, all 30 stored).
# How many blocks are held at the end? How many would it be without sharing?

# %%
shared, unshared = None, None

if shared is not None:
    pool = BlockPool(100, 16)
    prompt = BlockTable(pool)
    prompt.append(100)
    answers = [prompt, prompt.fork(), prompt.fork()]
    for _ in range(30):
        for answer in answers:
            answer.append(1)
    assert shared == 100 - pool.num_free, "which of the prompt's blocks are full?"
    assert unshared == 3 * pool.blocks_for(130), "each answer with a prompt of its own"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `shared, unshared = 6 + 3 * 3, 3 * 9`: 15 and 27. The prompt's first 6 blocks are full and exist once. The other 34
# tokens of each sequence (4 of the prompt and 30 of the answer) take 3 blocks.
#
# </details>
#
# **3.** In a pool of 5 blocks of 4 tokens, request G with 8 tokens begins, then H with 5. G ends, then H ends. Which
# blocks does a request with 13 tokens get, in its order?

# %%
given = None

if given is not None:
    pool = BlockPool(5, 4)
    g, h = BlockTable(pool), BlockTable(pool)
    g.append(8)
    h.append(5)
    g.free()
    h.free()
    table = BlockTable(pool)
    table.append(13)
    assert given == table.blocks, "the one that was never used first, then G's tail"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `given = [4, 1, 0, 3]`. G has blocks 0 and 1, H has 2 and 3. Block 4 was never used and stands in front; G ended first
# and gives back 1 before 0, then H gives back 3 before 2. H's first block is the only one that survives.
#
# </details>
#
# **4.** A server sees the same instructions of 700 tokens before every question. Write `computed`: how many tokens of a
# prompt must go through the model, if its first `known` tokens are those of an earlier request whose blocks are all
# still in the pool. (The earlier request was longer than `known`.)


# %%
def computed(prompt_tokens, known, block_size=16):
    """Tokens that are not found."""
    return None


if computed(750, 700) is not None:
    assert computed(750, 700) == 750 - 688, "only full blocks are found"
    assert computed(750, 0) == 750
    assert computed(704, 704) == 1, "somebody must give the logits"
    assert computed(710, 710) == 6
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def computed(prompt_tokens, known, block_size=16):
#     found = known // block_size * block_size
#     return max(prompt_tokens - found, 1)
# ```
# Larger blocks find less: with blocks of 256 only 512 of the 700 tokens are found.
#
# </details>
#
# **5.** Somebody wants to save time and names a block by its own tokens only. Write two prompts (lists of 8 token ids)
# for which this goes wrong: under the careless names the second finds a block of the first whose keys it must not use.


# %%
def careless(tokens, size=4):
    return [block_hash(ROOT, tokens[start : start + size]) for start in range(0, len(tokens) - size + 1, size)]


one, two = None, None

if one is not None and two is not None:
    assert len(one) == len(two) == 8
    wrongly_found = set(careless(two)) & set(careless(one))
    rightly_found = set(chain(two)) & set(chain(one))
    assert len(wrongly_found) > len(rightly_found), "the names agree where the beginnings do not"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `one, two = [1, 2, 3, 4, 5, 6, 7, 8], [9, 9, 9, 9, 5, 6, 7, 8]`. The second block has the same tokens, at the same
# positions even, after another beginning. Section 6 showed how far apart the keys are.
#
# </details>
#
# ---
# **Back:** [07_memory_waste](07_memory_waste.ipynb) · **Next:** [09_paged_attention](09_paged_attention.ipynb): how a
# query looks at keys that lie in scattered blocks, and how a kernel does it without gathering them first.
