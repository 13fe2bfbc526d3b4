# %% [markdown]
# # 06 · The KV cache
#
# A language model writes one token at a time, and each new token depends on the whole text before it. Must the whole
# text be read again for every token? It need not: a part of the work can be kept, in what papers and programs call the
# **KV cache**. This notebook is about what is kept, why that is allowed, what it saves, and what it costs in memory.
# That last cost is what the rest of the course is about.
#
# **By the end of this notebook you will be able to**
#
# - count the arithmetic of a model's pass, and say how much of it is done again without a cache;
# - explain why keys and values of earlier tokens never change, and why queries need not be kept;
# - tell from two numbers of a machine whether reading a prompt and writing an answer wait for arithmetic or for memory;
# - compute the memory of keys and values for any published model, and how many sequences fit on a card;
# - show how much of it a store wastes that must reserve room for answers of unknown length.
#
# **You need** notebooks [03](03_attention.ipynb) (attention) and [05](05_decoder_only.ipynb) (the decoder-only model).
# No GPU.
#
# **New here**: notebooks 00, 04 and 05 used `ContiguousCache` as it came; now you look inside.
#
# **Time**: about 75 minutes (it runs in about 20 s on two cores).

# %%
import random
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

import minillm
from minillm.cache.contiguous import ContiguousCache
from minillm.errors import CacheFullError
from minillm.training.stories import tell
from minillm.transformer.attention import dot_product_attention
from minillm.transformer.kv import KVStore, NoCache, PaddedBatch
from minillm.viz import (
    PUBLISHED,
    Machine,
    Reservation,
    explore_kv_memory,
    forward_bytes,
    forward_flops,
    matrix_weights,
    own_heads,
    plot_kv_memory,
    plot_kv_per_token,
    plot_lines,
    plot_reservation,
    plot_roofline,
    plot_slots,
    plot_work,
    published_model,
    show_source,
)

model = minillm.load_model("tiny", dtype="float32", device="cpu")
tokenizer = minillm.get_tokenizer("tiny")
config = model.config
print(f"{config.num_layers} layers, {config.num_heads} query heads, {config.num_kv_heads} key/value heads")

# %% [markdown]
# ## 1 · What is done again
#
# The plainest loop of generation gives the model the prompt, takes a token, gives it the prompt and that token, takes
# another, and so on. Here are ten passes after a prompt of eight tokens. Left, everything orange was computed in
# an earlier pass already and is computed again. Right is what we are after: each token is computed once.

# %%
plot_work(prompt=8, written=10, title="Without a store, every pass computes the whole text again")
plt.show()

# %% [markdown]
# The orange part grows with the square of the answer's length. How much arithmetic is it? Count it as notebook 03 did
# ("What attention costs"), now for a whole model, in **FLOPs** (floating-point operations): 2 a token for every weight
# of a matrix, and $4\,d$ for each query head and key, for heads of $d$ channels.

# %%
show_source(forward_flops)

# %% [markdown]
# PyTorch's own count must agree. (We ask it to use the plain form of attention, whose operations it knows; like our
# count, that form also computes the half of the square which the causal mask then hides.)

# %%
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

stories = [tokenizer(tell(random.Random(number)).text).input_ids for number in range(12)]
text = [token for story in stories for token in story][: config.max_position_embeddings]
assert len(text) == config.max_position_embeddings
for length in (1, 10, 100):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.tensor([text[:length]]))
    assert counter.get_total_flops() == forward_flops(model, new=length, keys=length)
    print(f"{length:4d} tokens: {counter.get_total_flops():13,} FLOPs")

# %% [markdown]
# Now both ways of writing 100 tokens after a prompt of 20. Without a store, pass number $t$ computes all tokens so far.
# With one, the first pass computes the prompt, and every later pass a single token that looks at all the others.

# %%
prompt, written = 20, 100
lengths = range(prompt, prompt + written)  # of the text that each pass reads
again = sum(forward_flops(model, new=n, keys=n) for n in lengths)
first, *later = lengths
once = forward_flops(model, first, first) + sum(forward_flops(model, new=1, keys=n) for n in later)
print(f"everything again: {again / 1e9:6.2f} GFLOPs")
print(f"each token once:  {once / 1e9:6.2f} GFLOPs, {again / once:.0f} times fewer")

# %% [markdown]
# ## 2 · Why it may be kept
#
# May we use what an earlier pass has computed? Only if it would come out the same again. In a causal decoder it does. A
# token's vector after the first layer is made of itself and of the tokens before it; so is every vector after the
# second layer, and so on. What is written later never reaches back.
#
# Let us look at the last layer's output for 20 tokens of a story, and for the same 20 with 20 more behind them. For
# comparison, we take the causal mask away.


# %%
@torch.inference_mode()
def last_layer(ids, causal):
    store = NoCache([replace(spec, causal=causal) for spec in config.attention_specs])
    batch = PaddedBatch.full(1, len(ids))
    store.begin(batch)
    return model.hidden(torch.tensor([ids]), batch.positions(), store)[0]


for causal in (True, False):
    alone, continued = last_layer(text[:20], causal), last_layer(text[:40], causal)[:20]
    same = torch.allclose(alone, continued, atol=1e-3)
    assert same == causal
    print(f"causal={causal!s:5}: the first 20 outputs are {'the same' if same else 'others'} in the longer text")

# %% [markdown]
# (An encoder, where every token sees every other one, could not do what follows. The decoder of notebook 04 can.)
#
# So the outputs of old tokens can be kept. But what of them will be needed? Take a new token and follow it through a
# layer of the model. Everything works on this token alone (norms, projections, the feed-forward network) except for one
# place: `kv.attend`, where its query meets the keys and values of the tokens before it.

# %%
from minillm.transformer.multi_head import MultiHeadAttention

show_source(MultiHeadAttention.forward)

# %% [markdown]
# A new token needs, of every old token and in every layer, **its key and its value**. It does not need the old token's
# query: a query is used once, for the output at its own place, and that output is done. Nor does it need the old hidden
# vectors or logits.
#
# Note that the key is kept *after* its rotation. Its rotation depends on its own position only (notebook 02), so it is
# final as well.
#
# This is why `kv` stands where it stands. It is the whole interface between the model and its memory:

# %%
show_source(KVStore)

# %% [markdown]
# `begin` announces which tokens are coming, once a pass. `attend` is called by each layer. The store that keeps nothing
# attends over what it is given, and forgets it:

# %%
show_source(NoCache.attend)

# %% [markdown]
# ### A store that remembers
#
# `ContiguousCache` holds, for each layer, one tensor of keys and one of values, `[batch, kv_heads, max_len, head_dim]`.
# There are `max_len` **slots** for each sequence, and the slot of a token is its position. `attend` writes what is new
# into its slots, then lets the queries look at all slots up to the end.

# %%
show_source(ContiguousCache.attend)

# %% [markdown]
# Writing is plain assignment. In the simple case all rows start at the same position, and the new tokens are one
# rectangle of the tensor:

# %%
show_source(ContiguousCache._write)

# %% [markdown]
# `begin` keeps the batch in mind and checks that it fits. (`_real` is for batches whose rows differ in length; we meet
# them in section 6.)

# %%
show_source(ContiguousCache.begin)

# %% [markdown]
# Step by step, then. `run` gives the model some tokens that stand at `start` and after, on any store. First the
# prompt in one call, then one token at a time, and after each we compare with a model that reads all of it again.


# %%
@torch.inference_mode()
def run(ids, start, store):
    """Logits after each of `ids`, which stand at positions start, start + 1, …: [len(ids), vocab]."""
    batch = PaddedBatch.full(1, len(ids), start)
    store.begin(batch)
    return model(torch.tensor([ids]), batch.positions(), store)[0]


nothing = NoCache(config.attention_specs)
cache = ContiguousCache.for_decoder(model, batch_size=1, max_len=24)
states = {"made": cache.k[0][0, 0].clone()}

# %% [markdown]
# `states` will hold snapshots of a small part of the store, so that we can look at it afterwards.

# %%
assert torch.allclose(run(text[:12], 0, cache), run(text[:12], 0, nothing), atol=1e-3)
states["after a prompt of 12"] = cache.k[0][0, 0].clone()
for position in range(12, 18):
    logits = run([text[position]], position, cache)[-1]  # one token goes in
    recomputed = run(text[: position + 1], 0, nothing)[-1]  # the whole text goes in
    assert torch.allclose(logits, recomputed, atol=1e-3)
states["after 6 more tokens"] = cache.k[0][0, 0].clone()
print("one token or the whole text: the same logits, six times")

# %% [markdown]
# The logits are equal (up to rounding: a product of other shapes adds in another order). And no line of the model has
# changed; `run` passed one store or the other. This is the store's memory for the keys of layer 0, head 0. Rows that
# were once written stay as they are; below the green line nobody has written yet.

# %%
title = "Slots are filled from the top, and written slots never change"
plot_slots(states, used=(0, 12, 18), title=title)
plt.show()
assert torch.equal(states["after a prompt of 12"][:12], states["after 6 more tokens"][:12])

# %% [markdown]
# ## 3 · What it saves, measured
#
# The arithmetic of *one more token* after a text of a given length: with a store, it grows a little, since there are
# more keys to look at. Without one, it is that of the whole text.

# %%
lengths = [64, 128, 192, 256, 320, 384, 448, 512]
without = [forward_flops(model, new=n, keys=n) for n in lengths]
stored = [forward_flops(model, new=1, keys=n) for n in lengths]
assert [a // b for a, b in zip(without, stored, strict=True)] == lengths
print(f"at {lengths[-1]} tokens: {without[-1] / 1e6:,.1f} MFLOPs without a store")
print(f"               {stored[-1] / 1e6:7,.1f} MFLOPs with one")

# %% [markdown]
# In arithmetic the saving is exactly the length of the text: 512 times fewer FLOPs at 512 tokens. Do we save as much
# time? (Yours will differ from what is printed here; look at the shapes.)

# %% tags=["nbval-ignore-output"]
import time


def milliseconds(work, repeats=3):
    """The best of some trials, after one to warm up."""
    work()
    trials = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        trials.append(1000 * (time.perf_counter() - start))
    return min(trials)


cache = ContiguousCache.for_decoder(model)  # max_len: the model's whole context
run(text, 0, cache)
times = {
    "everything again": [milliseconds(lambda n=n: run(text[:n], 0, nothing)) for n in lengths],
    "with a store": [milliseconds(lambda n=n: run([text[n - 1]], n - 1, cache)) for n in lengths],
}

# %% tags=["nbval-ignore-output"]
labels = {"xlabel": "length of the text (tokens)", "ylabel": "time for one more token (ms)"}
plot_lines(lengths, times, **labels, title="With a store, the text before a token hardly matters")
plt.show()
slow, fast = times["everything again"][-1], times["with a store"][-1]
print(f"at {lengths[-1]} tokens: {slow:.1f} ms against {fast:.1f} ms, {slow / fast:.0f} times faster")

# %% [markdown]
# It is much faster, and yet the pass over one token, with 512 times less arithmetic than the pass over 512, is nowhere
# near 512 times faster. (A part of this is the fixed price of calling PyTorch some hundred times, which a model as
# small as `tiny` feels. But large models show the same.) The next section explains why.
#
# ## 4 · Two kinds of work: prefill and decode
#
# With a store, generation has two parts that are very different for a machine:
#
# - **prefill**: the prompt's tokens go through the model together. Every weight matrix is multiplied with *many* rows;
# - **decode**: one token a sequence goes through the model. Every weight matrix is multiplied with *one* row.
#
# Before a weight can be multiplied, it must come from memory. In prefill, a weight that has come is used for many
# tokens. In decode, it comes, is used once, and is gone.
#
# ### Arithmetic intensity
#
# Count for a piece of work the FLOPs, and the bytes that must move from and to memory. Their quotient is its
# **arithmetic intensity** (Williams, Waterman and Patterson 2009, "Roofline", who call it *operational intensity*).
# For one linear layer, in 16-bit numbers:


# %%
def linear_intensity(rows, inputs=4096, outputs=4096, itemsize=2):
    """FLOPs a byte of [rows, inputs] times [inputs, outputs]: read weights and inputs, write outputs."""
    flops = 2 * rows * inputs * outputs
    moved = itemsize * (inputs * outputs + rows * inputs + rows * outputs)
    return flops / moved


for rows in (1, 16, 256, 4096):
    print(f"{rows:5,} rows: {linear_intensity(rows):8.1f} FLOPs a byte")

# %% [markdown]
# One row: 1 FLOP a byte. As long as the weights are most of what moves, the intensity is simply the number of rows.
#
# Now the machine. It can do so many FLOPs a second and move so many bytes a second, and its **ridge** is the quotient
# of the two: the intensity at which both are busy. Below it, the arithmetic units wait for memory; above it, memory
# waits for them. The numbers of the H100 are from NVIDIA's data sheet (SXM, bfloat16 without sparsity). Those of the
# laptop are an assumption; put in your own.

# %%
h100 = Machine("H100", flops=989e12, bandwidth=3.35e12)
laptop = Machine("a laptop", flops=0.5e12, bandwidth=50e9)
for machine in (h100, laptop):
    print(f"{machine.name:9s} ridge: {machine.ridge:5.1f} FLOPs a byte")

# %% [markdown]
# And what of attention? In decode, each sequence's queries are multiplied with *that sequence's own* keys and values.
# Each key of $d$ channels is met by the queries of its group (notebook 03): $2d$ FLOPs for each of them, against
# $2d$ bytes in 16-bit numbers. So the intensity of attention over the cache is the number of query heads that share a
# key/value head, and the batch does not matter:


# %%
def attention_intensity(config, batch, keys, itemsize=2):
    """FLOPs a byte of decode's attention in one layer: read all keys and values, use each for its group."""
    flops = batch * config.num_heads * keys * 2 * (2 * config.head_dim)
    moved = itemsize * batch * config.num_kv_heads * keys * (2 * config.head_dim)
    return flops / moved


for name in ("Llama-2-7B", "Llama-3-8B", "GLM-4-9B"):
    shared = published_model(name).config
    intensities = {attention_intensity(shared, batch, keys=4096) for batch in (1, 8, 64)}
    assert intensities == {shared.num_heads / shared.num_kv_heads}
    print(f"{name}: {shared.num_heads} query heads on {shared.num_kv_heads} KV heads → {intensities}")

# %% [markdown]
# Let the number of sequences that decode together grow. For a linear layer each of them is one more row; for attention
# each is one more text to read.

# %%
batches = [2**i for i in range(11)]
llama3 = published_model("Llama-3-8B").config
curves = {
    "linear layer, 4,096 × 4,096": [linear_intensity(batch) for batch in batches],
    "attention over the cache, Llama-3-8B": [attention_intensity(llama3, batch, 4096) for batch in batches],
}
ridges = {f"{machine.name}'s ridge": machine.ridge for machine in (h100, laptop)}
labels = {"xlabel": "sequences that decode together", "ylabel": "FLOPs a byte", "scale": "log"}
title = "A batch shares its weights, but not its keys and values"
plot_lines(batches, curves, **labels, levels=ridges, title=title)
plt.show()

# %% [markdown]
# This picture holds two of the main facts about serving language models:
#
# 1. **Decode together.** One sequence uses less than a hundredth of an H100's arithmetic. A hundred sequences in one
#    batch read the same weights once, and their linear layers take hardly more time than those of one, until the ridge
#    is reached.
# 2. **Attention does not profit.** Each sequence brings its own keys and values, and they must all be read for every
#    token. Sharing them among query heads (grouped heads) is what raises that line.
#
# ### The roofline
#
# Williams et al. draw both limits in one figure: the sloping part of the roof is what memory allows, the flat part is
# what the arithmetic units can do. We mark whole passes of Llama-3-8B. The bytes are counted like the FLOPs:

# %%
show_source(forward_bytes)

# %%
llama = published_model("Llama-3-8B")


def intensity(new, keys, batch=1):
    return forward_flops(llama, new, keys, batch) / forward_bytes(llama, new, keys, batch)


work = {
    "prefill: a prompt of 2,048": intensity(2048, 2048),
    "decode: 64 sequences, 2,048 keys each": intensity(1, 2048, batch=64),
    "decode: 1 sequence, 2,048 keys": intensity(1, 2048),
}
plot_roofline([h100, laptop], work, title="Prefill waits for arithmetic; decode, on an H100, for memory")
plt.show()

# %% [markdown]
# The three passes lie far apart. A single sequence stands at the very bottom of the slope. The laptop's roof is lower
# everywhere, but it is flat much earlier: with 64 sequences it would be busy already.

# %%
assert laptop.ridge < work["decode: 64 sequences, 2,048 keys each"]
assert work["prefill: a prompt of 2,048"] > h100.ridge > work["decode: 64 sequences, 2,048 keys each"]
alone = work["decode: 1 sequence, 2,048 keys"]
share = h100.attainable(alone) / h100.flops
print(f"one sequence: {alone:.2f} FLOPs a byte, {share:.1%} of an H100's arithmetic")

# %% [markdown]
# ### The speed limit
#
# One sequence that decodes must read every weight for every token. So no engine, however clever, gets more tokens a
# second than *bandwidth divided by the bytes of the weights*, short of using fewer bytes or guessing tokens ahead:

# %%
print("most tokens a second for one sequence, bfloat16:")
for name in PUBLISHED:
    weights = 2 * matrix_weights(published_model(name))
    limits = [f"{machine.bandwidth / weights:7,.1f} ({machine.name})" for machine in (h100, laptop)]
    print(f"{name:13s} {weights / 1e9:5.2f} GB of matrices  {'  '.join(limits)}")

# %% [markdown]
# For a batch, one pass gives a token to each sequence. It moves the weights once and every sequence's keys and values,
# so the curve bends: the more of the traffic is keys and values, the less another sequence adds.


# %%
def tokens_a_second(name, batch, keys, machine):
    """The roofline's limit for decode: the slower of moving the bytes and doing the arithmetic."""
    one = published_model(name)
    moving = forward_bytes(one, 1, keys, batch) / machine.bandwidth
    computing = forward_flops(one, 1, keys, batch) / machine.flops
    return batch / max(moving, computing)


batches = [1, 16, 32, 64, 96, 128, 192, 256]
names = ("GLM-4-9B", "Llama-3-8B", "Llama-2-7B")
limits = {name: [tokens_a_second(name, batch, 4096, h100) for batch in batches] for name in names}

# %%
labels = {"xlabel": "sequences that decode together, 4,096 keys each", "ylabel": "tokens a second, at best"}
title = "On an H100: the less a model keeps of each token, the more a batch helps"
plot_lines(batches, limits, **labels, title=title)
plt.show()

# %% [markdown]
# Llama-2-7B has the fewest weights of the three and is the first to stop gaining, since it keeps the most of every
# token. Whether so many sequences have *room* on the card is another question; it is the next section's.
#
# ### Measured
#
# Does this machine agree? We take a linear layer whose weights are 64 MiB, and attention over 1,024 keys a sequence,
# and serve 32 sequences: one by one, two by two, up to all at once. If the above is right, larger groups take less time
# in the linear layer, and as much as before in attention.

# %%
torch.manual_seed(0)
weight, inputs = torch.randn(4096, 4096), torch.randn(32, 4096)
queries = torch.randn(32, 4, 1, 128)  # [batch, heads, queries, head_dim]
keys, values = torch.randn(2, 32, 4, 1024, 128)  # [batch, kv_heads, keys, head_dim]


def linear(group):
    return [torch.nn.functional.linear(rows, weight) for rows in inputs.split(group)]


def attention(group):
    groups = zip(queries.split(group), keys.split(group), values.split(group), strict=True)
    return [dot_product_attention(q, k, v) for q, k, v in groups]


# %% [markdown]
# Whatever the size of the groups, all 32 sequences are served in the end, so the arithmetic is always the same.

# %% tags=["nbval-ignore-output"]
groups = [1, 2, 4, 8, 16, 32]
per_sequence = {
    "linear layer": [milliseconds(lambda size=size: linear(size)) / 32 for size in groups],
    "attention": [milliseconds(lambda size=size: attention(size)) / 32 for size in groups],
}
labels = {"xlabel": "sequences in a batch", "ylabel": "ms for each sequence", "scale": "log"}
title = "Measured: a batch shares the weights' way from memory"
plot_lines(groups, per_sequence, **labels, title=title)
plt.show()

# %% [markdown]
# And `tiny` itself, in tokens a second: its prompt in one pass, against the same tokens one by one.

# %% tags=["nbval-ignore-output"]
prefill = milliseconds(lambda: run(text[:256], 0, cache))
decode = milliseconds(lambda: [run([text[i]], i, cache) for i in range(224, 256)])
print(f"prefill {256 / prefill * 1000:7,.0f} tokens a second")
print(f"decode  {32 / decode * 1000:7,.0f} tokens a second")

# %% [markdown]
# ## 5 · What it costs: the memory formula
#
# One token's keys and values are kept in every layer and for every key/value head:
#
# **bytes a token = 2 · layers · key/value heads · head dim · bytes a number**
#
# The 2 stands for a key and a value. Let us see whether the store really takes that much:

# %%
by_hand = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
assert by_hand == config.kv_bytes_per_token(torch.float32)

store = ContiguousCache.for_decoder(model, batch_size=3, max_len=100)
assert store.num_bytes == 3 * 100 * by_hand
print(f"tiny: {by_hand:,} bytes a token; 3 sequences of 100 tokens: {store.num_bytes / 2**20:.2f} MiB")

# %% [markdown]
# For published models, everything that the formula needs stands in their `config.json`. Families write it under
# different names; the package translates (notebook 05). `PUBLISHED` holds the lines that decide sizes. Compare Llama
# with GLM-4, whose key/value heads are called groups:

# %%
for name in ("Llama-3-8B", "GLM-4-9B"):
    print(name)
    for key, value in PUBLISHED[name].items():
        if "num" in key or key in ("hidden_size", "kv_channels"):
            print(f"    {key}: {value}")

# %% [markdown]
# `published_model` builds the model on the "meta" device (notebook 04), which is enough to count weights and bytes. In
# bfloat16, two bytes a number:

# %%
configs = {"tiny": config} | {name: published_model(name).config for name in PUBLISHED}
print("               layers  heads  kv  dim   KiB a token   GiB at 8k  GiB at 128k")
for name, one in configs.items():
    token = one.kv_bytes_per_token(torch.bfloat16)
    shape = f"{one.num_layers:6d} {one.num_heads:6d} {one.num_kv_heads:3d} {one.head_dim:4d}"
    gib = [tokens * token / 2**30 for tokens in (8192, 131072)]
    print(f"{name:13s}  {shape}  {token / 2**10:12.1f} {gib[0]:11.2f} {gib[1]:12.2f}")
long_trained = [name for name, one in configs.items() if one.max_position_embeddings >= 131072]
assert long_trained == ["GLM-4-9B"]

# %% [markdown]
# (The formula does not care whether a model was trained for texts that long: Llama-2-7B was for 4,096 tokens, of these
# only GLM-4 for 131,072.)
#
# Llama-2-7B has plain multi-head attention, the others have grouped heads (notebook 03, "Grouped heads"). What would
# they take if they had not?

# %%
plot_kv_per_token(configs, title="Grouped heads divide the memory of keys and values")
plt.show()

# %% [markdown]
# Beside each name stand the query heads and the key/value heads. Their quotient is what is saved:

# %%
for name, one in configs.items():
    factor = one.num_heads / one.num_kv_heads
    token = one.kv_bytes_per_token(torch.bfloat16)
    assert own_heads(one).kv_bytes_per_token(torch.bfloat16) == factor * token
    print(f"{name:13s} {factor:4.0f} times less than with a key/value head for every query head")

# %% [markdown]
# ### How many sequences fit?
#
# Take a card with 80 GB. The weights are on it already; some memory is needed for intermediate results, which we leave
# out here. What is left holds keys and values. How many sequences of 4,096 tokens is that?

# %%
card, context = 80e9, 4096
room = {}
for name in PUBLISHED:
    one = published_model(name)
    weights = 2 * sum(parameter.numel() for parameter in one.parameters())
    sequence = context * one.config.kv_bytes_per_token(torch.bfloat16)
    room[name] = int((card - weights) // sequence)
    sizes = f"{weights / 1e9:5.1f} GB of weights, {sequence / 1e9:5.2f} GB a sequence"
    print(f"{name:13s} {sizes}: {room[name]:4d} fit")
assert room["GLM-4-9B"] > room["Llama-3-8B"] > room["Llama-2-7B"]

# %% [markdown]
# Go back to the speed limit in section 4 with these numbers in mind. To reach an H100's ridge, the linear layers need
# more than 300 sequences. Of Llama-2-7B, not a tenth of that fits. **Memory for keys and values decides how many
# sequences run together, and how many run together decides how well the machine is used.** Whoever wastes this memory
# wastes the machine.
#
# ### Try it
#
# Which card does a model need? The bars are what is needed, and what three sizes of card have.

# %%
plot_kv_memory("Llama-3-8B", context=8192, batch=16, dtype="bfloat16")
plt.show()

# %% [markdown]
# With a running kernel, here it is with controls. Predict before you move:
#
# 1. Which of the five models can hold one text of 131,072 tokens on a 24 GB card (in bfloat16)?
# 2. How many sequences of 32,768 tokens of Qwen3-8B fit on 80 GB? And in float8?
# 3. Halving the numbers' size more than doubles how many fit. Why?

# %% tags=["nbval-ignore-output"]
explore_kv_memory()

# %% [markdown]
# <details><summary>Answers</summary>
#
# 1. Only SmolLM2-135M (it was never trained for it, but it has the room). GLM-4-9B comes close: it needs 18.8 GB for
#    its weights and 5.4 GB for the text.
# 2. 13, and 29 in float8.
# 3. The weights shrink as well, and what they leave is room for more keys and values.
#
# </details>

# %% [markdown]
# ## 6 · What a contiguous store must reserve
#
# `ContiguousCache` asks for `max_len` when it is made. But how long will an answer become? Nobody knows: the model
# itself decides when to stop, token by token. What happens if we guess too low?

# %%
small = ContiguousCache.for_decoder(model, batch_size=1, max_len=16)
run(text[:16], 0, small)
try:
    run([text[16]], 16, small)
except CacheFullError as error:
    print("CacheFullError:", error)

# %% [markdown]
# A tensor cannot grow in place, and its neighbour in memory belongs to another sequence. One could make a longer one
# and copy, at a bad moment and with room for both. So serving systems guessed high: they reserved, for every sequence,
# room for the longest text that was allowed (Kwon et al. 2023, §3.1, describe the systems before their own).
#
# ### Rows of different lengths
#
# First, how several sequences share one store. A `PaddedBatch` says for each row where it starts and how many of its
# tokens are real; shorter rows are padded to a rectangle. Padding is computed along and thrown away; it is never
# written into the store.

# %%
prompts = [text[:5], text[20:29], text[40:43]]
ragged = PaddedBatch(starts=(0, 0, 0), lengths=(5, 9, 3))
print(ragged.is_real().int())
padded = [ids + [0] * (ragged.seq_len - len(ids)) for ids in prompts]
store = ContiguousCache.for_decoder(model, batch_size=3, max_len=32)
store.begin(ragged)
with torch.inference_mode():
    together = model(torch.tensor(padded), ragged.positions(), store)

# %% [markdown]
# Does a row notice its neighbours, or its padding?

# %%
for row, ids in enumerate(prompts):
    assert torch.allclose(together[row, : len(ids)], run(ids, 0, nothing), atol=1e-3)
    assert not store.k[0][row, :, len(ids) :].any()  # untouched
print("each row's logits are what it gets alone")

# %% [markdown]
# Decoding goes on from there: every row brings one token, each at its own position.

# %%
step = PaddedBatch(starts=(5, 9, 3), lengths=(1, 1, 1))
following = [text[5], text[29], text[43]]
store.begin(step)
with torch.inference_mode():
    together = model(torch.tensor(following)[:, None], step.positions(), store)
for row, (ids, token) in enumerate(zip(prompts, following, strict=True)):
    assert torch.allclose(together[row, -1], run([*ids, token], 0, nothing)[-1], atol=1e-3)
print("positions", step.positions().flatten().tolist())

# %% [markdown]
# ### Drawn, and measured
#
# Now a more serious load: 16 requests, with prompts and answers of very different lengths, as real users send them
# (here drawn at random, many short and few long). The server allows 2,048 tokens and reserves them. This is its memory
# after every sequence has written up to 150 tokens:

# %%
rng = random.Random(6)
max_len = 2048


def drawn_length(typical):
    return max(4, min(max_len // 2, round(rng.lognormvariate(0, 0.9) * typical)))


requests = [(drawn_length(160), drawn_length(240)) for _ in range(16)]  # tokens of (prompt, answer)
now = Reservation.at(requests, max_len, step=150)
title = f"{now.utilisation:.0%} of the reserved memory holds a token"
plot_reservation(requests, max_len, step=150, title=title)
plt.show()

# %% [markdown]
# In numbers, now and when the last of them has ended:

# %%
end = Reservation.at(requests, max_len, step=max_len)
reserved = len(requests) * max_len
print(f"after 150 tokens: {now.utilisation:5.1%} used, {now.to_come.sum() / reserved:5.1%} still to come")
print(f"at the end:       {end.utilisation:5.1%} used, {end.never.sum() / reserved:5.1%} never needed")
assert now.utilisation < end.utilisation < 0.5

# %% [markdown]
# Two kinds of waste are to be seen, and both have names (Kwon et al. 2023, §3.1). The grey part is **internal
# fragmentation**: reserved and never used. The hatched part is **reserved** for later: it will be used, but until then
# no other request can have it. A third kind does not occur here, since all our rows are equally long: a server that
# gives each request a stretch of its own size leaves gaps between the stretches that fit nobody, **external
# fragmentation**.
#
# Kwon et al. profiled the serving systems of their time. Of the memory set aside for keys and values, only 20.4 % to
# 38.2 % held those of actual tokens (§1 and figure 2). Our 16 requests are made up, but the order of magnitude agrees.
#
# What does that mean for our 80 GB card? If a sequence took only what it uses at the end, several times as many would
# run together:

# %%
one = published_model("Llama-2-7B")
left = card - 2 * sum(parameter.numel() for parameter in one.parameters())
token = one.config.kv_bytes_per_token(torch.bfloat16)
mean_need = sum(prompt + answer for prompt, answer in requests) / len(requests)
fit_reserved, fit_needed = int(left // (max_len * token)), int(left // (mean_need * token))
print(f"Llama-2-7B, {max_len:,} tokens reserved for each: {fit_reserved} sequences")
print(f"Llama-2-7B, as many tokens as it comes to need:  {fit_needed} sequences")
assert fit_needed > 2 * fit_reserved

# %% [markdown]
# Knowing every length beforehand would help, but not even that would be enough: room for the last token would still be
# held from the first moment on. What one wants is to give a sequence memory *as it grows*, a little at a time, from
# anywhere. Operating systems have done exactly this for sixty years, with pages. That idea opens the next stage of the
# course.
#
# ## What to take along
#
# | | prefill | decode |
# | --- | --- | --- |
# | tokens a pass | the whole prompt | one a sequence |
# | a weight that was read is used for | every token of the prompt | every sequence of the batch |
# | usually limited by | arithmetic | memory traffic |
# | keys and values | are written | are all read, for every token |
#
# - Keys and values of old tokens are final in a causal decoder; queries are used once.
# - Bytes a token: 2 · layers · KV heads · head dim · bytes a number. A batch shares weights, never keys and values.
# - A contiguous store must reserve for the longest case, and most of that stays empty.
#
# ## Sources
#
# - Waterman, Williams and Patterson 2009, "Roofline: An Insightful Visual Performance Model for Multicore
#   Architectures"
# - Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP: §1,
#   §3, §6
#
# ## Exercises
#
# Replace each `None`; when the answer is right, the cell says so.
#
# **1.** TinyLlama-1.1B has 22 layers, 32 query heads, 4 key/value heads and a hidden size of 2,048; heads divide the
# hidden size evenly. How many bytes do the keys and values of a text of 2,048 tokens take in bfloat16?

# %%
text_bytes = None

if text_bytes is not None:
    smollm = published_model("SmolLM2-135M").config  # its heads have as many channels
    tiny_llama = replace(smollm, layers=smollm.layers[:22], num_heads=32, num_kv_heads=4)
    expected = 2048 * tiny_llama.kv_bytes_per_token(torch.bfloat16)
    assert text_bytes == expected, "head dim = hidden size / query heads"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `text_bytes = 2048 * 2 * 22 * 4 * (2048 // 32) * 2`, which is 46,137,344 bytes or 44 MiB. The number of query heads
# matters only for the size of a head.
#
# </details>
#
# **2.** How many rows must a 4,096 × 4,096 linear layer (bfloat16) be multiplied with at least, so that an H100's
# arithmetic is the limit? Find the smallest whole number.

# %%
rows_needed = None

if rows_needed is not None:
    assert linear_intensity(rows_needed) >= h100.ridge, "memory is still the limit"
    assert linear_intensity(rows_needed - 1) < h100.ridge, "fewer would do"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `rows_needed = next(n for n in range(1, 5000) if linear_intensity(n) >= h100.ridge)`, which is 345. It is more than
# the ridge of 295, because the rows themselves must be moved as well.
#
# </details>
#
# **3.** A conversation has several turns. When the user sends the next message, the store still holds everything so
# far. Write `next_turn`: read only what is new, and return the logits after the last token. (`run` does the work.)


# %%
def next_turn(store, kept, new):
    """Logits after `new`, where `store` holds the first `kept` tokens of the text already."""
    return None


kept_store = ContiguousCache.for_decoder(model)
run(text[:60], 0, kept_store)  # the conversation so far
after = next_turn(kept_store, kept=60, new=text[60:75])
if after is not None:
    assert after.shape == (config.vocab_size,), "the logits after the last token only"
    assert torch.allclose(after, run(text[:75], 0, nothing)[-1], atol=1e-3), "where do the new tokens stand?"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def next_turn(store, kept, new):
#     return run(new, kept, store)[-1]
# ```
# Several queries at once, behind keys that are there already: neither a whole prompt nor a single token. The store
# makes the mask for it (`ContiguousCache._mask`). A server that keeps what conversations have in common does the same
# on a larger scale; we come to it with prefix sharing.
#
# </details>
#
# **4.** A server might know each answer's length roughly and reserve the next power of two of prompt + answer: for 300
# tokens, 512 slots. (Kwon et al. 2023, §6.1, compare with a similar system.) Compute the share of the reserved memory
# that holds a token when every sequence has just ended.


# %%
def used_at_the_end(requests):
    """Share of used slots where each request has the next power of two."""
    return None


share = used_at_the_end(requests)
if share is not None:
    two = used_at_the_end([(100, 156), (200, 100)])  # 256 slots and 512
    assert two == (256 + 300) / (256 + 512), "256 is a power of two itself"
    print(f"right: {share:.0%}, against {end.utilisation:.0%} with {max_len:,} slots for each")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def used_at_the_end(requests):
#     needed = [prompt + answer for prompt, answer in requests]
#     return sum(needed) / sum(2 ** (need - 1).bit_length() for need in needed)
# ```
# Much better, and still at most twice too much for a single sequence. And it rests on knowing the length, and on
# stretches of different sizes fitting together.
#
# </details>
#
# ---
# **Back:** [05_decoder_only](05_decoder_only.ipynb) · **Next:** [07_memory_waste](07_memory_waste.ipynb): requests that
# arrive and leave, what reservation wastes over time, and then the mend, blocks.
