# %% [markdown]
# # 03 · Attention
#
# In "Mia lost her kite. She cried.", who cried? To answer, the word "She" must fetch something from the word "Mia",
# four words earlier. Attention is the part of a Transformer that fetches. This notebook takes it apart, puts it
# together again, and then looks at what it does inside a trained model.
#
# **By the end of this notebook you will be able to**
#
# - write scaled dot-product attention in four lines, and say why each of them is there;
# - draw the masks that language models use, and say what goes wrong without them;
# - explain heads and grouped heads, and compute what the latter save;
# - look into a trained model, find heads by what they *do*, and test by experiment whether one matters;
# - say from which length on attention costs more than the rest of the model.
#
# **You need** notebook [02](02_positions.ipynb) (positions; a first look at queries, keys and values), matrix products.
# No GPU.
#
# **New here**: notebook 02 used the attention layer as a black box; now you open it, and see what it
# does in a trained model.
#
# **Time**: about 90 minutes (it runs in about 30 s on two cores).

# %%
import random
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

import minillm
from minillm.progress import progress
from minillm.transformer.attention import attention_mask, dot_product_attention, sdpa_attention
from minillm.transformer.kv import AttentionSpec, NoCache, PaddedBatch
from minillm.transformer.multi_head import MultiHeadAttention
from minillm.viz import (
    RecordingStore,
    SilencingStore,
    attention_maps,
    best_head,
    explore_attention,
    next_token_probabilities,
    plot_cost,
    plot_groups,
    plot_head,
    plot_head_scores,
    plot_heads,
    plot_look_back,
    plot_lookup,
    plot_masks,
    plot_scale,
    published_model,
    show_source,
    token_names,
)

# %% [markdown]
# ## 1 · A dictionary that answers softly
#
# A Python dictionary compares what you ask for with its keys. One key is equal, and you get its value, whole. If no key
# is equal, you get nothing.

# %%
told_of = {"kite": "red", "Mia": "a girl", "tree": "tall"}
print(told_of["Mia"])

# %% [markdown]
# Attention is such a look-up, made soft. The **query** is compared with every **key**, each comparison gives a number,
# and the answer is a mean of *all* the **values**, weighted by how well their keys fit. Nothing is ever equal or
# missing, only more or less alike. And since means and products have derivatives, how queries, keys and values are made
# can be learned.
#
# Here are three words with keys and values of two channels, made up by hand. The comparison is a dot product: large
# when two arrows point the same way, negative when they point apart.

# %%
words = ["kite", "Mia", "tree"]
keys = torch.tensor([[0.5, -1.8], [2.0, 0.8], [-1.6, 1.0]])
values = torch.tensor([[-1.0, 1.5], [2.0, 0.5], [0.3, -1.8]])
query = torch.tensor([0.7, 0.5])  # "She", looking for a person

plot_lookup(query, keys, values, words, title="The query points nearly where Mia's key points")
plt.show()

# %% [markdown]
# The output (black, on the right) lies near Mia's value, with a little of the others mixed in. Turn the query towards
# another key, and the output follows:

# %%
between = torch.tensor([0.6, -0.4])
plot_lookup(between, keys, values, words, title="A query between two keys gets a mixture")
plt.show()

# %% [markdown]
# Keys and values are separate on purpose: what makes a word easy to find ("I am a person") need not be what it has to
# tell ("my name is Mia"). In a model, all three are computed from the word's vector by three learned matrices.
#
# ## 2 · Scaled dot-product attention
#
# Now step by step, for a sequence of 5 tokens and 8 channels, and for all queries at once (Vaswani et al. 2017,
# §3.2.1). **Step 1**, scores: every query times every key. As a matrix product,
# $S = QK^T$: row $i$ holds what token $i$ thinks of all the others.

# %%
torch.manual_seed(0)
n, d = 5, 8
q, k, v = torch.randn(3, n, d)  # queries, keys, values: [n, d] each

scores = q @ k.T  # [queries, keys]
assert torch.isclose(scores[1, 3], (q[1] * k[3]).sum())

# %% [markdown]
# **Step 2**, scale: divide by $\sqrt{d}$ (below we see why). **Step 3**, softmax along each row: $e^{s}$, divided by
# the row's sum. Now every row is positive and sums to 1.

# %%
scaled = scores / d**0.5
weights = scaled.exp() / scaled.exp().sum(dim=-1, keepdim=True)  # [queries, keys]
print(weights.sum(dim=-1))

# %% [markdown]
# **Step 4**, the weighted sum of the values; again one matrix product does it for all queries.

# %%
output = weights @ v  # [queries, d]
by_hand = sum(weights[1, key] * v[key] for key in range(n))
assert torch.allclose(output[1], by_hand, atol=1e-6)

# %% [markdown]
# That is all: $\mathrm{softmax}(QK^T/\sqrt{d})\,V$, equation 1 of the paper. Here is the package's, which does the same
# for many sequences and heads. It has a few lines more, and each is a section of this notebook: `mask` is section 3,
# `heads` section 4, `grouped` section 5. (`soft_cap` is a habit of one family, Gemma 2.)

# %%
show_source(dot_product_attention)

# %% [markdown]
# It takes `[batch, heads, tokens, channels]`. Ours is one batch row and one head; `[None, None]` puts those two
# dimensions in front. PyTorch has the same in one fused operation, about which more in section 7. All three agree:

# %%
batched = [x[None, None] for x in (q, k, v)]
assert torch.allclose(dot_product_attention(*batched)[0, 0], output, atol=1e-6)
assert torch.allclose(sdpa_attention(*batched)[0, 0], output, atol=1e-6)
print("our four lines, the package and PyTorch agree")

# %% [markdown]
# ### Why divide by √d?
#
# Let the channels of query and key be independent random numbers with mean 0 and variance 1. Each product of two
# channels then has mean 0 and variance 1, and the score is a sum of $d$ such products: its variance is $d$. That is
# footnote 4 of the paper. Dividing by $\sqrt d$ divides the variance by $d$, back to 1. We measure it, and also what
# softmax makes of 64 such scores:

# %%
dims = [4, 16, 64, 256, 1024]
spread = {"q·k": [], "q·k / √d": []}
largest = {"q·k": [], "q·k / √d": []}
for width in dims:
    products = torch.randn(400, 1, width) @ torch.randn(400, width, 64)  # 400 queries, 64 keys each
    for name, factor in (("q·k", 1.0), ("q·k / √d", width**-0.5)):
        spread[name].append(float((products * factor).var()))
        largest[name].append(float((products * factor).softmax(dim=-1).amax(dim=-1).mean()))

# %%
plot_scale(dims, spread, largest, title="Without the scale, wide heads see one key only")
plt.show()
for measured, width in zip(spread["q·k"], dims, strict=True):
    assert abs(measured / width - 1) < 0.1

# %% [markdown]
# Without the scale, a wide head gives nearly all weight to one key before it has learned anything. The trouble is not
# only that it ignores the rest. It can hardly learn to do otherwise, because a **saturated** softmax is flat: its
# derivative is $p_i(1 - p_i)$ for a weight's own score, and that is near 0 when $p_i$ is near 0 or 1.

# %%
for size in (1.0, 32.0):
    row = (torch.tensor([1.0, 0.5, -0.5, -1.0]) * size).requires_grad_()
    weight = row.softmax(dim=-1)[0]
    weight.backward()
    slope = row.grad[0].item()
    print(f"scores of size {size:2.0f}: weight {weight.item():.4f}, derivative {slope:.6f}")

# %% [markdown]
# ## 3 · Masks
#
# Some keys must not be seen. A mask is a table of booleans, `True` where a query may see a key; the score of every
# other pair becomes $-\infty$, and $e^{-\infty} = 0$ takes it out of the sum. The package makes masks from positions:

# %%
show_source(attention_mask)

# %%
steps = torch.arange(8)
real = steps < 5  # a row of 5 real tokens and 3 of padding
masks = {
    "everything": attention_mask(steps, steps, causal=False),
    "causal": attention_mask(steps, steps),
    "causal, window 3": attention_mask(steps, steps, window=3),
    "padding hidden": attention_mask(steps, steps, causal=False) & real,
}
plot_masks(masks, title="A row is a query; what it may see is coloured")
plt.show()

# %% [markdown]
# - **Everything**: each token sees each. Encoders work like this (notebook 04).
# - **Causal**: a token sees itself and what came before. Language models work like this.
# - **Window**: only the last few tokens, itself included. Mistral 7B (Jiang et al. 2023) sees 4,096 tokens in a layer;
#   through the layers below, information travels further.
# - **Padding**: texts of different lengths in one batch are filled up at their ends, and nobody may read the filling.
#
# ### Why causal?
#
# A language model learns to predict the next token. If token 3 could see token 4, predicting it would be copying, and
# there would be nothing to learn. With the mask, one pass over a text of $n$ tokens is $n$ honest exercises at once:
# after each token, predict the next one from those before. Without it we would need $n$ passes. Here is the real model
# of this course, `tiny`; we change the last token, and no earlier prediction moves.

# %%
model = minillm.load_model("tiny", dtype="float32", device="cpu")
tokenizer = minillm.get_tokenizer("tiny")
text = "Once upon a time there was a kind girl called Mia. She had a red kite. One sunny day Mia"

tokens = torch.tensor([tokenizer(text).input_ids])  # [1, seq]
other = tokens.clone()
other[0, -1] = tokens[0, 0]
with torch.inference_mode():
    assert torch.allclose(model(tokens)[:, :-1], model(other)[:, :-1], atol=1e-4)
print(f"{tokens.shape[1]} predictions in one pass; only the last one saw the last token")

# %% [markdown]
# ### A row that may see nothing
#
# What if a mask leaves a query no key at all? Softmax divides by the sum of the row, and the sum is 0.

# %%
nothing = torch.zeros(1, 1, n, n, dtype=torch.bool)
nothing[..., 1:, :] = True  # query 0 may see nothing
poisoned = dot_product_attention(*batched, nothing)
print(poisoned[0, 0, :2, :3])
assert poisoned[0, 0, 0].isnan().all()
assert not poisoned[0, 0, 1:].isnan().any()

# %% [markdown]
# *Not a number.* "It is only a padded token, nobody reads it", one might think. But in the next layer this vector has a
# key and a value as well. The mask gives them weight 0, and $0 \times \mathrm{nan}$ is nan:

# %%
mask = torch.ones(1, 1, n, n, dtype=torch.bool)
mask[..., 0] = False  # nobody sees token 0
next_layer = dot_product_attention(batched[0], batched[1], poisoned, mask)
spoilt = int(next_layer.isnan().any(dim=-1).sum())
print(f"tokens that are nan after the next layer: {spoilt} of {n}")

# %% [markdown]
# So the package never lets a row be empty, and it does so without special cases. Padding stands on the *right*: in a
# causal model, real tokens never look there, so nothing need be hidden, and a padded token sees at least itself. In an
# encoder, padding is hidden from everybody, but padded *queries* may look at the real keys; look at the fourth grid
# above once more: its rows 5 to 7 are not empty.
#
# ## 4 · Heads
#
# One softmax gives one mean. But a word may need several things at once: "cried" wants to know *who*, and *why*. A mean
# of both would blur them. So the model attends several times side by side, in **heads**, each with queries, keys and
# values of its own, and joins the results. Vaswani et al. (§3.2.2) put it so: several heads let the model attend to
# different kinds of information at different positions, and "with a single attention head, averaging inhibits this".
#
# Heads are not extra work: the paper divides the model's channels among them, 512 = 8 × 64. Let us do it by hand for a
# small layer of the package. Its three projections are **packed**: one matrix, whose rows are all query heads, then all
# key heads, then all value heads. One large matrix product is faster than three small ones.

# %%
hidden, heads, head_dim = 16, 4, 4
layer = MultiHeadAttention(hidden, num_heads=heads, num_kv_heads=heads, head_dim=head_dim, layer=0)
x = torch.randn(n, hidden)  # five tokens
print("packed projection:", list(layer.qkv.weight.shape), "= [12 heads × 4 channels, hidden]")

with torch.no_grad():
    packed = layer.qkv(x).view(n, 3 * heads, head_dim)  # [tokens, 12 heads, channels]
q_heads, k_heads, v_heads = packed.split(heads, dim=1)  # [tokens, 4 heads, channels] each

# %% [markdown]
# Split; attend in each head by itself; put the results side by side; mix them by the output projection:

# %%
causal = attention_mask(torch.arange(n), torch.arange(n))
outputs = []
for head in range(heads):
    # [1, 1, tokens, channels] each
    one = [part[None, None, :, head] for part in (q_heads, k_heads, v_heads)]
    outputs.append(dot_product_attention(*one, causal[None, None])[0, 0])
with torch.no_grad():
    joined = layer.out(torch.cat(outputs, dim=-1))  # [tokens, hidden]

# %% [markdown]
# The package's layer does it without a loop. It hands q, k and v to a **key/value store** and takes back what the store
# made of them: whether earlier tokens are remembered, and how, is the store's affair. `NoCache` is the store that keeps
# nothing. (`rotation` is notebook 02; here we have no positions.)

# %%
show_source(MultiHeadAttention)

# %%
store = NoCache([AttentionSpec(scale=head_dim**-0.5, causal=True)])
store.begin(PaddedBatch.full(1, n))
with torch.no_grad():
    assert torch.allclose(layer(x[None], None, store)[0], joined, atol=1e-6)
print("four heads by hand = the package's layer")

# %% [markdown]
# One more way to see the last step. The output projection multiplies the joined heads by one matrix; cut that matrix
# into one strip for each head, and the product is a **sum over heads** (Elhage et al. 2021). Every head adds its own
# contribution to the token's vector, and none disturbs another. So we can ask what a single head does, and take one
# out. We shall.

# %%
strips = layer.out.weight.split(head_dim, dim=1)  # for each head [hidden, head_dim]
with torch.no_grad():
    total = sum(out @ strip.T for out, strip in zip(outputs, strips, strict=True))
assert torch.allclose(total, joined, atol=1e-6)

# %% [markdown]
# ## 5 · Grouped heads
#
# When a model writes, it keeps the keys and values of all earlier tokens (notebook 06). With as many key/value heads as
# query heads this is a lot of memory, all of which is read for every new token. Shazeer (2019, §3) lets all query heads
# share *one* key/value head: **multi-query** attention (MQA). Ainslie et al. (2023, §2.2) stand between:
# **grouped-query** attention (GQA) gives each group of query heads one. They report a quality close to that of
# **multi-head** attention (MHA) at nearly the speed of multi-query. `tiny` is the one in the middle.

# %%
kinds = {"multi-head (MHA)": (6, 6), "grouped-query (GQA)": (6, 2), "multi-query (MQA)": (6, 1)}
plot_groups(kinds, title="Query heads of one colour share a key/value head")
plt.show()

# %% [markdown]
# One could copy each key/value head to all of its queries (`repeat_interleave`) and go on as before; but then the
# memory is read as often as before. The package copies no keys and no values. The queries of one group meet the same
# keys, so they are simply *more rows* of one matrix product: two heads of 5 queries are one head of 10. Find `grouped`
# in the source of section 2: q is given another shape; k and v, the large ones, stay where they are.

# %%
torch.manual_seed(0)
q6, k2, v2 = torch.randn(1, 6, n, 4), torch.randn(1, 2, n, 4), torch.randn(1, 2, n, 4)
grouped = q6.reshape(1, 2, 3 * n, 4)  # 3 heads of n queries → 3n rows, for each of 2 KV heads
assert grouped.data_ptr() == q6.data_ptr()  # the same memory

copied = [x.repeat_interleave(3, dim=1) for x in (k2, v2)]
expected = dot_product_attention(q6, *copied, causal[None, None])
assert torch.allclose(dot_product_attention(q6, k2, v2, causal[None, None]), expected, atol=1e-6)

# %% [markdown]
# What is saved? A token leaves one key and one value in each layer and key/value head. Here is Llama 3 8B, which
# has 8 key/value heads, as it is and with other numbers of them; each number takes 2 bytes:

# %%
llama = published_model("Llama-3-8B").config
for name, kv_heads in (("MHA", 32), ("GQA", 8), ("MQA", 1)):
    each = replace(llama, num_kv_heads=kv_heads).kv_bytes_per_token(torch.bfloat16)
    print(f"{name}, {kv_heads:2d} KV heads: {each / 1024:4.0f} KiB a token,", end=" ")
    print(f"{each * 8192 / 2**20:,.0f} MiB for 8,192 tokens")

# %% [markdown]
# ## 6 · Real heads
#
# Now we look into `tiny`. It is a small Llama: the same parts, trained on stories about children who lose things and
# find them. Its attention weights are never stored anywhere, and we do not want a second copy of the model that stores
# them. We do not need one: all of attention passes through the store. So we write a *store* that records.

# %%
show_source(RecordingStore)

# %% [markdown]
# The trick is in `attend`. A store sees q, k and v, never the weights. But the output is a weighted mean of the values.
# If the value of token 3 is the one-hot vector with its 1 in channel 3, then channel 3 of the output *is* the weight of
# token 3. So the store asks the real attention a second time, with one-hot values. No formula is repeated, and mask,
# scale and softmax are those of the model. Does it tell the truth? Recorded weights times values must give the outputs
# that the model used:

# %%
recorder = RecordingStore(model.config.attention_specs)
recorder.begin(PaddedBatch.full(*tokens.shape))
positions = torch.arange(tokens.shape[1])[None]
with torch.inference_mode():
    recorded = model(tokens, positions, recorder)
    assert torch.equal(recorded, model(tokens)), "the model noticed that it was watched"

group = model.config.num_heads // model.config.num_kv_heads
for number, weights in recorder.weights.items():  # [batch, heads, queries, keys]
    values_of = recorder.values[number].repeat_interleave(group, dim=1)
    assert torch.allclose(weights @ values_of, recorder.outputs[number], atol=1e-5)
    assert torch.allclose(weights.sum(dim=-1), torch.ones(()), atol=1e-5)
print(f"{len(recorder.weights)} layers: weights · values = the model's own outputs")

# %% [markdown]
# `attention_maps` does this for one text and gives `[layers, heads, seq, seq]`. All heads of `tiny`, reading our text
# (colours follow the square root of the weight, so that small ones are seen):

# %%
maps = attention_maps(model, tokens[0].tolist())
plot_heads(maps, title="Every head of tiny on one text: all triangles, few alike")
plt.show()

# %% [markdown]
# All are triangles, because of the causal mask. Beyond that they differ: stripes along the diagonal look a fixed
# distance back; columns are tokens that many others look at. One head with its tokens: each row is a token, and its row
# sums to 1.

# %%
names = token_names(tokenizer, tokens[0].tolist())  # ␣ is a space before a word
sharpest = best_head(maps[:, :, 1:].amax(dim=-1).mean(dim=-1))
title = "layer {}, head {}: the sharpest on this text".format(*sharpest)
plot_head(maps[sharpest], names, title=title)
plt.show()

# %% [markdown]
# The explorer shows any head on any text; the sliders need a running kernel. In the text above the picture, point at a
# token: all are shaded by how much it looks at them.

# %% tags=["nbval-ignore-output"]
explore_attention(model, text, tokenizer=tokenizer, layer=sharpest[0], head=sharpest[1])

# %% [markdown]
# ### Finding heads by measuring
#
# Thirty-six pictures invite stories. A better way is to say what a kind of head *would do*, turn it into a number, and
# compute the number for every head, over many texts. We need texts: twenty stories whose combination of hero, thing and
# event `tiny` has not seen in training, each followed by a question. The last tokens are "The story is about", so the
# next must be the hero's name.

# %%
from minillm.training.stories import tell

rng = random.Random(3)
stories = [tell(rng, held_out=True) for _ in range(20)]
heroes = [story.combination[0] for story in stories]


def asked(story):
    """The story, a question, and how the answer begins; as tokens."""
    chat = [{"role": "user", "content": f"{story.text}\n\nWho is the story about?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    return prompt["input_ids"] + tokenizer("The story is about").input_ids


prompts = [asked(story) for story in stories]
all_maps = [attention_maps(model, prompt) for prompt in prompts]
print(tokenizer.decode(prompts[0]))

# %% [markdown]
# **Previous-token heads** look at the token just before. **First-token heads** look at the very first one, whatever it
# is: a head that has nothing to fetch must still spend its weight somewhere, since softmax always sums to 1, and the
# first token is visible to all. (Xiao et al. 2023, §3.1, found this in large models.) Both are one line:


# %%
def previous_token(weights):  # [layers, heads, queries, keys] → [layers, heads]
    return weights.diagonal(offset=-1, dim1=-2, dim2=-1).mean(dim=-1)


def first_token(weights):
    # From the third token on: for the second, the first is also the previous one.
    return weights[:, :, 2:, 0].mean(dim=-1)


def mean_score(score, maps_of_texts):
    return torch.stack([score(weights) for weights in maps_of_texts]).mean(dim=0)


previous, first = mean_score(previous_token, all_maps), mean_score(first_token, all_maps)

# %% [markdown]
# **Induction heads** continue what they have seen before: after "… A B … A", they look at "B" (Elhage et al. 2021;
# Olsson et al. 2022). To catch them without any help from meaning, Olsson et
# al. take *random* tokens and repeat the sequence. In the second copy, an induction head looks at the token that came
# after the same token in the first copy.

# %%
length = 30
generator = torch.Generator().manual_seed(0)
copies = torch.randint(10, model.config.vocab_size, (10, length), generator=generator).tolist()
repeated_maps = [attention_maps(model, copy + copy) for copy in copies]


def induction_score(weights):
    # Token i of the second copy stands at length + i; what followed it before stands at i + 1.
    return weights.diagonal(offset=1 - length, dim1=-2, dim2=-1)[..., 1:].mean(dim=-1)


induction = mean_score(induction_score, repeated_maps)

# %% [markdown]
# **Name-copying heads**: at the end of our prompts the model must produce the hero's name. Which heads look, from that
# last token, at the places where the name stands in the story?


# %%
def places_of(name, prompt):
    words_there = [tokenizer.decode([token]).strip() for token in prompt]
    return [place for place, word in enumerate(words_there) if word == name]


def copying_score(maps_of_texts):
    places = map(places_of, heroes, prompts)
    pairs = zip(maps_of_texts, places, strict=True)
    return torch.stack([weights[:, :, -1, at].sum(dim=-1) for weights, at in pairs]).mean(dim=0)


copying = copying_score(all_maps)

# %% [markdown]
# Four numbers for every head, in percent of its weight. The largest of each table is framed.

# %%
tables = {
    "previous token": previous,
    "first token": first,
    "induction (random tokens, twice)": induction,
    "name copying": copying,
}
plot_head_scores(tables, title="How much of its weight a head spends on … (%)")
plt.show()

# %% [markdown]
# To judge such a number, compare it with a head that knows nothing and spreads its weight evenly over what it sees:


# %%
def evenly(n):  # [1 layer, 1 head, n, n]
    weights = torch.ones(1, 1, n, n).tril()
    return weights / weights.sum(dim=-1, keepdim=True)


even_maps = [evenly(len(prompt)) for prompt in prompts]
chance = {
    "previous token": mean_score(previous_token, even_maps),
    "first token": mean_score(first_token, even_maps),
    "induction (random tokens, twice)": induction_score(evenly(2 * length)),
    "name copying": copying_score(even_maps),
}
for name, table in tables.items():
    layer, head = best_head(table)
    print(f"{name:33s} best: {float(table.max()):6.1%} (layer {layer}, head {head})", end="")
    print(f"   evenly: {float(chance[name]):5.1%}")

# %%
for name in ("previous token", "name copying"):
    assert tables[name].max() > 3 * float(chance[name]), name

# %% [markdown]
# `tiny` has no first-token heads: the best one gives the first token hardly more than even weights would. Now that the
# others are found by number, look at them. The best previous-token head on our first text:

# %%
where = best_head(previous)
title = "layer {}, head {}: the best previous-token head".format(*where)
plot_head(maps[where], names, distance=1, title=title)
plt.show()

# %% [markdown]
# The best copying head at the end of the first prompt, as it is about to write the name. Darker is more weight, as in
# the first figure of this section. Framed are the places where the name stands; below, for comparison, the head of the
# same layer that looks at them least.

# %%
best = best_head(copying)
least = best[0], int(copying[best[0]].argmin())
last_rows = {"layer {}, head {}".format(*one): all_maps[0][one][-1] for one in (best, least)}
marked = places_of(heroes[0], prompts[0])
title = f"What the last token looks at before the model writes “{heroes[0]}”"
plot_look_back(last_rows, token_names(tokenizer, prompts[0]), marked=marked, title=title)
plt.show()

# %% [markdown]
# And the best induction head, reading the second copy of the first random sequence. A perfect one would put all its
# weight on the dotted line. How near a model comes to it depends on its training: large models, which have read texts
# of all kinds, have such heads (Olsson et al. 2022). `tiny` has never met random tokens. It has learned to look back
# for names and colours, which does not force it to do so for everything; compare its number with the even one above.

# %%
where = best_head(induction)
weights = repeated_maps[0][where]
title = "layer {}, head {}, reading the second copy".format(*where)
plot_head(weights[length:], [""] * (2 * length), distance=length - 1, title=title)
plt.show()

# %% [markdown]
# ### Does it matter?
#
# That a head *looks* at the name does not prove that the model *uses* what it sees. An experiment does: silence the
# head and see what changes. Section 4 showed that heads add up, so to silence one is to set its output to zero. Again
# the store is the place, and the model does not change:

# %%
show_source(SilencingStore)

# %%
show_source(next_token_probabilities)

# %% [markdown]
# First without silencing anybody: how sure is the model of the right name, over the twenty stories?

# %%
right = torch.tensor([tokenizer(f" {hero}").input_ids[0] for hero in heroes])


def probability_of_name(silenced=()):
    probabilities = next_token_probabilities(model, prompts, silenced)
    return float(probabilities[torch.arange(len(prompts)), right].mean())


whole = probability_of_name()
print(f"probability of the right name, mean of {len(prompts)} stories: {whole:.1%}")
assert whole > 0.3

# %% [markdown]
# Now each head in turn (36 experiments, the slowest cell of this notebook):

# %%
num_layers, num_heads = copying.shape
everyone = [(layer, head) for layer in range(num_layers) for head in range(num_heads)]
changes = [probability_of_name([one]) - whole for one in progress(everyone, unit="head")]
change = torch.tensor(changes).view_as(copying)
title = "One head silenced:\nchange in percentage points"
plot_head_scores({"probability of the right name": change}, percent=False, title=title)
plt.show()

# %% tags=["nbval-ignore-output"]
others = torch.tensor([float(change[one]) for one in everyone if one != best])
rank = 1 + int((others < change[best]).sum())
print("the best copying head, layer {}, head {}:".format(*best), end=" ")
print(f"{100 * change[best]:+.1f} points, loss number {rank} of {len(everyone)}")
print(f"the other heads: {100 * others.mean():+.1f} points on average")

# %% [markdown]
# Read such a table with two cautions. A head that never looks at the name may be needed all the same, because it
# *prepares* what a copying head finds: later layers build on the first one, whatever they do. (The classic induction
# circuit is such a pair: a previous-token head, and in a later layer the head that copies.) And a head that copies may
# hardly be missed, because others copy too.
#
# So the fair comparison is this: silence *several* of the best copying heads together, and compare them with as many
# heads **of the same layers**, those that copy least.

# %% tags=["nbval-ignore-output"]
ranked = sorted(everyone, key=lambda one: float(copying[one]), reverse=True)


def twins(chosen):
    """For each chosen head, another one of its layer, that which copies least."""
    found = []
    for layer, _ in chosen:
        rest = [one for one in everyone if one[0] == layer and one not in [*chosen, *found]]
        found.append(min(rest, key=lambda one: float(copying[one])))
    return found


for count in (1, 2, 3):
    copiers = ranked[:count]
    without, control = probability_of_name(copiers), probability_of_name(twins(copiers))
    print(f"{count} silenced: {without:5.1%} without the best copying heads,", end=" ")
    print(f"{control:5.1%} without others of their layers ({whole:.1%} with all)")

# %% [markdown]
# The further the first column falls below the second, the more of the name comes through these heads. Looking told us
# where to search; only the experiment tells what is used. (Zero is a crude silence, since later layers never met it in
# training; researchers often put a head's *average* output in its place.)
#
# ## 7 · What attention costs
#
# Count multiplications and additions, 2 for each pair of numbers in a matrix product (an $a \times b$ by a $b \times c$
# product takes $2abc$). One layer, a text of $n$ tokens, width $D$, $h$ query heads and $g$ key/value heads of $d$
# channels, a gated feed-forward network of width $f$:
#
# - **projections**: q, k, v and output are $D \times (h + 2g + h)\,d$ numbers, used once a token:
#   $2n \cdot D\,d\,(2h + 2g)$;
# - **scores and weighted sum**: $n \times d$ by $d \times n$ and $n \times n$ by $n \times d$, for each query head:
#   $4 n^2 h d$;
# - **feed-forward**: three matrices of $D \times f$: $6 n D f$.
#
# The second grows with the *square* of the length. (A causal kernel can leave out the upper triangle, half of it; we
# count the whole square, as the version by hand computes it.)


# %%
def flops(config, n):
    """Of one layer over n tokens."""
    width, heads, d = config.hidden_size, config.num_heads, config.head_dim
    return {
        "projections": 2 * n * width * d * (2 * heads + 2 * config.num_kv_heads),
        "scores, weighted sum": 4 * n**2 * heads * d,
        "feed-forward": 6 * n * width * config.intermediate_size,
    }


# %% [markdown]
# PyTorch can count what is really computed. Formula and count must agree:

# %%
from torch.utils.flop_counter import FlopCounterMode

config, n = model.config, 100
block = model.layers[0]
x = torch.randn(1, n, config.hidden_size)
q, k, v = (torch.randn(1, count, n, config.head_dim) for count in block.attention.split)
with torch.inference_mode(), FlopCounterMode(display=False) as counter:
    block.attention.qkv(x), block.attention.out(q.transpose(1, 2).flatten(-2))
    projections = counter.get_total_flops()
    dot_product_attention(q, k, v)
    attention = counter.get_total_flops() - projections
    block.feed_forward(x)
total = counter.get_total_flops()
assert [projections, attention, total - projections - attention] == list(flops(config, n).values())

# %% [markdown]
# From which length on does the square win? Setting $4n^2hd$ equal to the projections gives $n = D(h+g)/h$; setting it
# equal to projections and feed-forward together, $n = (2Dd(2h+2g) + 6Df)/(4hd)$.

# %%
lengths = [2**power for power in range(6, 18)]
costs, crossings = {}, {}
for name, config in (("tiny", model.config), ("Llama 3 8B", llama)):
    each = [flops(config, n) for n in lengths]
    costs[name] = {kind: [one[kind] for one in each] for kind in each[0]}
    once = flops(config, 1)
    with_projections = once["projections"] / once["scores, weighted sum"]
    crossings[name] = (once["projections"] + once["feed-forward"]) / once["scores, weighted sum"]
    heads, kv_heads = config.num_heads, config.num_kv_heads
    assert with_projections == config.hidden_size * (heads + kv_heads) / heads
    print(f"{name}: attention passes its projections at {with_projections:,.0f} tokens,", end=" ")
    print(f"all matrices together at {crossings[name]:,.0f}")

# %%
plot_cost(
    lengths,
    costs,
    ylabel="operations (one layer, whole text)",
    marks=crossings,
    title="The square overtakes everything, but in a large model late",
)
plt.show()

# %% [markdown]
# The dotted line is where attention costs as much as all matrices together. For a large model that is far out: at
# everyday lengths, a Transformer is mostly matrix products with its weights, and attention's arithmetic is cheap. What
# is *not* cheap even there is memory.
#
# ### Bytes
#
# The version by hand writes down all scores: $h\,n^2$ numbers a layer, and again for the weights after the softmax.
# What goes in and out is far less: q, k, v and the output, $n\,(2h + 2g)\,d$ numbers.

# %%
memory = {}
large = "Llama 3 8B, 2-byte numbers"
for name, config, size in (("tiny, 4-byte numbers", model.config, 4), (large, llama, 2)):
    vectors = 2 * config.num_heads + 2 * config.num_kv_heads
    memory[name] = {
        "q, k, v and output": [n * vectors * config.head_dim * size / 2**20 for n in lengths],
        "the scores": [config.num_heads * n**2 * size / 2**20 for n in lengths],
    }
plot_cost(lengths, memory, ylabel="MiB (one layer, one text)", title="The scores outgrow the rest")
plt.show()

# %%
at = lengths.index(8192)
everything, scores = (values[at] for values in memory[large].values())
print(f"at {lengths[at]:,} tokens: {scores / 1024:.1f} GiB of scores in each layer,", end=" ")
print(f"{everything:.0f} MiB of all the rest")

# %% [markdown]
# **FlashAttention** (Dao et al. 2022) never writes the scores down. It takes a few queries and walks along the keys in
# tiles that fit into fast on-chip memory, keeping for each query a running maximum, a running sum and a running output;
# when a later tile brings a larger maximum, what was summed before is rescaled. The result is exact, the memory grows
# with $n$ and not with $n^2$, and although it saves no arithmetic it is faster, because moving numbers was the slow
# part. Exercise 4 is the heart of it. PyTorch's fused attention works like this, on CPUs too. (Told that the mask is
# causal, it leaves out the tiles that are wholly hidden, half of the square: a part of what you see below.)

# %%
import time


def best_time(function, *arguments, **options):
    """Milliseconds, best of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = function(*arguments, **options)
        times.append(1000 * (time.perf_counter() - start))
    return min(times), result


# %%
measured = {"by hand": [], "fused": []}
timed_lengths = [128, 256, 512, 1024, 2048]
for n in timed_lengths:
    q, k, v = (torch.randn(1, count, n, model.config.head_dim) for count in block.attention.split)
    mask = attention_mask(torch.arange(n), torch.arange(n))[None, None]
    by_hand_ms, by_hand = best_time(dot_product_attention, q, k, v, mask)
    fused_ms, fused = best_time(sdpa_attention, q, k, v, causal=True)
    measured["by hand"].append(by_hand_ms)
    measured["fused"].append(fused_ms)
    assert torch.allclose(by_hand, fused, atol=1e-5)

# %% tags=["nbval-ignore-output"]
panel = {"the heads of tiny, on this CPU": measured}
plot_cost(timed_lengths, panel, ylabel="milliseconds (best of 3)")
plt.show()
ratio = measured["by hand"][-1] / measured["fused"][-1]
print(f"at {timed_lengths[-1]:,} tokens, fused is {ratio:.1f} times faster")

# %% [markdown]
# Your times will differ; on most machines the gap widens with the length. The package's `attend` chooses between
# the two, and its docstring says how.
#
# ## What to take along
#
# - Attention is a soft look-up: $\mathrm{softmax}(QK^T/\sqrt d)\,V$. The scale keeps the softmax from saturating.
# - A mask is $-\infty$ in the scores. No row may be wholly masked, or nan spreads.
# - Heads look in parallel and their contributions add up; grouped heads share keys and values to save memory.
# - What a head does can be measured, and whether it matters can be tested, both through the store.
# - Its arithmetic grows with the square of the length; its memory need not.
#
# ## Sources
#
# - Vaswani et al. 2017, "Attention Is All You Need": §3.2, sections 2 to 4
# - Jiang et al. 2023, "Mistral 7B": §2, windows
# - Shazeer 2019, "Fast Transformer Decoding: One Write-Head is All You Need"; Ainslie et al. 2023, "GQA: Training
#   Generalized Multi-Query Transformer Models from Multi-Head Checkpoints": section 5
# - Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022, "In-context Learning
#   and Induction Heads"; Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks": section 6
# - Dao et al. 2022, "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness": §3.1, section 7
#
# ## Exercises
#
# Replace each `None`; when the answer is right, the cell says so.
#
# **1.** In a head of 64 channels, the queries' channels have variance 4 and the keys' variance 9 (all independent, mean
# 0). By what must a score be multiplied so that its variance is 1?

# %%
factor = None

if factor is not None:
    torch.manual_seed(0)
    products = (2 * torch.randn(100_000, 64) * 3 * torch.randn(100_000, 64)).sum(dim=-1)
    variance = float((products * factor).var())
    assert abs(variance - 1) < 0.05, f"with this factor the variance is {variance:.3g}"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `factor = 1 / 48`. Each product has variance 4 · 9 = 36, the sum of 64 has 2304, and √2304 = 48.
#
# </details>
#
# **2.** Some models attend in **chunks**: a token sees itself and earlier tokens, but only those of its own chunk (0 to
# 3, 4 to 7, …). Write the mask for `n` tokens and chunks of `size`. Can any row be wholly masked?


# %%
def chunk_mask(n, size):
    """[n, n], True where the query (row) may see the key (column)."""
    return None


mine = chunk_mask(8, 4)
if mine is not None:
    whole_chunk = attention_mask(torch.arange(4), torch.arange(4))
    expected = torch.block_diag(whole_chunk, whole_chunk).bool()
    assert torch.equal(mine, expected), "try it on paper for n=4, size=2"
    assert torch.equal(chunk_mask(5, 2).sum(dim=-1), torch.tensor([1, 2, 1, 2, 1]))
    plot_masks({"chunks of 4": mine})
    plt.show()
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def chunk_mask(n, size):
#     steps = torch.arange(n)
#     chunk = steps // size
#     return attention_mask(steps, steps) & (chunk[:, None] == chunk[None, :])
# ```
# No row is empty: every token sees itself.
#
# </details>
#
# **3.** A model like `llama` above has 4 GiB left for the keys and values (2 bytes a number) of one text of 65,536
# tokens. How many key/value heads may it have at most, if their number must divide 32?

# %%
most_kv_heads = None

if most_kv_heads is not None:
    needed = replace(llama, num_kv_heads=most_kv_heads).kv_bytes_per_token(torch.bfloat16) * 65_536
    assert needed <= 4 * 2**30, f"that takes {needed / 2**30:.0f} GiB"
    assert 2 * needed > 4 * 2**30, "there is room for more"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `most_kv_heads = 4`. One key/value head takes 2 · 32 layers · 128 channels · 2 bytes = 16 KiB a token, so 1 GiB for
# 65,536 tokens.
#
# </details>
#
# **4.** The heart of FlashAttention. You attend to the keys in two parts and get from each the output $o$, the largest
# score $m$, and the sum $z$ of $e^{s - m}$ over the part's scores $s$. Join them to the output over all keys, *without*
# seeing the scores again.


# %%
def part(q, k, v):
    """Attention over some keys: output [queries, d], m and z [queries, 1]."""
    scores = q @ k.T / q.shape[-1] ** 0.5
    m = scores.amax(dim=-1, keepdim=True)
    z = (scores - m).exp().sum(dim=-1, keepdim=True)
    return (scores - m).exp() @ v / z, m, z


def join(one, two):
    """The output over the keys of both parts; each part is (o, m, z)."""
    return None


torch.manual_seed(0)
q, k, v = 3 * torch.randn(4, 8), 3 * torch.randn(10, 8), torch.randn(10, 8)
mine = join(part(q, k[:6], v[:6]), part(q, k[6:], v[6:]))
if mine is not None:
    assert mine.shape == q.shape, f"{list(mine.shape)} should be {list(q.shape)}"
    assert torch.allclose(mine, part(q, k, v)[0], atol=1e-5), "bring both sums to one maximum"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def join(one, two):
#     (o1, m1, z1), (o2, m2, z2) = one, two
#     m = torch.maximum(m1, m2)
#     z1, z2 = z1 * (m1 - m).exp(), z2 * (m2 - m).exp()
#     return (o1 * z1 + o2 * z2) / (z1 + z2)
# ```
# Multiplying by $e^{m_1 - m}$ turns sums of $e^{s - m_1}$ into sums of $e^{s - m}$. With it, keys can be read in any
# number of parts, one after the other, from wherever they lie. Paged attention (notebook 09) reads them so from blocks.
#
# </details>
#
# **5.** Write a score for **self heads**, which look at their own token; the first token does not count, since it has
# no choice. It takes `[layers, heads, queries, keys]` and gives `[layers, heads]`, like `previous_token`.


# %%
def self_token(weights):
    return None


mine = self_token(maps)
if mine is not None:
    assert mine.shape == maps.shape[:2], f"{list(mine.shape)} should be {list(maps.shape[:2])}"
    check = torch.zeros(1, 1, 3, 3)
    check[0, 0] = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.9, 0, 0.1]])
    assert abs(float(self_token(check)) - 0.3) < 1e-6, "leave out the first token"
    own = mean_score(self_token, all_maps)
    plot_head_scores({"own token": own}, title="Weight on the own token (%)")
    plt.show()
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def self_token(weights):
#     return weights.diagonal(dim1=-2, dim2=-1)[..., 1:].mean(dim=-1)
# ```
#
# </details>
#
# ---
# **Back:** [02_positions](02_positions.ipynb) · **Next:** [04_encoder_decoder](04_encoder_decoder.ipynb): the whole
# Transformer of 2017, and attention from one text to another.
