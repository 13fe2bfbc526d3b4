# %% [markdown]
# # 10 · Kernels on a GPU
#
# Notebook 09 let a CPU look at keys that lie in scattered blocks. A GPU does the same work with the same numbers and
# arrives at the same result, but it is a different machine: it has not a few fast workers but many thousands of slow
# ones, and its programs are written with that in mind. This notebook explains how the package's GPU kernels are
# written, why they are as they are, and how one can tell what they will do, for the most part without having a GPU.
#
# **By the end of this notebook you will be able to**
#
# - write a small kernel in Triton, with program ids and masks, and test it without a GPU;
# - count what a warp's load really fetches, and say which layouts waste it;
# - explain why the query heads of a group are packed into one tile, and why half empty tiles do no harm in decode;
# - say when keys must be split among programs, into how many parts, and how the parts become one result;
# - read registers, shared memory and instructions of the compiled code, and compute how many programs fit;
# - tell when asking for kernels takes longer than running them, and what a CUDA graph does about it.
#
# **You need** notebooks [06](06_kv_cache.ipynb) (the roofline) and [09](09_paged_attention.ipynb) (paged attention; its
# section 6 is a first look at Triton and its interpreter), and Linux, since Triton runs there. No GPU; if there is one,
# a cell in section 8 measures on it.
#
# **New here**: notebook 09 read a finished kernel and asked what it computes. Now you write kernels yourself, and ask
# what they cost: bytes fetched, registers, programs, launches.
#
# **Time**: about 90 minutes (it runs in about 20 s on two cores).
#
# Triton's interpreter is switched on by an environment variable, before any kernel is imported:

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"

import subprocess
import sys
from collections import Counter

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

import minillm
from minillm.cache import reference
from minillm.engine.cuda_graphs import DecodeGraphs, ladder
from minillm.kernels.gpu import compiled, paged_attention, silu_mul
from minillm.transformer.fused import run_layers
from minillm.viz import (
    GPUS,
    compile_attention,
    explore_splits,
    load_gpu_attention,
    matrix_weights,
    plot_busy,
    plot_chip,
    plot_lines,
    plot_measured,
    plot_occupancy,
    plot_owners,
    plot_packing,
    plot_pairs,
    plot_roofline,
    plot_sectors,
    plot_splits,
    programs_that_fit,
    published_model,
    sectors,
    show_source,
    used_share,
)

h100 = GPUS["H100"]

# %% [markdown]
# ## 1 · A GPU in numbers
#
# A GPU is a row of equal **multiprocessors** before one large memory. All numbers here are those of NVIDIA's H100 in
# its SXM form, from the data sheet and from the CUDA Programming Guide; your card has others, and the reasoning is the
# same.

# %%
plot_chip(h100, title="Much is far away, and what is near is small")
plt.show()

# %% [markdown]
# What is in a multiprocessor?
#
# - **Threads** in groups of 32, called **warps**. The threads of a warp do the same instruction at the same time, each
#   on its own numbers. An H100's multiprocessor holds up to 64 warps.
# - **Registers**: 65,536 of 4 bytes each, shared out among the threads that are there.
# - **Shared memory**: up to 228 KiB. Of their part of it, all threads of one program can read and write every byte.
# - **Tensor cores**, which multiply small matrices.
#
# A thread is slow, and a read from the large memory takes long to arrive. The machine does not try to shorten the wait.
# It does something else meanwhile: when a warp waits, another one runs, at no cost, because all of them keep their
# registers. How many must be waiting at once? What is on the way is speed times delay (Little's law). The delay below
# is an assumption of the right order; it is not on the data sheet.

# %%
delay = 1e-6  # seconds from asking to having, an assumption
on_the_way = h100.bandwidth * delay
each = on_the_way / h100.processors
print(f"{on_the_way / 1e6:.2f} MB on the way at any moment, {each / 1e3:.0f} KB for each multiprocessor,")
print(f"which is {each / 16:,.0f} threads that wait for 16 bytes each")
assert each / 16 < h100.warps * 32

# %% [markdown]
# To read at full speed, a multiprocessor needs more than a thousand threads that wait for memory, or fewer that have
# asked for more at a time. We come back to that in section 7.
#
# ## 2 · The simplest kernel
#
# A Triton kernel is not written for a thread. It is written for a **program**, which works on a whole *tile* of numbers
# at once, some hundreds or thousands. The compiler shares the tile out among the threads of the program's warps (four,
# unless told otherwise).
#
# We add two vectors. Each program takes `numbers` places, and its `tl.program_id` says which.


# %%
@triton.jit
def add_carelessly(x, y, out, numbers: tl.constexpr):
    at = tl.program_id(0) * numbers + tl.arange(0, numbers)  # a tile of places
    total = tl.load(x + at) + tl.load(y + at)
    tl.store(out + at, total)


# %% [markdown]
# `x` is the address of the first number, so `x + at` is a tile of addresses. `tl.load` fetches what lies there.
# `tl.constexpr` marks what is known when the kernel is compiled: tiles must have a fixed size, and a power of two.
#
# To run it, one says how many programs there shall be (the grid, in square brackets) and gives the arguments. 16
# numbers and programs of 8 make two programs:

# %%
x, y = torch.arange(16.0), torch.full((16,), 100.0)
out = torch.zeros(16)
add_carelessly[(2,)](x, y, out, numbers=8)
assert torch.equal(out, x + y)
print(out)

# %% [markdown]
# ### The ragged end
#
# What if there are 20 numbers? Two programs are too few, and three are too many: they write 24. Memory does not end
# where our vector ends. Somebody else's numbers lie there. To see what happens, we give all vectors a neighbour: behind
# the inputs lies **poison** (NaN), behind the result lie twelve sevens that belong to another.

# %%
poison = torch.full((12,), float("nan"))
x, y = (torch.cat([torch.arange(20.0), poison]) for _ in range(2))
memory = torch.full((32,), 7.0)
add_carelessly[(triton.cdiv(20, 8),)](x, y, memory, numbers=8)
print("ours:       ", memory[:20].int().tolist())
print("neighbour's:", memory[20:].tolist())
assert memory[20:24].isnan().all()

# %% [markdown]
# Our twenty sums are right, and four of the neighbour's numbers are destroyed. No error was raised. On a GPU there
# would be none either, as long as the address belongs to the process.
#
# A **mask** says for each place of the tile whether to touch it. What is not loaded gets the value `other`.


# %%
@triton.jit
def add(x, y, out, count, numbers: tl.constexpr):
    at = tl.program_id(0) * numbers + tl.arange(0, numbers)
    kept = at < count
    total = tl.load(x + at, mask=kept, other=0.0) + tl.load(y + at, mask=kept, other=0.0)
    tl.store(out + at, total, mask=kept)


# %%
memory = torch.full((32,), 7.0)
add[(triton.cdiv(20, 8),)](x, y, memory, 20, numbers=8)
assert torch.equal(memory[:20], x[:20] + y[:20])
assert (memory[20:] == 7).all()
print("all sums are right, and the neighbour keeps its sevens")

# %% [markdown]
# To see who did what, let each program write its id instead of a sum:


# %%
@triton.jit
def sign(out, count, numbers: tl.constexpr):
    at = tl.program_id(0) * numbers + tl.arange(0, numbers)
    tl.store(out + at, tl.program_id(0) + 0 * at, mask=at < count)


# %%
owners = torch.full((32,), -1)
sign[(3,)](owners, 20, numbers=8)
assert owners[:20].bincount().tolist() == [8, 8, 4]
assert (owners[20:] == -1).all()
plot_owners(owners, title="Three programs share 20 places; the last has half of its tile masked")
plt.show()

# %% [markdown]
# ### Fusing: the first kernel that is worth it
#
# PyTorch has a kernel for adding. Why write any? Because of what lies between kernels. The feed-forward network of
# Llama-like models computes $\text{silu}(g) \cdot u$ with $\text{silu}(g) = g / (1 + e^{-g})$ (Shazeer 2020, "GLU
# Variants Improve Transformer"). PyTorch runs two kernels, and all that the first one writes to memory, the second one
# reads again. One kernel keeps it in registers; this is **fusion**. In numbers moved for each result:

# %%
two_kernels = (1 + 1) + (2 + 1)  # read g, write silu(g); read silu(g) and u, write
one_kernel = 2 + 1  # read g and u, write
print(f"{two_kernels} numbers or {one_kernel}: a factor of {two_kernels / one_kernel:.2f}")

# %% [markdown]
# There are a handful of FLOPs for each number, far below any ridge (notebook 06). So memory is what it waits for, and
# at best the time falls by this factor.


# %%
@triton.jit
def silu_times(gate, up, out, count, numbers: tl.constexpr):
    at = tl.program_id(0) * numbers + tl.arange(0, numbers)
    kept = at < count
    g = tl.load(gate + at, mask=kept, other=0.0)
    u = tl.load(up + at, mask=kept, other=0.0)
    tl.store(out + at, g / (1.0 + tl.exp(-g)) * u, mask=kept)


# %%
torch.manual_seed(10)
gate, up = torch.randn(2, 1000)
ours = torch.empty(1000)
silu_times[(triton.cdiv(1000, 256),)](gate, up, ours, 1000, numbers=256)
assert torch.allclose(ours, F.silu(gate) * up, atol=1e-6)
print("four programs, one kernel: the same as PyTorch's two")

# %% [markdown]
# The package's kernel is this one with three additions. The grid has a second axis, for the rows. `gate` and `up` lie
# side by side in one tensor, as the packed projection leaves them (notebook 05). And it computes in float32 whatever is
# stored.

# %%
show_source(silu_mul._silu_mul.fn)

# %% [markdown]
# And the function that the model calls, which chooses the grid:

# %%
show_source(silu_mul.silu_mul)

# %%
for dtype, close in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
    packed = torch.randn(5, 2 * 1500, dtype=dtype)  # 1,500 is no multiple of 1,024: a ragged end in every row
    gate, up = packed.float().chunk(2, dim=-1)
    assert torch.allclose(silu_mul.silu_mul(packed).float(), F.silu(gate) * up, atol=close, rtol=close)
print("programs:", 5, "rows ×", triton.cdiv(1500, silu_mul.NUMBERS), "tiles")

# %% [markdown]
# ## 3 · What a load fetches: coalescing
#
# The 32 threads of a warp load at the same time, each from its own address. Memory does not deliver single numbers. It
# delivers **sectors** of 32 bytes, whole. If the addresses of a warp lie in few sectors, few are fetched: the loads are
# **coalesced**. If every address lies in a sector of its own, 32 sectors come and most of their bytes are thrown away.
#
# Here 32 threads ask for 4 bytes each: side by side, every second number, every eighth, and side by side but starting
# in the middle of a sector.

# %%
threads = range(32)
patterns = {
    "side by side": [4 * thread for thread in threads],
    "every 2nd number": [8 * thread for thread in threads],
    "every 8th number": [32 * thread for thread in threads],
    "side by side,\n16 bytes late": [16 + 4 * thread for thread in threads],
}
plot_sectors(patterns, 4, title="Strided loads fetch what nobody asked for")
plt.show()

# %% [markdown]
# The counts are simple: each address divided by 32, without repetition.

# %%
show_source(sectors)

# %%
strides = list(range(1, 17))
fetched = [len(sectors([4 * stride * thread for thread in threads], 4)) for stride in strides]
assert (fetched[0], fetched[1], max(fetched)) == (4, 8, 32)
labels = {"xlabel": "step from thread to thread (numbers of 4 bytes)", "ylabel": "sectors fetched"}
plot_lines(strides, {"one load of a warp": fetched}, **labels, title="From a step of 8 on, every thread pays a sector")
plt.show()

# %% [markdown]
# In Triton one does not place threads. The compiler does, and it gives neighbouring places of a tile's last axis to
# neighbouring threads. What the writer must see to is that the last axis of a tile is contiguous in memory. Then a
# thread can even take 16 bytes at once, which is 8 numbers of bfloat16. One row of 128 channels, 256 bytes, is the work
# of 16 threads, and a warp takes two rows, which may lie anywhere:

# %%
rows = (40_960, 7_168)  # where the two keys lie, in bytes
warp = [row + 16 * thread for row in rows for thread in range(16)]
print(f"{len(sectors(warp, 16))} sectors, {used_share(warp, 16):.0%} used")
assert used_share(warp, 16) == 1

# %% [markdown]
# This is why scattered blocks cost the GPU next to nothing. Which *rows* a tile has is looked up in the block table.
# Within a row, everything is contiguous, and a row is 8 whole sectors.
#
# ### The layout of the cache
#
# The cache is `[block, head, token, channel]` in this package. It could as well be `[block, token, head, channel]`, or
# keep the channels before the tokens. We count, for keys of 128 channels in bfloat16, 8 heads and blocks of 16 tokens,
# the **runs** (stretches without a gap) of two accesses: reading one head's block, and writing one new token.


# %%
def runs(addresses, itemsize=2):
    """Stretches of memory without a gap."""
    in_order = addresses.flatten().sort().values
    return 1 + int((in_order.diff() != itemsize).sum())


def count(addresses):
    flat = addresses.flatten().tolist()
    return f"{runs(addresses):5d} runs, {len(sectors(flat, 2)):5d} sectors, {used_share(flat, 2):4.0%} used"


# %%
address = 2 * torch.arange(4 * 8 * 16 * 128)  # of every number of a cache of four blocks
ours = address.view(4, 8, 16, 128)  # [block, head, token, channel]
tokens_first = address.view(4, 16, 8, 128)  # [block, token, head, channel]
channels_first = address.view(4, 8, 128, 16)  # [block, head, channel, token]
print("read one head's block")
for name, tile in (("ours", ours[2, 5]), ("tokens", tokens_first[2, :, 5]), ("channels", channels_first[2, 5])):
    print(f"  {name:8s} {count(tile)}")
print("write one token")
for name, tile in (("ours", ours[2, :, 7]), ("tokens", tokens_first[2, 7]), ("channels", channels_first[2, :, :, 7])):
    print(f"  {name:8s} {count(tile)}")

# %%
assert (runs(ours[2, 5]), runs(tokens_first[2, :, 5])) == (1, 16)
assert (runs(ours[2, :, 7]), runs(tokens_first[2, 7])) == (8, 1)
assert used_share(ours[2, :, 7].flatten().tolist(), 2) == 1
assert used_share(channels_first[2, :, :, 7].flatten().tolist(), 2) < 0.1

# %% [markdown]
# The first two layouts use all that they fetch: runs of 256 bytes are whole sectors, however many there are. A
# layout with the channels before the tokens makes writing a token sixteen times as expensive. Between the first two,
# the GPU hardly cares. The CPU does: with heads before tokens, the tile that belongs together is one stretch of 4 KiB,
# which its loops can walk straight through (notebook 09). And each token is written once but read at every later step,
# so the layout goes by the reading.
#
# ## 4 · Tiles and the tensor cores
#
# Now attention. Section 6 of [notebook 09](09_paged_attention.ipynb) has read the loop of `_attend`: a program has some
# queries of one sequence and one key/value head, and walks over the keys in tiles. Its addresses and masks are those of
# section 2, with one row for each key. Its two products are `tl.dot`, and `tl.dot` is the tensor cores. They multiply
# matrices, and want at least 16 rows.
#
# ### Why heads are packed
#
# In decode there is *one* query a sequence. But all the query heads of a group meet the same keys (notebook 03). So the
# kernel makes them rows of one tile. That is worth doing twice over: the keys are read once for the whole group, and
# more of the tile's rows are used.

# %%
groups = {"Llama-2-7B": 1, "SmolLM2-135M": 3, "Llama-3-8B": 4, "GLM-4-9B": 16}
for name, group in groups.items():
    config = published_model(name).config
    assert group == config.num_heads // config.num_kv_heads
    assert paged_attention.tile_of(torch.bfloat16, config.head_dim, group, max_query_len=1).rows == 16
plot_packing(list(groups.values()), title="A single query fills as many rows as its group has heads")
plt.show()

# %% [markdown]
# With groups of 4, three quarters of the tensor cores' work is multiplying zeros. Is that not a terrible waste? Count
# for one key and one key/value head of $d$ channels: the key and the value are $2 \cdot 2d$ bytes. Both products do
# $2 \cdot 2 d$ FLOPs for each row, padded rows included.

# %%
d, tile_rows = 128, 16
memory_time = 2 * 2 * d / h100.bandwidth
arithmetic_time = tile_rows * 2 * 2 * d / h100.flops
print(f"one key and value: memory {memory_time * 1e12:.0f} ps, tensor cores {arithmetic_time * 1e12:.1f} ps at best")
print(f"with all 16 rows computed, the tensor cores are needed {arithmetic_time / memory_time:.0%} of the time")
assert arithmetic_time < 0.1 * memory_time

# %% [markdown]
# Padding wastes what there is too much of anyway. The zeros make the arithmetic intensity 16 FLOPs a byte where the
# useful one is 4; both are far to the left of the ridge (section 6 draws it).
#
# For prompts it is the other way round. A prompt has many queries, the tile is filled with queries × group rows, and
# keys that were read are used by all of them. `tile_of` chooses:

# %%
show_source(paged_attention.tile_of)

# %%
for what, length in (("decode", 1), ("a prompt", 500)):
    tile = paged_attention.tile_of(torch.bfloat16, head_dim=128, group=4, max_query_len=length)
    print(f"{what:8s} {tile.rows // 4:3d} queries × 4 heads = {tile.rows:3d} rows; {tile}")

# %% [markdown]
# (In decode only one of the four places for queries is used, since the next query belongs to another sequence.) Which
# numbers are best is not something one can compute. They were tried on an H100.
#
# ## 5 · What split-KV is worth
#
# One program works on one multiprocessor. In decode there is one program for each sequence and key/value head. So one
# sequence of Llama-3-8B, with 8 key/value heads, makes 8 programs in each layer. (The numbers in the boxes say how many
# programs a multiprocessor is given.)

# %%
title = f"One sequence leaves {h100.processors - 8} multiprocessors without work"
plot_busy({"one sequence": 8, "16 sequences": 128, "64 sequences": 512}, h100, title=title)
plt.show()

# %% [markdown]
# A long conversation with a single user is the slowest case: each of the 8 programs walks alone over all keys, and the
# other multiprocessors have nothing to do. One multiprocessor cannot read at the speed of the whole memory.
#
# So the kernel splits the keys ([notebook 09](09_paged_attention.ipynb), section 6, "Splits"). What does `num_splits`
# make of an H100?

# %%
batches = [1, 2, 4, 8, 16, 32, 64, 128, 256]
kv_heads, keys = 8, 32_768
split = [paged_attention.num_splits(b * kv_heads, keys, h100.processors) for b in batches]
curves = {
    "one program a sequence and head": [b * kv_heads for b in batches],
    "split": [b * kv_heads * s for b, s in zip(batches, split, strict=True)],
}
print("splits:", dict(zip(batches, split, strict=True)))

# %%
assert split[0] == paged_attention.MAX_SPLITS
assert split[-1] == 1
assert min(curves["split"]) >= 3 * h100.processors
labels = {"xlabel": "sequences (32,768 keys each, 8 key/value heads)", "ylabel": "programs"}
title = "With split keys there is work for all at every batch size"
plot_lines(batches, curves, **labels, scale="log", levels={"multiprocessors": h100.processors}, title=title)
plt.show()

# %% [markdown]
# ### Putting the parts together
#
# Each split leaves its largest score, its sum and its undivided mean. A second kernel merges them for each token and
# head, which is `merge_all` of notebook 09 (exercise 1), with $2^x$ in place of $e^x$:

# %%
show_source(paged_attention._merge.fn)

# %% [markdown]
# Now the real thing, in the interpreter: one query of 8 heads, 2 key/value heads, 1,000 keys in scattered blocks. What
# belongs to nobody is NaN. The interpreter says that it has 4 multiprocessors.

# %%
k_cache, v_cache = torch.randn(2, 70, 2, 16, 64)  # [blocks, kv_heads, block_size, head_dim]
table = torch.randperm(70)[None, :63]  # 63 blocks for 1,000 keys
k_cache[table[0, -1], :, 8:], v_cache[table[0, -1], :, 8:] = torch.nan, torch.nan
inputs = (torch.randn(1, 8, 64), k_cache, v_cache, table, torch.tensor([0, 1]), torch.tensor([1000]))
options = {"max_query_len": 1, "scale": 64**-0.5}
ours = paged_attention.paged_attention(*inputs, **options)
expected = reference.paged_attention(*inputs, **options)
splits = paged_attention.num_splits(programs=2, max_keys=63 * 16, processors=4)
assert splits > 1
assert torch.allclose(ours, expected, atol=1e-5)
print(f"{2 * splits} programs in {splits} splits: the same as the reference")

# %% [markdown]
# ### Try it
#
# One program a sequence and head (left), and as `num_splits` decides (right).

# %%
plot_splits(kv_heads=8, batch=1, keys=8192)
plt.show()

# %% [markdown]
# With a running kernel, here it is with controls. Predict before you move:
#
# 1. GLM-4-9B has only 2 key/value heads. From which batch on does it need no splitting, and Llama-3-8B with 8?
# 2. One sequence of 8 key/value heads that has only 512 tokens: how many multiprocessors are busy?
# 3. A smaller card, the A100: does it need more splits or fewer?

# %% tags=["nbval-ignore-output"]
explore_splits(batch=1, keys=8192)

# %% [markdown]
# <details><summary>Answers</summary>
#
# 1. Splitting ends when there are 4 · 132 = 528 programs: from 264 sequences on with 2 heads (more than the slider
#    has), from 66 on with 8 (of the slider's stops, 128).
# 2. 16: only two parts of 256 keys can be made. It does not matter, since so few keys are read in a moment.
# 3. Fewer: it has 108 multiprocessors to fill.
#
# </details>

# %%
splits_for = paged_attention.num_splits
assert min(b for b in range(1, 999) if splits_for(2 * b, 65_536, h100.processors) == 1) == 264
assert min(b for b in range(1, 999) if splits_for(8 * b, 65_536, h100.processors) == 1) == 66
assert 8 * splits_for(8, 512, h100.processors) == 16
assert splits_for(16, 65_536, 108) < splits_for(16, 65_536, 132)

# %% [markdown]
# ## 6 · The roofline of attention
#
# Notebook 06 drew linear layers on the roofline. Here are some shapes of attention, from counts alone: for one
# key/value head with its group, the FLOPs for each pair of a query and a key that it sees, and the bytes of keys,
# values, queries and results, each moved once.


# %%
def attention_intensity(queries, keys, group, head_dim=128, itemsize=2):
    """FLOPs a byte; the queries are the last ones of the keys' positions."""
    pairs = sum(keys - queries + place + 1 for place in range(queries))
    flops = group * pairs * 2 * (2 * head_dim)
    moved = itemsize * head_dim * (2 * keys + 2 * group * queries)
    return flops / moved


# %%
work = {
    "decode, groups of 1 (Llama-2)": attention_intensity(1, 8192, 1),
    "decode, groups of 4 (Llama-3)": attention_intensity(1, 8192, 4),
    "decode, groups of 16 (GLM-4)": attention_intensity(1, 8192, 16),
    "prompt of 128, groups of 4": attention_intensity(128, 128, 4),
    "512 more behind 7,680, groups of 4": attention_intensity(512, 8192, 4),
    "prompt of 8,192, groups of 4": attention_intensity(8192, 8192, 4),
}

# %%
plot_roofline([h100], work, title="Decode waits for memory, long prompts for arithmetic")
plt.show()
for name, intensity in work.items():
    peak = h100.attainable(intensity) / h100.flops
    print(f"{name:36s} {intensity:7.1f} FLOPs a byte, at best {peak:6.1%} of the peak")
assert max(list(work.values())[:3]) < 0.1 * h100.ridge
assert min(list(work.values())[4:]) > h100.ridge

# %% [markdown]
# So the two kinds of work have two measures of success. A decode kernel is good when it reads keys and values as fast
# as a plain copy moves bytes. A prompt kernel is good when the tensor cores are busy. A single kernel does both here,
# with different tiles. Sequences in a batch do not raise the intensity of decode: each brings its own keys (notebook
# 06). Larger groups do.
#
# ## 7 · The compiled code, without a GPU
#
# Triton's compiler and NVIDIA's assembler are part of the Triton package, and neither needs a GPU. So one can compile
# for a card that one does not have, and read what came out:

# %%
show_source(compiled.compile_ahead)

# %% [markdown]
# Where the interpreter is on, nothing is compiled. So this must happen in another process, without the environment
# variable. `compile_attention` starts one. We ask for decode and for prompts, groups of 4 heads of 128 (4 × 128) and
# groups of 3 heads of 64, for the A100 (compute capability 8.0) and the H100 (9.0). The numbers may differ a little
# with Triton's version.

# %% tags=["nbval-ignore-output"]
cards = {80: GPUS["A100"], 90: GPUS["H100"]}
shapes = [(group, dim, length) for length in (1, 500) for group, dim in ((4, 128), (3, 64))]
tiles = compile_attention([(capability, *shape) for capability in cards for shape in shapes])
print("                     rows × keys  warps  registers  spills  shared memory")
for tile in tiles:
    name = f"sm_{tile.capability} {'decode' if tile.max_query_len == 1 else 'prompt'} {tile.group} × {tile.head_dim:3d}"
    size = f"{tile.rows:3d} × {tile.keys:3d}  {tile.num_warps:5d}"
    print(f"{name:20s}  {size}  {tile.registers:9d} {tile.spills:7d} {tile.shared:14,d}")

# %% [markdown]
# - **Registers** are those of each thread. More than 255 a thread cannot have. What does not fit **spills** into slow
#   memory. Some bytes outside the loop cost little: tiles of a prompt that spill nothing were slower on an H100
#   (`docs/benchmarks.md`).
# - **Shared memory** holds the tiles of keys and values that are on their way. With `num_stages=2` the next tile is
#   being fetched while this one is multiplied.

# %%
for tile in tiles:
    assert tile.registers <= 255
    assert tile.spills <= (0 if tile.max_query_len == 1 else 64)
    assert tile.shared <= compiled.SHARED_MEMORY[tile.capability]
decode = next(tile for tile in tiles if tile[:4] == (90, 4, 128, 1))
assert decode.shared >= 2 * 2 * decode.keys * decode.head_dim  # one tile of keys and one of values, 2 bytes a number
print("decode spills nothing, a prompt next to nothing, and every tile fits")

# %% [markdown]
# ### How many programs fit
#
# A multiprocessor holds as many programs at a time as its registers, its shared memory and its warps allow, and the
# scarcest decides. This is called **occupancy**.

# %%
show_source(programs_that_fit)

# %% tags=["nbval-ignore-output"]
fits = {}
for tile in tiles:
    if tile.capability == 90:
        kind = "decode" if tile.max_query_len == 1 else "prompt"
        name = f"{kind}, {tile.group} × {tile.head_dim}"
        fits[name] = programs_that_fit(tile.registers, tile.shared, tile.num_warps, h100)
plot_occupancy(fits, title="On an H100, a multiprocessor holds two programs or more")
plt.show()

# %% [markdown]
# Is that few? A kernel that waits for memory wants enough bytes on the way. Section 1 asked for 25 KB a
# multiprocessor, under its assumption. A decode program of heads of 128 has a tile of keys and one of values under
# way, 64 KiB. So even two programs have plenty. Many threads are one way of having much on the way; large tiles are the
# other.

# %%
at_a_time = {name: min(limits.values()) for name, limits in fits.items()}
under_way = 2 * 2 * decode.keys * decode.head_dim
assert at_a_time["decode, 4 × 128"] >= 2
assert at_a_time["decode, 3 × 64"] >= 2
assert all(at_a_time[name] >= 2 for name in ("prompt, 4 × 128", "prompt, 3 × 64"))
assert at_a_time["decode, 4 × 128"] * under_way > each
print(f"a decode program of 4 × 128 has up to {under_way // 1024} KiB under way")

# %% [markdown]
# ### A few instructions
#
# PTX is NVIDIA's portable assembly. It has about two thousand lines for this kernel, and reading all of them is no use.
# But one can look for what ought to be there: loads of 16 bytes, and the tensor cores.

# %% tags=["nbval-ignore-output"]
prompt = next(tile for tile in tiles if tile[:4] == (90, 4, 128, 500))


def first_line(tile, wanted):
    line = next(line.strip() for line in tile.ptx.splitlines() if wanted in line)
    return line if len(line) < 100 else f"{line[:97]}..."


wanted = ((decode, "ld.global.v4"), (decode, "cp.async.cg"), (decode, "mma.sync"), (prompt, "wgmma.mma_async"))
print("\n\n".join(first_line(*pair) for pair in wanted))

# %% [markdown]
# - `ld.global.v4.b32`: load four times 32 bits from global memory, which is 16 bytes for each thread. With it come the
#   queries. The `@%p…` before it is the mask: only where this predicate is true.
# - `cp.async.cg.shared.global … 0x10`: copy 16 bytes from global to shared memory, past the registers, and do not wait.
#   With it come the keys and values. The thread goes on, and asks later whether they have arrived.
# - `mma.sync.aligned.m16n8k16 … bf16`: one warp multiplies a 16 × 16 by a 16 × 8 matrix on the tensor cores and adds in
#   float32. Here are the 16 rows of section 4.
# - `wgmma.mma_async … m64n64k16`: the H100's own instruction. Four warps together, at least 64 rows, read from shared
#   memory. Only the prompt tiles have rows enough; decode uses the older one.

# %%
for tile in tiles:
    assert "ld.global.v4" in tile.ptx
    assert "cp.async.cg" in tile.ptx
    assert ("wgmma" in tile.ptx) == (tile.capability == 90 and tile.max_query_len > 1)
    assert "m16n8k16" in tile.ptx or "wgmma" in tile.ptx
print("loads of 16 bytes and tensor cores everywhere, wgmma in the H100's prompt tiles only")

# %% [markdown]
# The package's tests ask for the same: hardly anything spills, every tile fits, loads of 16 bytes, tensor cores. A
# change that loses one of these shows up on a machine without a GPU.
#
# ## 8 · Measured
#
# What cannot be counted must be measured. `minillm.bench.gpu_attention` times decode attention on a GPU: many sizes,
# blocks in random order, and from 8 MiB on enough data that nothing is left in the level-2 cache. It compares with a
# plain copy on the same card, since that is what the memory does at best in practice. The package ships one such table.

# %%
measured = load_gpu_attention()
print(measured.origin)
print(f"{len(measured.rows)} sizes; a copy moves {measured.rows[0].copy_bytes_per_second / 1e12:.2f} TB a second")
print("heads × dim      batch  context        KV      time   of a copy")
for row in measured.rows[:: len(measured.rows) // 8]:
    size = f"{row.batch:5d} {row.context:8,d} {row.kv_bytes / 2**20:7,.1f} MiB {row.microseconds:6,.0f} µs"
    print(f"{row.heads:2d}/{row.kv_heads} × {row.head_dim:3d}     {size}   {row.share_of_copy:8.0%}")

# %%
large = [row for row in measured.rows if row.kv_bytes >= 2**30]
small = [row for row in measured.rows if row.kv_bytes < 2**24]
title = f"From 1 GiB on, {min(row.share_of_copy for row in large):.0%} or more of what a copy moves"
plot_measured(measured.rows, origin=measured.origin, title=title)
plt.show()
assert min(row.share_of_copy for row in large) > 0.75
assert max(row.share_of_copy for row in small) < max(row.share_of_copy for row in large)

# %% [markdown]
# On the left are sizes where there is little to read: starting a kernel and merging take a few microseconds, whatever
# there is to do, and next to them the reading does not count. On the right the reading is nearly everything.
#
# How many keys a tile has, on how many warps it runs and how many tiles are fetched ahead decides how much is on the
# way. [docs/benchmarks.md](../docs/benchmarks.md) has all sizes, and what other numbers of splits gave.
#
# If this machine has a GPU, the next cell measures it, in a process without the interpreter.

# %% tags=["nbval-ignore-output"]
LIVE = """
from minillm.bench.gpu_attention import Heads, measure
from minillm.bench.timing import copy_bandwidth

copy = copy_bandwidth()
for batch, context in ((1, 8192), (16, 8192), (64, 8192)):
    row = measure(Heads(32, 8, 128), batch, context)
    print(f"{batch:3d} sequences of {context:,}: {row.ours / 1e12:.2f} TB/s, {row.ours / copy:.0%} of a copy")
"""
if torch.cuda.is_available():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", LIVE], env=environment, capture_output=True, text=True, check=True)
    print(done.stdout)
else:
    print("no GPU here: see the figure above")

# %% [markdown]
# ## 9 · What asking costs: CUDA graphs
#
# Every kernel must be asked for. The CPU prepares the arguments and puts a **launch** into a queue; the GPU takes it
# from there. From Python through PyTorch that is some microseconds of the CPU's time for each. How many launches does a
# decode step have? We listen to the operations that PyTorch runs, leave out attention itself (a store that hands the
# queries back), and do not count views, which run nothing.

# %%
from torch.utils._python_dispatch import TorchDispatchMode


class Listener(TorchDispatchMode):
    """Counts operations that are more than another view of the same memory."""

    def __init__(self):
        super().__init__()
        self.heard = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if not operation.is_view:
            self.heard[str(operation).split(".")[1]] += 1
        return operation(*args, **(kwargs or {}))


# %%
class NoAttention:
    def attend(self, layer, q, k, v):
        return q


# %%
model = minillm.load_model("tiny", dtype="float32", device="cpu")
token, position = torch.tensor([5]), torch.tensor([0])
with torch.enable_grad(), Listener() as plain:  # where gradients are wanted, every operation is PyTorch's own
    model(token, position, NoAttention())
print(f"{plain.heard.total()} operations for one token of tiny, {model.config.num_layers} layers")
print(dict(plain.heard.most_common(6)))

# %% [markdown]
# Most of these are small pieces: a norm is six of them, and turning the queries and keys of a layer is fourteen. The
# rest are matrix products, the gate, and what goes around them. The count agrees:

# %%
num_layers = model.config.num_layers
a_layer = 2 * 6 + 14 + 4 + 2 + 2  # norms, rotation, matrix products, silu and product, residual sums
around_all = 7 + 6 + 1  # embedding and angles, last norm, head
assert plain.heard.total() == num_layers * a_layer + around_all

# %% [markdown]
# A kernel for each of these pieces is *one* launch: a layer would have twelve. The package goes one step further, since
# a kernel that only writes what the next one reads can be part of it. `add_rms_norm` adds a sublayer's output to the
# residual stream and normalises the sum; `rotate_and_write` turns queries and keys and puts the keys, and the values,
# into the cache. Nine are left:

# %%
layer = ["sum and norm", "qkv", "rotary and write", "attention", "out"]  # attention's half
layer += ["sum and norm", "gate_up", "silu_mul", "down"]  # the feed-forward half
around = ["embedding", "positions to float", "angles", "cos", "sin", "scale cos", "scale sin", "sum and norm", "head"]


def launches(num_layers):
    """Of one decode step."""
    return num_layers * len(layer) + len(around)


# %%
total = layer * num_layers + around
assert plain.heard["mm"] == sum(name in ("qkv", "out", "gate_up", "down", "head") for name in total)
assert plain.heard["rsqrt"] == total.count("sum and norm")
assert plain.heard["silu"] == total.count("silu_mul")
assert launches(num_layers) == len(total) < plain.heard.total() / 3
print(f"tiny: {launches(num_layers)} launches, with attention and the writing")

# %% [markdown]
# This walk through the layers, with each sum left to the norm that follows it, is a file of its own:

# %%
show_source(run_layers)

# %% [markdown]
# (Split attention has one more, the merging. Some families have more norms.) Is that much? Suppose that a launch costs
# 5 µs; put in your own machine's number. And compare with the least that the GPU must do, which is to read all weights
# once.

# %%
launch = 5e-6  # seconds of the CPU for one launch, an assumption
times = {}
for name in ("tiny", "SmolLM2-135M", "Llama-3-8B"):
    one = model if name == "tiny" else published_model(name)
    asking = launch * launches(one.config.num_layers)
    reading = 2 * matrix_weights(one) / h100.bandwidth
    times[name] = (1000 * asking, 1000 * reading)

# %%
kinds = ("asking for every kernel (CPU)", "reading the weights (GPU), at best")
labels = {"xlabel": "time of one step (ms)", "number_format": ".2f"}
plot_pairs(times, kinds, **labels, title="On a small model, asking takes longer than reading")
plt.show()
assert times["SmolLM2-135M"][0] > 10 * times["SmolLM2-135M"][1]
assert times["Llama-3-8B"][0] < times["Llama-3-8B"][1]

# %% [markdown]
# For a large model the CPU runs ahead and asking is hidden behind the work. A small model waits for its launches.
#
# A **CUDA graph** is the remedy: the launches of a step are recorded once, with all their arguments, and then replayed
# with a single launch. That works because a decode step runs the same kernels every time. The conditions are strict:
#
# - the grid and all addresses are part of the recording. So inputs are written into tensors that stay where they are;
# - nothing may be asked back in between. The attention kernel's grid depends on shapes only, and `num_splits` goes by
#   the width of the block table, not by the lengths, which are known only on the GPU;
# - another batch size is another graph.
#
# The last is why there is a ladder of sizes. A step takes the next larger one:

# %%
show_source(ladder)

# %%
sizes = ladder(64)
print(sizes)
taken = [next(size for size in sizes if size >= batch) for batch in range(1, 65)]
surplus = [size - batch for size, batch in zip(taken, range(1, 65), strict=True)]
print(f"at most {max(surplus)} rows too many, {sum(surplus) / len(surplus):.1f} on average")
assert max(size / batch for size, batch in zip(taken, range(1, 65), strict=True)) < 2

# %% [markdown]
# Rows too many have no keys and write nothing, and the weights are read for the others anyway. This is the recording:

# %%
show_source(DecodeGraphs._record)

# %% [markdown]
# The step runs once before, so that everything is compiled. Inside `torch.cuda.graph` nothing is computed: the launches
# are written down instead. And this is the replay. The result is always in the same tensor:

# %%
show_source(DecodeGraphs.replay)

# %% [markdown]
# Prompts are not recorded: they have many tokens, so that the work hides the asking, and their shapes differ every
# time.
#
# ## What to take along
#
# | | decode | prompt |
# | --- | --- | --- |
# | limited by | reading keys and values | tensor cores |
# | rows of a tile | one query × group, padded to 16 | many queries × group |
# | parallel over | sequences, key/value heads, **splits** | sequences, key/value heads, tiles of queries |
# | good when | bytes a second are those of a copy | tensor cores are busy |
#
# - A program works on a tile; masks keep it away from what is not its own. Without them nothing complains.
# - Loads are as good as the share of their sectors that is used. Rows of contiguous channels make that all of it,
#   wherever the blocks lie.
# - Zeros in a tensor core are free as long as memory is the limit.
# - Few sequences need split keys. Largest score, sum and weighted sum are enough to merge.
# - Registers, shared memory and instructions can be read without a GPU; time cannot.
#
# ## Sources
#
# - Tillet et al. 2019, "Triton: An Intermediate Language and Compiler for Tiled Neural Network Computations": programs
#   that compute a tile each
# - Dao et al. 2022, "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness": §3.1, tiles
# - Dao et al. 2023, "Flash-Decoding for long-context inference" (PyTorch's blog): keys split among programs
# - Shazeer 2020, "GLU Variants Improve Transformer"
#
# ## Exercises
#
# Replace each `None`; when the answer is right, the cell says so.
#
# **1.** A warp loads a column of a row-major matrix of float32 with 3 columns: thread $t$ reads row $t$. How many
# sectors are fetched, and which share of their bytes is used? (The matrix begins at address 0.)

# %%
column_sectors, column_share = None, None

if column_sectors is not None and column_share is not None:
    column = [4 * 3 * thread for thread in range(32)]
    assert column_sectors == len(sectors(column, 4)), "which bytes lie between the first and the last address?"
    assert abs(column_share - used_share(column, 4)) < 1e-3, "32 threads ask for 4 bytes each"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `column_sectors, column_share = 12, 1 / 3`. The addresses go from 0 to 372 + 3, which is 12 sectors, and none is left
# out. 128 bytes of 384 are used. The other two columns are fetched along; if somebody needs them soon, they may be
# found in the cache.
#
# </details>
#
# **2.** Write a kernel that adds a bias to every row of a matrix `[rows, size]` whose rows are contiguous, one program
# for each row. `padded` is the next power of two of `size`. Mind the mask.


# %%
@triton.jit
def add_bias(x, bias, out, size, padded: tl.constexpr):
    pass  # your code; tl.program_id(0) is the row


matrix, bias = torch.randn(4, 20), torch.randn(20)
memory = torch.full((100,), 7.0)
add_bias[(4,)](matrix, bias, memory, 20, padded=triton.next_power_of_2(20))
if (memory != 7).any():
    assert (memory[80:] == 7).all(), "something was written behind the end"
    assert torch.allclose(memory[:80].view(4, 20), matrix + bias), "some row is wrong: were its neighbours masked?"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# @triton.jit
# def add_bias(x, bias, out, size, padded: tl.constexpr):
#     row = tl.program_id(0)
#     at = tl.arange(0, padded)
#     kept = at < size
#     total = tl.load(x + row * size + at, mask=kept, other=0.0) + tl.load(bias + at, mask=kept, other=0.0)
#     tl.store(out + row * size + at, total, mask=kept)
# ```
# Without the mask, each row would write twelve numbers into the next one. Programs run in any order, so sometimes the
# next row would mend it, and sometimes not.
#
# </details>
#
# **3.** A step that is replayed computes some rows for nothing. For which batch up to 64 is their *share* of all rows
# largest with the ladder of section 9, and how large is it?

# %%
worst_batch, worst_share = None, None

if worst_batch is not None and worst_share is not None:
    shares = [1 - batch / size for batch, size in zip(range(1, 65), taken, strict=True)]
    assert worst_batch == 1 + shares.index(max(shares)), "just above which step of the ladder?"
    assert abs(worst_share - max(shares)) < 1e-3
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `worst_batch, worst_share = 9, 7 / 16`. Nine sequences take the graph for 16, so 7 of its 16 rows are for nothing. For
# more sequences the ladder goes up in eights, and 7 rows are a smaller and smaller share.
#
# </details>
#
# **4.** A kernel takes 200 registers a thread, 4 warps a program and 40,000 bytes of shared memory. How many programs
# fit on an H100's multiprocessor? And what is the largest number of registers with which they are no longer scarcer
# than shared memory?

# %%
fitting, few_enough = None, None

if fitting is not None and few_enough is not None:
    assert fitting == min(programs_that_fit(200, 40_000, 4, h100).values()), "65,536 registers, 128 threads"
    by_shared = programs_that_fit(200, 40_000, 4, h100)["shared memory"]
    assert programs_that_fit(few_enough, 40_000, 4, h100)["registers"] >= by_shared, "registers are still scarcer"
    assert programs_that_fit(few_enough + 1, 40_000, 4, h100)["registers"] < by_shared, "more would do"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `fitting, few_enough = 2, 96`. 200 · 128 registers fit twice into 65,536. By shared memory 5 programs fit: 65,536 /
# (5 · 128) is 102.4, and since a warp gets registers 256 at a time, the next step down is 96.
#
# </details>
#
# **5.** How many weights (in bfloat16) must a model of `num_layers` layers have in its matrices, so that reading them
# takes as long as asking for every kernel of a step? Use `launches`, `launch` and `h100.bandwidth`.


# %%
def break_even(num_layers):
    """Weights for which the GPU reads as long as the CPU asks."""
    return None


if break_even(30) is not None:
    assert abs(2 * break_even(30) / h100.bandwidth - launch * launches(30)) < 1e-9, "2 bytes for each weight"
    for name in ("SmolLM2-135M", "Llama-3-8B"):
        one = published_model(name)
        waits = matrix_weights(one) < break_even(one.config.num_layers)
        assert waits == (name == "SmolLM2-135M"), "the figure of section 9 says who waits for the CPU"
    print(f"right: {break_even(32) / 1e9:.1f} billion for 32 layers")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def break_even(num_layers):
#     return launch * launches(num_layers) * h100.bandwidth / 2
# ```
# Only the number of launches counts, not the width of the layers: a deep and narrow model waits for its launches.
#
# </details>
#
# ---
# **Back:** [09_paged_attention](09_paged_attention.ipynb) · **Next:**
# [11_continuous_batching](11_continuous_batching.ipynb): who is in the batch, and when.
