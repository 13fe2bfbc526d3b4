# %% [markdown]
# # Assignment 1 · Attention
#
# You write the attention of a modern decoder, piece by piece: softmax, scaled dot products, the causal mask, grouped
# heads, rotary positions. At the end your pieces replace the package's, and `tiny`, the language model of this course,
# tells a story with them.
#
# **By the end you will be able to**
#
# - write scaled dot-product attention with a mask, in a form that does not overflow;
# - make causal and windowed masks, also when there are more keys than queries;
# - share key/value heads among groups of query heads;
# - turn queries and keys by their positions.
#
# **You need** notebooks 02 (positions) and 03 (attention). No GPU. **Time**: about 90 minutes. **Points**: 100.
#
# Write where it says `raise NotImplementedError()`, and delete that line. Below each task is a cell of checks: run it
# as often as you like. When it is graded, the same checks run with other numbers, drawn afresh each time. Every task
# has its own points and does not need the ones before it; only the last one puts all of them together.
#
# The tasks are about writing these operations, so the package's and PyTorch's own are closed while yours are graded:
# `minillm`'s attention, masks and rotations, `scaled_dot_product_attention`, and in task 1 `softmax`. You may of course
# compare with them while you work. Do not change the tensors that you are given: make new ones.

# %% tags=["locked:setup"]
from dataclasses import replace

import torch

import minillm
from minillm.transformer.decoder import Decoder
from minillm.transformer.generation import generate
from minillm.transformer.kv import NoCache

# %% [markdown]
# ## 1 · Softmax (10 points)
#
# $\mathrm{softmax}(s)_i = e^{s_i} / \sum_j e^{s_j}$, over the last dimension. Two scores $0$ and $\ln 3$ have the
# exponentials 1 and 3, so their weights are 1/4 and 3/4.
#
# In float32, $e^{89}$ is already infinite, and infinity divided by infinity is not a number. Softmax does not change
# when the same number is taken from all scores of a row: subtract the row's maximum first, then no exponent is above 0.
# A score of $-\infty$ must get the weight 0.
#
# *Hints:* `amax` and `sum` have the arguments `dim` and `keepdim`. Do not call `softmax` or `log_softmax`.


# %% tags=["solution:softmax"]
def softmax(scores):
    """Weights [..., keys] for scores [..., keys]; each row sums to 1."""
    ### BEGIN SOLUTION
    exponentials = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(dim=-1, keepdim=True)
    ### END SOLUTION


# %% tags=["tests:softmax_tests:10"]
from minillm.course.checks import check_close, check_equal, without

ln3 = torch.tensor(3.0).log().item()
check_close(softmax(torch.tensor([0.0, ln3])), torch.tensor([0.25, 0.75]), "softmax([0, ln 3])")
check_close(
    softmax(torch.tensor([[0.0, ln3], [ln3, 0.0]])),
    torch.tensor([[0.25, 0.75], [0.75, 0.25]]),
    "softmax([[0, ln 3], [ln 3, 0]])",
    hint="Does each row have its own sum?",
)
check_close(
    softmax(torch.tensor([1000.0, 1000.0 + ln3])),
    torch.tensor([0.25, 0.75]),
    "softmax([1000, 1000 + ln 3])",
    rtol=1e-3,
    hint="Is the row's maximum subtracted before exp?",
)
check_close(softmax(torch.tensor([0.0, -torch.inf])), torch.tensor([1.0, 0.0]), "softmax([0, −∞])")
print("all right")
### BEGIN HIDDEN TESTS
import secrets

seed = secrets.randbits(32)
generator = torch.Generator().manual_seed(seed)
scores = torch.randn(2, 3, 7, generator=generator) * 300
scores[..., 2] = -torch.inf
expected = scores.double().softmax(dim=-1).float()
before = scores.clone()
with without(
    *("torch:softmax", "torch:Tensor.softmax", "torch.nn.functional:softmax", "torch.nn:Softmax"),
    *("torch:log_softmax", "torch:Tensor.log_softmax", "torch.nn.functional:log_softmax", "torch.nn:LogSoftmax"),
    *("torch.special:softmax", "torch.special:log_softmax", "torch:logsumexp", "torch:Tensor.logsumexp"),
):
    mine = softmax(scores)
check_close(mine, expected, "softmax of random scores", atol=1e-4, hint=f"(seed {seed})")
check_equal(torch.equal(scores, before), True, "whether the scores are left as they were")
### END HIDDEN TESTS

# %% [markdown]
# ## 2 · Scaled dot-product attention (20 points)
#
# $\mathrm{softmax}(QK^T/\sqrt{d})\,V$ (Vaswani et al. 2017, "Attention Is All You Need", equation 1), where $d$ is
# `head_dim`. The mask says where a query may see a key; other pairs get the score $-\infty$.
#
# An example by hand: $d = 4$, one query $(2, 0, 0, 0)$, the keys $(\ln 3, 0, 0, 0)$ and $(0, 0, 0, 0)$. The products
# are $2\ln 3$ and 0; divided by $\sqrt 4$ they are $\ln 3$ and 0; the weights are 3/4 and 1/4. With the values
# $(4, 0, 0, 0)$ and $(0, 8, 0, 0)$ the output is $(3, 2, 0, 0)$. If the first key is masked, it is $(0, 8, 0, 0)$.
#
# *Hints:* `transpose(-1, -2)` leaves the dimensions in front alone; `masked_fill`; here you may call `torch.softmax`,
# so that a mistake in task 1 costs nothing in this one.


# %% tags=["solution:attention"]
def attention(q, k, v, mask=None):
    """Outputs [..., queries, head_dim] for q [..., queries, head_dim], k and v [..., keys, head_dim].

    mask: booleans [queries, keys], or with dimensions in front; True where a query may see a key. None: all see all.
    """
    ### BEGIN SOLUTION
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v
    ### END SOLUTION


# %% tags=["tests:attention_tests:20"]
from minillm.course.checks import check_close, check_equal, without

ln3 = torch.tensor(3.0).log().item()
q = torch.tensor([[2.0, 0, 0, 0]])
k = torch.tensor([[ln3, 0, 0, 0], [0.0, 0, 0, 0]])
v = torch.tensor([[4.0, 0, 0, 0], [0.0, 8, 0, 0]])
check_close(
    attention(q, k, v),
    torch.tensor([[3.0, 2.0, 0, 0]]),
    "the output of the example",
    hint="Are the scores divided by √head_dim?",
)
check_close(
    attention(q, k, v, torch.tensor([[False, True]])),
    torch.tensor([[0.0, 8.0, 0, 0]]),
    "the output with the first key masked",
    hint="True is where a query may see a key.",
)
check_close(
    attention(q.expand(5, 3, 1, 4), k.expand(5, 3, 2, 4), v.expand(5, 3, 2, 4)),
    torch.tensor([3.0, 2.0, 0, 0]).expand(5, 3, 1, 4),
    "the output for 5 sequences of 3 heads",
)
print("all right")
### BEGIN HIDDEN TESTS
import secrets

from minillm.transformer.attention import dot_product_attention

seed = secrets.randbits(32)
generator = torch.Generator().manual_seed(seed)
q = torch.randn(2, 3, 4, 16, generator=generator)
k = torch.randn(2, 3, 6, 16, generator=generator)
v = torch.randn(2, 3, 6, 16, generator=generator)
mask = torch.rand(4, 6, generator=generator) < 0.5
mask[:, 0] = True  # no query without a key
for one in (mask, mask[None, None], None):
    expected = dot_product_attention(q.double(), k.double(), v.double(), None if one is None else mask[None, None])
    inputs = [x.clone() for x in (q, k, v)]
    with without(
        *("minillm.transformer.attention:dot_product_attention", "minillm.transformer.attention:sdpa_attention"),
        *("minillm.transformer.attention:attend", "torch.nn.functional:scaled_dot_product_attention"),
    ):
        mine = attention(*inputs, one)
    told = "without a mask" if one is None else f"with a mask of shape {list(one.shape)}"
    check_close(mine, expected.float(), f"attention {told}", hint=f"(seed {seed})")
    check_equal(all(map(torch.equal, inputs, (q, k, v))), True, "whether q, k and v are left as they were")
### END HIDDEN TESTS

# %% [markdown]
# ## 3 · The causal mask (15 points)
#
# In a language model, a token sees itself and what came before (notebook 03, section 3). There may be more keys than
# queries: when a model writes, the earlier tokens' keys are kept, and the queries are the **last** tokens of the text.
# Of 4 tokens, 2 queries stand at positions 2 and 3:
#
# | | key 0 | key 1 | key 2 | key 3 |
# | --- | --- | --- | --- | --- |
# | query 0 (position 2) | yes | yes | yes | no |
# | query 1 (position 3) | yes | yes | yes | yes |
#
# *Hint:* compare a column of query positions with a row of key positions.


# %% tags=["solution:causal"]
def causal_mask(queries, keys):
    """Booleans [queries, keys], True where a query may see a key; the queries are the last tokens of the keys."""
    ### BEGIN SOLUTION
    query_positions = torch.arange(keys - queries, keys)
    return torch.arange(keys)[None, :] <= query_positions[:, None]
    ### END SOLUTION


# %% tags=["tests:causal_tests:15"]
from minillm.course.checks import check_close, check_equal, without

check_close(
    causal_mask(3, 3),
    torch.tensor([[True, False, False], [True, True, False], [True, True, True]]),
    "causal_mask(3, 3)",
    hint="Does each token see itself, and none after it?",
)
check_close(
    causal_mask(2, 4),
    torch.tensor([[True, True, True, False], [True, True, True, True]]),
    "causal_mask(2, 4)",
    hint="The queries are the last tokens: the first of them stands at position keys − queries.",
)
print("all right")
### BEGIN HIDDEN TESTS
import secrets

from minillm.transformer.attention import attention_mask

for _ in range(5):
    queries = 1 + secrets.randbelow(9)
    keys = queries + secrets.randbelow(9)
    expected = attention_mask(torch.arange(keys - queries, keys), torch.arange(keys))
    with without("minillm.transformer.attention:attention_mask"):
        mine = causal_mask(queries, keys)
    check_close(mine, expected, f"causal_mask({queries}, {keys})")
### END HIDDEN TESTS

# %% [markdown]
# ## 4 · A window (10 points)
#
# Mistral 7B (Jiang et al. 2023, §2) lets a token see its last `window` tokens only, itself included: with a window
# of 2, itself and the one before. For the 2 queries and 4 keys of task 3 and a window of 2: query 0 (position 2) sees
# the keys 1 and 2, query 1 the keys 2 and 3.


# %% tags=["solution:window"]
def window_mask(queries, keys, window):
    """As causal_mask, but a query sees at most `window` keys: its own token's and those just before."""
    ### BEGIN SOLUTION
    query_positions = torch.arange(keys - queries, keys)
    distance = query_positions[:, None] - torch.arange(keys)[None, :]
    return (distance >= 0) & (distance < window)
    ### END SOLUTION


# %% tags=["tests:window_tests:10"]
from minillm.course.checks import check_close, check_equal, without

check_close(
    window_mask(2, 4, 2),
    torch.tensor([[False, True, True, False], [False, False, True, True]]),
    "window_mask(2, 4, 2)",
    hint="A window of 2 is the token itself and one before it.",
)
check_close(window_mask(2, 2, 9), torch.tensor([[True, False], [True, True]]), "window_mask(2, 2, 9)")
print("all right")
### BEGIN HIDDEN TESTS
import secrets

from minillm.transformer.attention import attention_mask

for _ in range(5):
    queries = 1 + secrets.randbelow(9)
    keys = queries + secrets.randbelow(9)
    window = 1 + secrets.randbelow(6)
    expected = attention_mask(torch.arange(keys - queries, keys), torch.arange(keys), window=window)
    with without("minillm.transformer.attention:attention_mask"):
        mine = window_mask(queries, keys, window)
    check_close(mine, expected, f"window_mask({queries}, {keys}, {window})")
### END HIDDEN TESTS

# %% [markdown]
# ## 5 · Grouped heads (15 points)
#
# In grouped-query attention (Ainslie et al. 2023, "GQA"), several query heads share one key/value head. Neighbours form
# a group: with 6 query heads and 2 key/value heads, the query heads 0, 1 and 2 use key/value head 0, and 3, 4 and 5
# use head 1. You are given a function `attend(q, k, v, mask)` for equally many heads. Your `attention` is one, and the
# tests use another, so that a mistake in task 2 costs nothing here: a stand-in without softmax, $(QK^T)V$.
#
# In the example, head_dim is 1, there are 4 query heads of one query 1, and 2 key/value heads of one key each: the keys
# are 1 and 10, the values 1. So the four outputs are 1, 1, 10, 10.
#
# *Hints:* either copy each key/value head for its group, or, as the package does, stack the queries of a group as more
# rows of one head (then the mask needs care). `repeat` and `repeat_interleave` are not the same.


# %% tags=["solution:grouped"]
def grouped_attention(q, k, v, mask, attend):
    """Outputs [batch, heads, queries, head_dim] for q of that shape, k and v [batch, kv_heads, keys, head_dim].

    mask: booleans [queries, keys], handed on to attend; attend(q, k, v, mask) wants as many heads in k and v as in q.
    """
    ### BEGIN SOLUTION
    group = q.shape[1] // k.shape[1]
    return attend(q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1), mask)
    ### END SOLUTION


# %% tags=["tests:grouped_tests:15"]
from minillm.course.checks import check, check_close, check_equal, without


def stand_in(q, k, v, mask):
    """Attention without softmax."""
    check(
        k.shape[:2] == v.shape[:2] == q.shape[:2], f"attend got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    )
    return ((q @ k.transpose(-1, -2)) * mask) @ v


k = torch.tensor([1.0, 10.0]).view(1, 2, 1, 1)
check_close(
    grouped_attention(torch.ones(1, 4, 1, 1), k, torch.ones(1, 2, 1, 1), torch.ones(1, 1, dtype=torch.bool), stand_in),
    torch.tensor([1.0, 1.0, 10.0, 10.0]).view(1, 4, 1, 1),
    "the output of the example",
    hint="Neighbouring query heads form a group: 0 and 1 use key/value head 0.",
)
print("all right")
### BEGIN HIDDEN TESTS
import secrets

seed = secrets.randbits(32)
generator = torch.Generator().manual_seed(seed)
for heads, kv_heads in ((6, 2), (4, 4), (6, 1)):
    q = torch.randn(2, heads, 3, 8, generator=generator)
    k = torch.randn(2, kv_heads, 5, 8, generator=generator)
    v = torch.randn(2, kv_heads, 5, 8, generator=generator)
    mask = torch.ones(3, 5, dtype=torch.bool).tril(2)
    split = q.double().unflatten(1, (kv_heads, -1))
    scores = torch.einsum("bghqd,bgkd->bghqk", split, k.double()) * mask
    expected = torch.einsum("bghqk,bgkd->bghqd", scores, v.double()).flatten(1, 2)
    with without("minillm.transformer.attention:dot_product_attention", "minillm.transformer.attention:attend"):
        mine = grouped_attention(q, k, v, mask, stand_in)
    told = f"grouped attention of {heads} heads on {kv_heads}"
    check_close(mine, expected.float(), told, rtol=1e-3, atol=1e-3, hint=f"(seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# ## 6 · Rotary positions (20 points)
#
# Each pair of channels is turned by an angle: position · $\theta_i$ with $\theta_i = \mathrm{base}^{-2i/d}$ for pair
# $i = 0 \ldots d/2-1$ (Su et al. 2021, "RoFormer", §3.2.2). Turning $(a, b)$ by the angle $\alpha$ gives
# $(a\cos\alpha - b\sin\alpha,\; b\cos\alpha + a\sin\alpha)$. `tiny` is of the Llama family: pair $i$ is the channels
# $i$ and $i + d/2$.
#
# For $d = 4$ and base 10000, the angles are 1 and 0.01 times the position. So $(1, 0, 0, 0)$ at position 1 becomes
# $(\cos 1, 0, \sin 1, 0)$, and $(0, 1, 0, 0)$ becomes $(0, \cos 0.01, 0, \sin 0.01)$.
#
# *Hints:* `chunk(2, dim=-1)`; a token's angles are the same for all its heads.


# %% tags=["solution:rotate"]
def rotate(x, positions, base=10000.0):
    """x [..., tokens, heads, head_dim], every token turned by its position, of positions [tokens]."""
    ### BEGIN SOLUTION
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half) / half)
    angles = (positions[:, None] * frequencies)[:, None, :]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)
    ### END SOLUTION


# %% tags=["tests:rotate_tests:20"]
from minillm.course.checks import check_close, check_equal, without

x = torch.eye(4)[:2].view(2, 1, 4)  # two tokens with one head each: (1, 0, 0, 0) and (0, 1, 0, 0)
cos, sin = torch.tensor([1.0, 0.01]).cos(), torch.tensor([1.0, 0.01]).sin()
check_close(
    rotate(x, torch.tensor([1, 1])),
    torch.stack([cos[0] * x[0] + sin[0] * torch.eye(4)[2], cos[1] * x[1] + sin[1] * torch.eye(4)[3]]),
    "the two tokens of the example, turned",
    hint="Pair i is the channels i and i + head_dim/2; its angle is position · base^(−2i/head_dim).",
)
check_close(rotate(x, torch.tensor([0, 0])), x, "two tokens at position 0", hint="Position 0 turns nothing.")
print("all right")
### BEGIN HIDDEN TESTS
import secrets

from minillm.transformer.positions import RotaryConfig, RotaryEmbedding, apply_rotary

seed = secrets.randbits(32)
generator = torch.Generator().manual_seed(seed)
for shape in ((5, 3, 16), (2, 4, 3, 8)):
    x = torch.randn(shape, generator=generator)
    positions = torch.randint(0, 300, (shape[-3],), generator=generator)
    base = float(torch.randint(100, 100_000, (), generator=generator))
    expected = apply_rotary(x, RotaryEmbedding(RotaryConfig(shape[-1], base))(positions, torch.float32))
    before = x.clone()
    with without(
        *("minillm.transformer.positions:RotaryEmbedding", "minillm.transformer.positions:rotary_frequencies"),
        *("minillm.transformer.positions:rotate", "minillm.transformer.positions:apply_rotary"),
    ):
        mine = rotate(x, positions, base)
    check_close(mine, expected, f"a tensor of shape {shape}, turned", rtol=1e-3, atol=1e-3, hint=f"(seed {seed})")
    check_equal(torch.equal(x, before), True, "whether x is left as it was")
### END HIDDEN TESTS

# %% [markdown]
# ## 7 · Your attention in a real model (10 points)
#
# The package's decoder hands q, k and v of each layer to a **key/value store** and takes back what the store made of
# them (notebook 03, section 4). So your attention becomes the model's when it stands in a store. `NoCache` keeps
# nothing: every call brings the whole text. Here `tiny` has lost its rotary positions, so that the queries and keys
# arrive unturned; turning them is your store's work too.

# %% tags=["locked:model"]
whole = minillm.load_model("tiny", dtype="float32", device="cpu")
layers = tuple(replace(layer, rotary=None) for layer in whole.config.layers)
model = Decoder(replace(whole.config, layers=layers)).eval()
model.load_state_dict(whole.state_dict())
tokenizer = minillm.get_tokenizer("tiny")

# %% [markdown]
# Write the store's `attend`: turn q and k (the tokens are the positions 0, 1, 2, …), make the causal mask, attend in
# grouped heads by your `attention`. Use your functions of the tasks 2, 3, 5 and 6.
#
# *Hint:* q arrives as `[batch, tokens, heads, head_dim]`. That is what `rotate` wants; `grouped_attention` wants the
# heads before the tokens. The output goes back in the shape in which q arrived.


# %% tags=["solution:store"]
class MyStore(NoCache):
    """A store that keeps nothing and attends by your functions."""

    def attend(self, layer, q, k, v):
        """Outputs [batch, tokens, heads, head_dim] for q of that shape, k and v [batch, tokens, kv_heads, head_dim]."""
        ### BEGIN SOLUTION
        tokens = q.shape[1]
        q, k = rotate(q, torch.arange(tokens)), rotate(k, torch.arange(tokens))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return grouped_attention(q, k, v, causal_mask(tokens, tokens), attention).transpose(1, 2)
        ### END SOLUTION


# %% tags=["tests:story_tests:10"]
from minillm.course.checks import check_close, check_equal, without
from minillm.transformer.kv import PaddedBatch

prompt = tokenizer("Once upon a time").input_ids
tokens = torch.tensor([prompt])
ones = torch.ones(1, 3, 6, 32), torch.ones(1, 3, 2, 32), torch.ones(1, 3, 2, 32)
with torch.inference_mode():
    store = MyStore(model.config.attention_specs)
    store.begin(PaddedBatch.full(1, 3))
    check_close(store.attend(0, *ones), ones[0], "what the store gives back where all values are 1")
    store.begin(PaddedBatch.full(*tokens.shape))
    got = model(tokens, torch.arange(tokens.shape[1])[None], store)
    check_close(
        got,
        whole(tokens),
        "tiny's logits with your attention",
        rtol=1e-3,
        atol=1e-2,
        hint="Are the tasks 2, 3, 5 and 6 right? Is each of q, k and v in the shape that your functions want?",
    )
story = generate(model, [prompt], MyStore(model.config.attention_specs), max_tokens=60)
print("Once upon a time" + tokenizer.decode([token for (token,) in story]))
### BEGIN HIDDEN TESTS
import secrets

seed = secrets.randbits(32)
tokens = torch.randint(0, model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(seed))
with torch.inference_mode():
    expected = whole(tokens)
    store = MyStore(model.config.attention_specs)
    store.begin(PaddedBatch.full(*tokens.shape))
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with without(
        *("minillm.transformer.attention:dot_product_attention", "minillm.transformer.attention:sdpa_attention"),
        *("minillm.transformer.attention:attend", "torch.nn.functional:scaled_dot_product_attention"),
        *("minillm.transformer.positions:rotate", "minillm.transformer.positions:apply_rotary"),
    ):
        got = model(tokens, positions, store)
check_close(got, expected, "tiny's logits of random tokens", rtol=1e-3, atol=1e-2, hint=f"(seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# ## What to hand in
#
# This notebook, under its own name. Before you do: *Kernel → Restart Kernel and Run All Cells*, so that what you see is
# what a fresh start gives. Cells that you may not edit are put back when it is graded.
#
# ## If you want to go on (no points)
#
# 1. Give `MyStore` a window of 16 with `window_mask`. After how many words does the story lose its thread?
# 2. Leave the rotation out of `MyStore`. Which words still come out right, and why those?
# 3. Write `grouped_attention` without a copy of k and v, and measure both with 4,096 keys.
