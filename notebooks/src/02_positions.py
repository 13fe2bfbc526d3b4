# %% [markdown]
# # 02 · Positions
#
# "The dog bit the man" and "the man bit the dog" hold the same words. What tells them apart is where each word stands,
# and attention, left to itself, does not know it. This notebook is about the three ways in which a Transformer is told.
#
# **By the end of this notebook you will be able to**
#
# - show by computing that attention without positions is blind to order;
# - explain sinusoidal, learned and rotary positions, and say what each of them can and cannot do;
# - derive in three lines why rotary positions let a model see *distances*, and check it on the package's own code;
# - read a wavelength plot, and say what linear, Llama 3 and YaRN scaling do to it.
#
# **You need** notebook [01](01_tokens_and_embeddings.ipynb) (a token is a vector), dot products, sine and cosine. No
# trained model, no GPU.
#
# **New here**: the vectors of notebook 01 know *what* a token is; now they learn *where* it is.
#
# **Time**: about 60 minutes (it runs in about 15 s on two cores).

# %%
import matplotlib.pyplot as plt
import torch

from minillm.transformer.kv import AttentionSpec, NoCache, PaddedBatch
from minillm.transformer.multi_head import MultiHeadAttention
from minillm.viz import (
    explore_rotary,
    pair_products,
    plot_clocks,
    plot_position_table,
    plot_products,
    plot_rotary,
    plot_score_maps,
    plot_shuffled_outputs,
    plot_wavelengths,
    show_source,
    wavelengths,
)

# %% [markdown]
# ## 1 · Without positions, order is invisible
#
# All that we need to know of attention today is this; notebook 03 takes it apart. Each token's vector is turned into
# three: a **query** (what am I looking for?), a **key** (what am I?) and a **value** (what do I tell?). A token
# compares its query with every key by a dot product, and its output is a weighted mean of the values: large product,
# large weight (Vaswani et al. 2017, §3.2.1).
#
# We take the package's real attention layer, with fresh random weights, and let every token see every other one
# (`causal=False`). The vectors of the words are random too. No training is needed for what we want to see.

# %%
torch.manual_seed(0)
layer = MultiHeadAttention(hidden_size=16, num_heads=2, num_kv_heads=2, head_dim=8, layer=0)


def attended(x, rotation=None, causal=False):
    """The layer's output for one sentence, [seq, hidden] → [seq, hidden]."""
    store = NoCache([AttentionSpec(scale=8**-0.5, causal=causal)])
    store.begin(PaddedBatch.full(1, len(x)))
    with torch.no_grad():
        return layer(x[None], rotation, store)[0]


# %% [markdown]
# Now five words in two orders. `order` says which word of the first sentence stands where in the second.

# %%
words = ["the", "dog", "bit", "the", "man"]
order = [0, 4, 2, 3, 1]
shuffled_words = [words[i] for i in order]

vector = {word: torch.randn(16) for word in sorted(set(words))}
sentence = torch.stack([vector[word] for word in words])  # [seq, hidden]
outputs, shuffled_outputs = attended(sentence), attended(sentence[order])

assert torch.allclose(outputs[order], shuffled_outputs, atol=1e-5)
print(" ".join(words), "→", " ".join(shuffled_words))
print("the outputs moved along with the words")

# %% [markdown]
# Shuffling the words has shuffled the outputs in the same way, and has done nothing else. Find "dog" on both sides of
# the picture: its row has the same colours, whether it bites or is bitten. The two rows of "the" are equal as well.

# %%
before, after = (words, outputs), (shuffled_words, shuffled_outputs)
title = "Without positions, each word's output is the same in both sentences"
plot_shuffled_outputs(before, after, title=title)
plt.show()

# %% [markdown]
# The reason is plain: a weighted mean does not depend on the order in which its terms are added, and the score
# behind each weight comes from one query and one key alone. Nothing in the computation says *where* a token stands.
#
# (A **causal** mask, which hides later tokens, gives a little away: the third token sees three tokens, the fourth sees
# four. Exercise 1 asks what is still invisible then.)
#
# So positions must be put in, by a **position encoding**. There are two places for it:
#
# - **add** a vector that stands for the position to the token's vector, before the first layer (sections 2 and 3);
# - **turn** queries and keys by an angle that stands for the position, in every layer (section 4).

# %% [markdown]
# ## 2 · Sinusoidal positions
#
# What vector should stand for position 7? The number 7 itself is a poor choice: position 5,000 would drown every word.
# We want numbers of moderate size, a different vector for each position, and similar vectors for neighbours.
#
# A clock does that. Its second hand tells apart moments that are close, and after a minute it repeats itself; the
# minute hand tells apart what the second hand confuses; the hour hand is slower still. Each hand never leaves its
# circle, and together they name every moment of half a day.
#
# Vaswani et al. (2017, §3.5) give each position such a row of hands. Channels come in pairs; pair $i$ of a vector with
# $d$ channels turns by the angle $\theta_i = 10000^{-2i/d}$ with every token, and the pair stores where the hand
# points: $\sin(p\,\theta_i)$ and $\cos(p\,\theta_i)$ for position $p$.

# %%
from minillm.transformer.positions import sinusoidal_positions

show_source(sinusoidal_positions)

# %% [markdown]
# With 16 channels there are 8 hands. Pair 0 turns by one radian a token; the last pair has hardly moved after 50
# tokens. The number of tokens that a hand needs for one full turn is its **wavelength**, $2\pi/\theta_i$.

# %%
plot_clocks([0, 1, 5, 50], dim=16, title="A position is a row of clocks, from fast hands to slow ones")
plt.show()

# %% [markdown]
# For real models 16 channels are few. Here is the table for 64 channels and 128 positions; one row of it, number 7, is
# compared with the formula above.

# %%
table = sinusoidal_positions(torch.arange(128), 64)  # [seq, dim]
theta = 10000.0 ** (-2 * torch.arange(32) / 64)  # radians a token, one for each pair
print(f"wavelengths from {2 * torch.pi / theta[0]:.2f} to {2 * torch.pi / theta[-1]:,.0f} tokens")
assert torch.allclose(table[7, 0::2], torch.sin(7 * theta), atol=1e-5)
assert torch.allclose(table[7, 1::2], torch.cos(7 * theta), atol=1e-5)

# %%
plot_position_table(table, title="Sinusoidal positions: fast pairs on the left, slow pairs on the right")
plt.show()

# %% [markdown]
# Row $p$ of the picture is what is added to the token at position $p$. On the left the colours change from row to row;
# on the right they have barely begun to change after 128 rows. (Odd and even channels differ there because the cosine
# of a small angle is near 1 and its sine near 0.)
#
# ### Products of positions depend on the distance
#
# Attention compares vectors by dot products, so let us take the dot product of two of these rows, $p$ and $r$. Each
# pair contributes $\sin(p\theta_i)\sin(r\theta_i) + \cos(p\theta_i)\cos(r\theta_i)$, which is, as you learned at
# school, $\cos((p-r)\,\theta_i)$. The positions themselves are gone: **only their distance $p - r$ is left.**
#
# To check such a claim for all positions at once, take the map of all products. If a map depends on the distance only,
# it is constant along each diagonal; then it equals itself, moved one step down and one to the right.

# %%
products = table @ table.T  # [seq, seq]


def is_striped(scores, atol=1e-3):
    """Whether a map depends on the distance of its two positions only."""
    return torch.allclose(scores[1:, 1:], scores[:-1, :-1], atol=atol)


assert is_striped(products)
for distance in (0, 1, 20):
    print(f"two rows at distance {distance:2d}: product {products[0, distance]:.1f}")

# %% [markdown]
# Since only the distance counts, one row of the map tells everything. Here is the first:

# %%
curves = {"from position 0": products[0]}
plot_products(torch.arange(128), curves, title="Near positions have similar vectors, far ones less so")
plt.show()

# %% [markdown]
# ### A step is a rotation
#
# The paper gives its reason for this choice: for a fixed offset $k$, the vector of position $p + k$ is a *linear
# function* of that of position $p$ (Vaswani et al. 2017, §3.5). One matrix takes every position $k$ tokens further,
# and a linear layer can learn a matrix. Which matrix is it? In clock terms: turn each hand by $k\,\theta_i$. For one
# pair that is a rotation of the plane, a 2×2 matrix; the whole is these, one after the other, along the diagonal.


# %%
def step_matrix(k, dim):
    """The matrix that takes the vector of any position to that of the position k tokens later."""
    angles = k * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    blocks = [torch.tensor([[a.cos(), a.sin()], [-a.sin(), a.cos()]]) for a in angles]
    return torch.block_diag(*blocks)


for k in (1, 5, 40):
    assert torch.allclose(table[:-k] @ step_matrix(k, 64).T, table[k:], atol=1e-4)
print("one matrix for each offset, whatever the position")

# %% [markdown]
# ### What the sum makes of it
#
# So far this looks perfect. But attention never sees the rows of the table alone. It sees *word + position*, multiplied
# by the layer's own matrices $W_q$ and $W_k$. With content $x$ and positions $p$ and $r$, the product is
# $W_q(x + p)\cdot W_k(x + r)$, and that is four products: word with word, word with position, position with word,
# position with position. Even the last one, $W_q p\cdot W_k r$, depends on the distance only for special matrices.
#
# Let us look: the same word at 48 positions, with random matrices as at the start of a training.

# %%
dim, count = 64, 48
word = torch.randn(dim)
W_q, W_k = torch.randn(2, dim, dim) / dim**0.5

x = word + sinusoidal_positions(torch.arange(count), dim)  # [seq, dim]
added_scores = (x @ W_q.T) @ (x @ W_k.T).T  # [queries, keys]
assert not is_striped(added_scores, atol=1.0)

# %% [markdown]
# On the left the bare products of positions, on the right what attention gets to see (one row a query, one column a
# key):

# %%
maps = {"position · position": products[:count, :count], "after $W_q$ and $W_k$": added_scores}
plot_score_maps(maps, title="Stripes mean “only the distance counts”; the layer's matrices destroy them")
plt.show()

# %% [markdown]
# The model *can* find matrices that bring the stripes back, and trained models do find useful ones. But it must learn
# them, in every layer and head, from examples. Keep this picture in mind: section 4 repairs it.
#
# ## 3 · Learned positions
#
# The simplest idea: let training find a vector for each position, just as it finds one for each token. The package's
# class is an embedding table with one row a position. GPT-2 and OPT do it this way.

# %%
from minillm.transformer.positions import LearnedPositions

show_source(LearnedPositions)

# %% [markdown]
# The class reserves the table and leaves the numbers to whoever loads or trains the model. We fill it with small random
# ones, as they are before training:

# %%
learned = LearnedPositions(num_positions=48, hidden_size=64)
torch.nn.init.normal_(learned.weight, std=0.02)
learned_table = learned(torch.arange(48)).detach()

gpt2_size = LearnedPositions(1024, 768).weight.numel()
print(f"a table of GPT-2's size: 1024 positions × 768 channels = {gpt2_size:,} numbers to learn")

# %% [markdown]
# Before training, the rows are noise. That 5 stands between 4 and 6 is not built in: the model has to discover it, from
# nothing but the texts that it reads, and a row is trained only when a text is long enough to reach it.

# %%
learned_products = learned_table @ learned_table.T
maps = {"sinusoidal": products[:count, :count], "learned, before training": learned_products}
plot_score_maps(maps, title="A learned table starts without any notion of near and far")
plt.show()

# %% [markdown]
# And the table ends. There is no row for position 48, so the model cannot read one token more:

# %%
try:
    learned(torch.tensor([48]))
except IndexError as error:
    print("IndexError:", error)

# %% [markdown]
# (You will not meet this error when you generate text with the package: `generate` compares the length with the model's
# context first, and says what to do.)
#
# Vaswani et al. tried both kinds and found nearly identical results (§3.5 and Table 3, row E). They kept the sinusoids
# because a formula has no last row. That does not mean that a model *understands* rows that it has never met: it can
# compute them, which is less.

# %% [markdown]
# ## 4 · Rotary positions
#
# What we want is clear by now: the score of a query and a key should depend on *what* they are and *how far apart* they
# are, on nothing else. Su et al. (2021, "RoFormer", §3.1, eq. 11) ask for exactly this, and find the answer that nearly
# every language model uses today: do not add the clock to the word. **Turn the query and the key with it.**
#
# Take one pair of channels of a query: two numbers, an arrow in the plane. At position $m$, turn it by $m\theta$. Turn
# the key's pair at position $n$ by $n\theta$. Now the three lines:
#
# 1. The dot product of two arrows is length × length × cosine of the angle between them.
# 2. Turning changes no length.
# 3. The query was turned by $m\theta$ and the key by $n\theta$, so the angle between them has changed by
#    $(m-n)\,\theta$: a matter of the distance alone.
#
# With matrices it is as short: $(R_m q)\cdot(R_n k) = q^T R_m^T R_n\, k = q^T R_{n-m}\, k$, since turning back by $m$
# and forward by $n$ is turning by $n - m$ (§3.2.2, eq. 16).


# %%
def turn(pair, position, theta):
    """Two numbers, turned by position · theta radians."""
    angle = torch.tensor(position * theta)
    rotation = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    return rotation @ pair


q, k = torch.tensor([1.0, 0.5]), torch.tensor([0.2, 1.0])
for m, n in [(7, 4), (10, 7), (103, 100), (10, 4)]:
    product = turn(q, m, theta=0.1) @ turn(k, n, theta=0.1)
    print(f"query at {m:3d}, key at {n:3d}, distance {m - n}: {product:.4f}")

# %% [markdown]
# Three different places with distance 3, one product; another distance, another product. The package does this to every
# pair of every head, with the same frequencies $\theta_i$ as before. The angles are worked out once for a position
# (`RotaryEmbedding`), then used in every head. Notice that there is no matrix product: each pair needs four
# multiplications.

# %%
from minillm.transformer.positions import RotaryConfig, RotaryEmbedding, apply_rotary

show_source(RotaryEmbedding)

# %%
show_source(apply_rotary)

# %% [markdown]
# Read it with two questions. Which channels form a pair? (The `if` has two answers; we come to it below.) And what
# happens to channels beyond the rotary ones? (`passed`, at the end; below as well.)
#
# First, our hand-made `turn` must agree with it:

# %%
rope = RotaryEmbedding(RotaryConfig(dim=2))  # one pair, theta = 1
by_hand = turn(q, position=9, theta=1.0)
one_token = q.view(1, 1, 2)  # [tokens, heads, head_dim]
packaged = apply_rotary(one_token, rope(torch.tensor([9]), torch.float32))
assert torch.allclose(by_hand, packaged[0, 0], atol=1e-6)

# %% [markdown]
# And now the claim itself, with the package's functions and heads of 64 channels: 20 distances, each at 41 places from
# the beginning of a text to position 1,000.

# %%
rope = RotaryEmbedding(RotaryConfig(dim=64))
q, k = torch.randn(2, 1, 1, 64)  # each [tokens, heads, head_dim]


def score(query_position, key_position):
    q_turned = apply_rotary(q, rope(torch.tensor([query_position]), torch.float32))
    k_turned = apply_rotary(k, rope(torch.tensor([key_position]), torch.float32))
    return float((q_turned * k_turned).sum())


for distance in range(20):
    everywhere = [score(start + distance, start) for start in range(0, 1001, 25)]
    assert max(everywhere) - min(everywhere) < 0.005  # the rounding of float32
print("20 distances, 41 places each: only the distance counts")

# %% [markdown]
# Now the picture of section 2 once more, with the same word and the same random matrices, but with turning instead of
# adding. The matrices come first and the rotation after them, so they cannot destroy the stripes any more.

# %%
angles = rope(torch.arange(count), torch.float32)
q_all = apply_rotary((W_q @ word).expand(count, 1, dim), angles)[:, 0]  # [seq, head_dim]
k_all = apply_rotary((W_k @ word).expand(count, 1, dim), angles)[:, 0]
rotary_scores = q_all @ k_all.T
assert is_striped(rotary_scores)

# %%
maps = {"added (section 2)": added_scores, "turned (rotary)": rotary_scores}
plot_score_maps(maps, title="The same word and matrices: adding gives a patchwork, turning stripes")
plt.show()

# %% [markdown]
# Does the attention layer now see the order? Section 1, once more; this time the layer gets a rotation:

# %%
places = RotaryEmbedding(RotaryConfig(dim=8))(torch.arange(5)[None], torch.float32)  # [batch, seq]
outputs, shuffled_outputs = attended(sentence, places), attended(sentence[order], places)
difference = outputs[words.index("dog")] - shuffled_outputs[shuffled_words.index("dog")]
assert difference.abs().max() > 0.01
print("the dog that bites and the dog that is bitten have different outputs now")

# %% [markdown]
# One more thing to notice: only queries and keys are turned, never values. Positions decide *where to look*, and what
# is found there arrives unturned.
#
# ### Fast pairs and slow pairs
#
# Each pair sees the distance through its own wavelength. Let query and key be equal, all ones, and look at what single
# pairs add to the product. (`pair_products` turns with `apply_rotary` and keeps the pairs apart; `wavelengths` is
# $2\pi/\theta_i$.)

# %%
config = RotaryConfig(dim=64)
ones, far = torch.ones(64), torch.arange(0, 200)
by_pair = pair_products(config, ones, ones, far, torch.zeros_like(far))  # [distances, pairs]

lengths = wavelengths(config)
curves = {f"pair {i}: once in {lengths[i]:,.0f} tokens": by_pair[:, i] for i in (0, 6, 12, 18)}
plot_products(far, curves, title="Fast pairs tell neighbours apart, slow pairs tell regions apart")
plt.show()

# %% [markdown]
# The fast pair tells distance 2 from distance 3, but hardly 3 from 9. The slow one says "near" or "far" and no more.
# The sum of all 32 pairs is what attention sees:

# %%
total = by_pair.sum(dim=1)
plot_products(far, {"all pairs": total}, title="The product of equal vectors fades with the distance")
plt.show()
for distance in (0, 1, 199):
    print(f"distance {distance:3d}: product {total[distance]:.1f}")

# %% [markdown]
# Near tokens matter more, unless the weights say otherwise: Su et al. call it *long-term decay* (§3.3). It is a
# tendency for equal vectors and not a law. A head can make its query and key point in different directions, and then
# its product is largest at some other distance; the explorer below shows such a pair.
#
# The spread of wavelengths is set by one number, the **base** (10,000 above): wavelengths run from $2\pi$ to almost
# $2\pi$ × base. Models for long texts choose a larger one.

# %%
bases = {
    "base 10,000 (Llama 2)": RotaryConfig(dim=128, base=10_000),
    "base 500,000 (Llama 3)": RotaryConfig(dim=128, base=500_000),
}
plot_wavelengths(bases, title="A larger base makes the slow pairs much slower, and leaves the fast ones")
plt.show()
for name, config in bases.items():
    print(f"{name}: longest wavelength {wavelengths(config)[-1]:,.0f} tokens")

# %% [markdown]
# ### Which channels form a pair?
#
# The paper pairs neighbours: channels (0, 1), (2, 3), and so on. GLM does the same (`interleaved=True`). Llama's
# weights, as Hugging Face publishes them, and most others pair the first half of the head with the second: (0, d/2),
# (1, d/2 + 1), … It is the same rotation with the channels in another order, as a computation shows: put the channels
# in Llama's order, turn the halves, and compare.

# %%
x, positions = torch.randn(6, 1, 8), torch.arange(6)
rope = RotaryEmbedding(RotaryConfig(8, interleaved=True))
neighbours = apply_rotary(x, rope(positions, torch.float32))

to_halves = [0, 2, 4, 6, 1, 3, 5, 7]  # first channels of all pairs, then second channels
rope = RotaryEmbedding(RotaryConfig(8))
halves = apply_rotary(x[..., to_halves], rope(positions, torch.float32))
assert torch.allclose(neighbours[..., to_halves], halves, atol=1e-6)
print("the same numbers, in another order")

# %% [markdown]
# A dot product does not care in which order its terms come, as long as query and key agree. So neither layout is
# better. But weights trained with one give nonsense with the other, without any error message: whoever loads a model
# must know its layout. In this package, it is the field `interleaved` of `RotaryConfig`.
#
# ### Turning a part of the head
#
# GLM-4 turns only the first half of each head's channels. The others never learn of positions: a place to compare
# *what* tokens are, at whatever distance. (GPT-J began this.)

# %%
config = RotaryConfig(dim=8, interleaved=True)  # of 16 channels, 8 are turned
ones = torch.ones(64, 1, 16)  # 64 positions
turned = apply_rotary(ones, RotaryEmbedding(config)(torch.arange(64), torch.float32))[:, 0]
assert torch.equal(turned[:, 8:], ones[:, 0, 8:])
plot_position_table(turned, title="Partial rotary: channels 8 to 15 are the same at every position")
plt.show()

# %% [markdown]
# ## 5 · Turn it yourself
#
# The figure shows one pair of a query and a key in a head of 16 channels. On the left, thin arrows are the pair as the
# layer made it, thick arrows the pair after its turn. On the right is the pair's product for every distance, and the
# red dot is where we are. Its query and key point in different directions from the start, so that the largest product
# is not at distance 0.

# %%
plot_rotary(query_position=12, key_position=5, pair=2)
plt.show()

# %% [markdown]
# With a running kernel, here it is with sliders. Predict before you move:
#
# 1. Move query and key *both* up by 10. Which of these change: the arrows, the angle between them, the red dot?
# 2. Move the query only. Which way does the dot go?
# 3. Choose pair 7. Why does almost nothing move?

# %% tags=["nbval-ignore-output"]
explore_rotary()

# %% [markdown]
# <details><summary>Answers</summary>
#
# 1. The arrows turn; the angle between them and the dot stay. That is the whole idea of rotary positions.
# 2. To the right, by one distance a token: the key lies further and further back.
# 3. Pair 7 is the slowest: it needs many thousand tokens for one turn, and the sliders reach 63.
#
# </details>
#
# ## 6 · Longer texts than in training
#
# A rotary model has no table that ends. It can compute the angles for position 10,000 even if its training texts had
# 4,096 tokens. And yet it usually fails there. The wavelengths show why:

# %%
context = 4096
plain = RotaryConfig(dim=128)
never_round = int((wavelengths(plain) > context).sum())
print(f"{never_round} of {len(wavelengths(plain))} pairs need more than {context:,} tokens for one turn")
slowest = 360 * context / float(wavelengths(plain)[-1])
print(f"the slowest pair has come {slowest:.0f}° of 360° by the end of the longest training text")

# %% [markdown]
# Fast pairs have gone round many times and have met every angle. The slow ones have met only a part of their circle
# during training. Beyond the context they reach angles that no weight was ever fitted to: new territory, where the
# products can be anything (Chen et al. 2023, §2.2).
#
# ### Linear scaling: squeeze the positions
#
# Chen et al. (§2.3) divide every position by a factor. For a context 8 times longer, position 32,768 gets the angles
# that position 4,096 had. No angle is new:

# %%
from minillm.transformer.positions import LinearScaling, Llama3Scaling, YarnScaling

factor = 8
linear = RotaryConfig(dim=128, scaling=LinearScaling(factor))
positions = torch.arange(context)
squeezed = RotaryEmbedding(linear)(factor * positions, torch.float32)
known = RotaryEmbedding(plain)(positions, torch.float32)
assert torch.equal(squeezed.cos, known.cos)
print(f"position {factor * 4000:,} now has the angles of position 4,000")

# %% [markdown]
# The price: neighbours come closer together. The fastest pair turned by a radian a token, and now by an eighth of that,
# so "the word before" and "the word before that" look alike. The model must be trained a little further to get used to
# it (1,000 steps are enough, the paper reports).
#
# ### Llama 3 and YaRN: squeeze only what needs it
#
# But the fast pairs were never the problem: they had met all their angles. So leave them alone, slow down only the slow
# ones, and blend between. Llama 3.1 (Meta's reference code) and YaRN (Peng et al. 2023, §3.2, "NTK-by-parts") both do
# this. They differ in where the blend begins and ends, counted in turns within the old context:
#
# | scaling | kept as it is | slowed down by the whole factor |
# | --- | --- | --- |
# | linear | no pair | every pair |
# | Llama 3 | pairs with 4 turns or more | pairs with 1 turn or fewer |
# | YaRN | pairs with 32 turns or more | pairs with 1 turn or fewer |

# %%
scaled = {
    "as trained": plain,
    "linear": linear,
    "Llama 3": RotaryConfig(128, scaling=Llama3Scaling(factor, original_max_position=context)),
    "YaRN": RotaryConfig(128, scaling=YarnScaling(factor, original_max_position=context)),
}
plot_wavelengths(scaled, context=context, title="Above the dotted line: less than one turn in training")
plt.show()

# %% [markdown]
# On a logarithmic axis the differences look small. Divide by the wavelengths of training, and each method shows its
# shape:

# %%
plot_wavelengths(scaled, relative=True, title="Linear slows all; Llama 3 and YaRN keep the fast pairs")
plt.show()
for name, config in scaled.items():
    kept = int(torch.isclose(wavelengths(config), wavelengths(plain)).sum())
    whole = int(torch.isclose(wavelengths(config), factor * wavelengths(plain)).sum())
    print(f"{name:10s} keeps {kept:2d} pairs, slows {whole:2d} by the whole factor")

# %% [markdown]
# YaRN adds one more thing (§3.4): all scores are made a little larger. (One way to see why: over more tokens, a softmax
# spreads its weight more thinly.) Cosine and sine are multiplied by $0.1\ln s + 1$ for a factor $s$, so queries and
# keys both grow by that much and no other code has to change. It is the second thing that `rotary_frequencies` returns.

# %%
import math

from minillm.transformer.positions import rotary_frequencies

frequencies, mscale = rotary_frequencies(scaled["YaRN"])
print(f"factor {factor}: cosine and sine times {mscale:.3f}, so scores times {mscale**2:.3f}")
assert abs(mscale - (0.1 * math.log(factor) + 1)) < 1e-6

# %% [markdown]
# ## What to take along
#
# | | sinusoidal | learned | rotary |
# | --- | --- | --- | --- |
# | from | Vaswani et al. 2017, §3.5 | a table, trained | Su et al. 2021, §3.2 |
# | where | added to the embedding, once | added to the embedding, once | turns q and k, in every layer |
# | numbers to learn | none | one row a position | none |
# | beyond its context | can be computed | impossible | can be computed; scaling helps |
# | the score depends on | both positions | both positions | the distance only |
# | in this package | the Transformer of 2017 | GPT-2, OPT | Llama, Qwen, GLM-4, Gemma |
#
# ## Sources
#
# - Vaswani et al. 2017, "Attention Is All You Need": §3.5, sinusoids
# - Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding": §3
# - Chen et al. 2023, "Extending Context Window of Large Language Models via Positional Interpolation": §2
# - Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language Models": §3
# - Haviv et al. 2022, "Transformer Language Models without Positional Encodings Still Learn Positional Information"
#
# ## Exercises
#
# Replace each `None`; when the answer is right, the cell says so.
#
# **1.** Back to the layer of section 1, without positions, but now with a *causal* mask: each token sees itself and
# those before it. We shuffle all words but the last. Does the output of the last word change, `True` or `False`? Think
# first; then let the cell check it.

# %%
last_changes = None

if last_changes is not None:
    first_order = attended(sentence, causal=True)
    other_order = attended(sentence[[2, 0, 3, 1, 4]], causal=True)
    same = torch.allclose(first_order[-1], other_order[-1], atol=1e-5)
    assert last_changes == (not same), "think of the weighted mean"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `last_changes = False`. The last token sees all the others, and it sees them as a bag: its output is a weighted mean,
# whose terms may come in any order. The outputs of the *other* tokens do change, because each sees another set of words
# now. From these a second layer could tell that the words were shuffled, which is why deep causal models can learn some
# order without any positions (Haviv et al. 2022).
#
# </details>
#
# **2.** Su et al. write a pair as one complex number $a + ib$; turning it is multiplying it by $e^{i\,p\,\theta}$
# (§3.2.1, eq. 12). Write `turn_complex`, for neighbouring channels, with `torch.view_as_complex`, `torch.polar` and
# `torch.view_as_real`.


# %%
def turn_complex(x, angles):
    """Each pair of neighbouring channels turned by its angle.

    x is [tokens, channels], angles is [tokens, channels / 2].
    """
    return None


x, positions = torch.randn(10, 8), torch.arange(10)
config = RotaryConfig(8, interleaved=True)
mine = turn_complex(x, positions[:, None] * rotary_frequencies(config)[0])
if mine is not None:
    expected = apply_rotary(x[:, None], RotaryEmbedding(config)(positions, torch.float32))[:, 0]
    assert mine.shape == expected.shape, f"{list(mine.shape)} should be {list(expected.shape)}"
    assert torch.allclose(mine, expected, atol=1e-5), "pair (x[2i], x[2i+1]) is one complex number"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def turn_complex(x, angles):
#     pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
#     return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
# ```
# `torch.polar(1, angle)` is $e^{i\,\text{angle}}$. Meta's own Llama code turns its (neighbouring) pairs like this;
# Hugging Face's conversion of the weights reorders the channels into halves.
#
# </details>
#
# **3.** A head has 64 channels. Which base makes its *longest* wavelength 131,072 tokens? Start from the wavelength of
# the last pair, $2\pi\,b^{62/64}$, and solve for $b$.

# %%
base = None

if base is not None:
    longest = float(wavelengths(RotaryConfig(64, base=float(base)))[-1])
    assert abs(longest - 131_072) < 100, f"this base makes it {longest:,.0f} tokens"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `base = (131_072 / (2 * torch.pi)) ** (64 / 62)`, which is about 28,750.
#
# </details>
#
# **4.** A colleague loads a GLM model, whose pairs are neighbours, and forgets `interleaved=True`. At which distance
# are the scores of every query and key right all the same? Replace `None` by a whole number.

# %%
safe_distance = None

if safe_distance is not None:
    q, k = torch.randn(2, 50, 1, 8)  # 50 queries and 50 keys, one head
    before = torch.full((50,), 20)
    scores = []
    for interleaved in (True, False):
        rope = RotaryEmbedding(RotaryConfig(8, interleaved=interleaved))
        q_turned = apply_rotary(q, rope(before + safe_distance, q.dtype))
        scores.append((q_turned * apply_rotary(k, rope(before, k.dtype))).sum(dim=-1))
    assert torch.allclose(*scores, atol=1e-4), "at that distance, some scores differ"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `safe_distance = 0`. A token compared with itself: query and key are turned by the same angles, so the product is that
# of the unturned vectors in either layout. At every other distance the wrong channels are mixed, and no error message
# says so.
#
# </details>
#
# ---
# **Back:** [01_tokens_and_embeddings](01_tokens_and_embeddings.ipynb) · **Next:** [03_attention](03_attention.ipynb):
# queries, keys and values, taken apart and put together.
