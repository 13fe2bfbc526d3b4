# %% [markdown]
# # Assignment 2 · An encoder and a decoder
#
# You build the two blocks of the Transformer of 2017, say what is to be learned from a pair of sentences, write the
# training loop, and train until a target score is reached: a translator of numbers, from English words to Chinese.
# Your pieces run inside the package's own encoder/decoder.
#
# **At the end you will be able to**
#
# - put attention, a feed-forward network, residual connections and norms together to an encoder block and a decoder
#   block, and say what each line is for;
# - let a target look at a source by cross-attention, without seeing padding;
# - prepare targets for teacher forcing, and compute a loss that leaves padding out and is not too sure;
# - write a step of training and the loop around it.
#
# **You need** notebooks 03 (attention) and 04 (encoder and decoder). **Time**: about 100 minutes, of which half a
# minute is training. No GPU.
#
# There are 100 points:
#
# | task | you write | points |
# | --- | --- | --- |
# | 1 | `EncoderBlock` | 15 |
# | 2 | `cross_attention` | 15 |
# | 3 | `DecoderBlock` | 15 |
# | 4 | `shift` | 10 |
# | 5 | `smoothed_loss` | 15 |
# | 6 | `train_step` | 10 |
# | 7 | `train_until` | 5 |
# | 8 | nothing more: your translator | 15 |
#
# Replace each `raise NotImplementedError()`. The cell behind a task checks it and says what is wrong and where. Further
# checks with fresh random numbers are run when you have handed in. They close the package's own answers (such as
# `TransformerBlock`) while your code runs, so write your own. A mistake costs its own task, and task 8 if the
# translator suffers from it.

# %% tags=["locked:a2_imports"]
import copy
import dataclasses
import math
import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minillm.course.checks import check, check_close, check_equal, without
from minillm.training.batching import IGNORED, PairBatch
from minillm.training.numbers import chinese, english, sample
from minillm.training.schedules import cosine
from minillm.training.trainer import Trainer, TrainingConfig
from minillm.training.translator import NUMBERS, START, STOP, Translator, make_trainer
from minillm.transformer.attention import dot_product_attention
from minillm.transformer.blocks import CrossAttentionBlock, TransformerBlock
from minillm.transformer.kv import KVStore, NoCache, PaddedBatch, pad_right
from minillm.transformer.multi_head import CrossAttention
from minillm.transformer.positions import Rotation
from minillm.transformer.seq2seq import Seq2Seq, Seq2SeqConfig
from minillm.viz import plot_losses


def draw(low: int, high: int, generator: torch.Generator) -> int:
    """A random whole number, low and high included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def random_model(seed: int) -> Seq2Seq:
    """A small encoder/decoder in float64, whose norms do something."""
    torch.manual_seed(seed)
    sizes = {"num_encoder_layers": 2, "num_decoder_layers": 2, "max_position_embeddings": 32, "dropout": 0.0}
    model = Seq2Seq(Seq2SeqConfig(20, hidden_size=12, num_heads=3, intermediate_size=24, norm_placement="pre", **sizes))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5)
    return model.double()


def check_hand(got: Any, expected: Tensor, typical: dict[str, Tensor]) -> None:
    """Compare with the example by hand; `typical` says which mistake gives which other result."""
    comparable = isinstance(got, Tensor) and got.shape == expected.shape
    hints = [mistake for mistake, wrong in typical.items() if comparable and torch.allclose(got, wrong, atol=1e-4)]
    check_close(got, expected, "the result of the example", hint=" ".join(hints))


def check_module(
    mine: Callable[..., Any], package: Callable[..., Tensor], x: Tensor, others: Sequence[Any], hint: str
) -> None:
    """Both must give the same output for `x`, and the same gradient on `x`; `closed` is closed for the first."""
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = package(theirs, *others)
    expected.square().sum().backward()
    with without(*closed):
        got = mine(ours, *others)
    check_close(got, expected, "the output", rtol=1e-4, atol=1e-6, hint=hint)
    check(got.requires_grad, f"no gradient flows back from the output: do not detach anything. {hint}")
    got.square().sum().backward()
    largest = float(theirs.grad.abs().max())  # the package's attention has its softmax in float32
    check_close(ours.grad, theirs.grad, "the gradient on x", rtol=1e-3, atol=1e-3 * largest, hint=hint)


# %% [markdown]
# ## Task 1 · The encoder's block (15 points)
#
# A block has two **sublayers**: self-attention, and a feed-forward network. Around each is a residual connection
# (Vaswani et al. 2017, §3.1): the block does not replace x, it adds to it. The norm stands *before* each sublayer
# (pre-norm; Xiong et al. 2020, figure 1b), so that an untouched path leads from the bottom to the top:
#
# > x ← x + attention(norm(x)), then x ← x + feed_forward(norm(x)), each with a norm of its own.
#
# `attention` is called with the normed x, with `rotation` and with `kv`. These two are simply passed on: `kv` knows who
# may see whom, which in an encoder is everybody, padding excepted.
#
# *By hand:* take stand-ins whose results are easily computed. norm(x) subtracts the mean, attention(x) is 10 · x,
# feed_forward(x) is x + 1. For x = (1, 3):
#
# | | | |
# | --- | --- | --- |
# | first sublayer | norm: (−1, 1) | attention: (−10, 10) |
# | added to x | (−9, 13) | |
# | second sublayer | norm: (−11, 11) | feed_forward: (−10, 12) |
# | added | **(−19, 25)** | |
#
# *Hint:* two lines are enough. Do not write `x += …`: it changes the tensor that the caller still holds.


# %% tags=["solution:a2_encoder"]
class EncoderBlock(nn.Module):
    """Self-attention, then a feed-forward network, each behind its norm and inside its residual connection."""

    def __init__(
        self, attention: nn.Module, feed_forward: nn.Module, attention_norm: nn.Module, feed_forward_norm: nn.Module
    ) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm = attention_norm
        self.feed_forward_norm = feed_forward_norm

    def forward(
        self, x: Float[Tensor, "batch seq hidden"], rotation: Rotation | None, kv: KVStore
    ) -> Float[Tensor, "batch seq hidden"]:
        ### BEGIN SOLUTION
        x = x + self.attention(self.attention_norm(x), rotation, kv)
        return x + self.feed_forward(self.feed_forward_norm(x))
        ### END SOLUTION


# %% tags=["tests:a2_encoder_tests:15"]
from minillm.course.checks import check, check_close, check_equal, without

closed = ("minillm.transformer.blocks:TransformerBlock", "minillm.transformer.blocks:ResidualNorm")


class StandIn(nn.Module):
    """A module whose result is easily computed by hand."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Tensor:
        return self.function(*inputs)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(dim=-1, keepdim=True)


attention, feed_forward = StandIn(lambda x, rotation, kv: 10 * x), StandIn(lambda x: x + 1)
x = torch.tensor([[[1.0, 3]]])
with without(*closed):
    got = EncoderBlock(attention, feed_forward, StandIn(centred), StandIn(centred))(x, None, None)
typical = {
    "That is post-norm: the norm belongs before the sublayer, inside the residual connection.": [-22.0, 22],
    "The residual connections are missing: add to x what the sublayer says.": [-9.0, 11],
    "The norms are missing.": [23.0, 67],
    "The first residual connection is missing.": [-19.0, 21],
    "The second residual connection is missing.": [-10.0, 12],
}
typical = {mistake: torch.tensor([[wrong]]) for mistake, wrong in typical.items()}
check_hand(got, torch.tensor([[[-19.0, 25]]]), typical)
check_equal(x.tolist(), [[[1.0, 3.0]]], "the block's input afterwards", hint="Write x = x + …, not x += …")
### BEGIN HIDDEN TESTS
for _ in range(3):
    seed = secrets.randbelow(2**31)
    model, generator = random_model(seed), torch.Generator().manual_seed(seed)
    for package in model.encoder:
        for norm in (package.attention_norm, package.feed_forward_norm):
            check(norm.placement == "pre", "the package's block is not pre-norm")
        mine = EncoderBlock(
            package.attention, package.feed_forward, package.attention_norm.norm, package.feed_forward_norm.norm
        )
        lengths = tuple(draw(1, 6, generator) for _ in range(3))
        kv = NoCache(model.config.encoder_specs)
        kv.begin(PaddedBatch((0, 0, 0), lengths))
        x = torch.randn(3, max(lengths), 12, generator=generator, dtype=torch.float64)
        check_module(mine, package, x, (None, kv), f"(seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# ## Task 2 · From the target to the source (15 points)
#
# In **cross-attention** the queries come from the target, and keys and values from the encoder's output (§3.2.3, first
# item). Keys and values depend on the source alone, so the model has computed them already:
# `k` and `v` are `[batch, heads, source, head_dim]`. What is left for `cross_attention(layer, x, k, v, mask)`:
#
# 1. queries: `layer.q(x)`, `[batch, target, heads · head_dim]`, cut into heads: `[batch, heads, target, head_dim]`;
# 2. attention of these queries to all `k` and `v`, but where `mask` is False (padding of the source);
# 3. the heads side by side again, `[batch, target, heads · head_dim]`, through `layer.out`.
#
# *By hand:* two heads of one channel; `layer.q` and `layer.out` change nothing. The source has two tokens, with keys 1
# and 0 in both heads; the values are 2 and 4 in the first head, 4 and 8 in the second. The target's first token is
# x = (0, ln 3). Head 1 has the query 0: scores 0 and 0, weights 1/2 and 1/2, result (2 + 4) / 2 = 3. Head 2 has the
# query ln 3: scores ln 3 and 0, weights 3/4 and 1/4, result (3 · 4 + 8) / 4 = 5. Together **(3, 5)**. The second
# target token (ln 3, 0) gives **(2.5, 6)** in the same way. With the second source token masked, both give (2, 4).
#
# *Hints:* for step 2 you may take `dot_product_attention(q, k, v, mask)` of the package (assignment 1).
# `x.unflatten(-1, (-1, layer.head_dim))` cuts into heads, `.flatten(-2)` puts them together, and `.transpose(1, 2)`
# swaps heads and tokens. A mere reshape to `[batch, heads, …]` would mix tokens and heads.


# %% tags=["solution:a2_cross"]
def cross_attention(
    layer: CrossAttention,
    x: Float[Tensor, "batch target hidden"],
    k: Float[Tensor, "batch heads source head_dim"],
    v: Float[Tensor, "batch heads source head_dim"],
    mask: Bool[Tensor, "batch 1 1 source"] | None,
) -> Float[Tensor, "batch target hidden"]:
    """What the target's tokens read in the source; `layer` has `q`, `out` and `head_dim`."""
    ### BEGIN SOLUTION
    q = layer.q(x).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
    out = dot_product_attention(q, k, v, mask)
    return layer.out(out.transpose(1, 2).flatten(-2))
    ### END SOLUTION


# %% tags=["tests:a2_cross_tests:15"]
from minillm.course.checks import check, check_close, check_equal, without

closed = ("minillm.transformer.multi_head:CrossAttention", "torch.nn.functional:multi_head_attention_forward")
layer = SimpleNamespace(q=nn.Identity(), out=nn.Identity(), head_dim=1)
x = torch.tensor([[[0, math.log(3)], [math.log(3), 0]]])
k = torch.tensor([1.0, 0]).view(1, 1, 2, 1).expand(1, 2, 2, 1)
v = torch.tensor([[2.0, 4], [4, 8]]).view(1, 2, 2, 1)
typical = {
    "That is what a causal mask gives: every target token may see the whole source.": [[2.0, 4], [2.5, 6]],
    "Tokens and heads are mixed: cut the last dimension into heads, then transpose.": [[3.0, 2.5], [5, 6]],
}
typical = {mistake: torch.tensor([wrong]) for mistake, wrong in typical.items()}
with without(*closed):
    seen, masked = (
        cross_attention(layer, x, k, v, mask) for mask in (None, torch.tensor([True, False]).view(1, 1, 1, 2))
    )
check_hand(seen, torch.tensor([[[3.0, 5], [2.5, 6]]]), typical)
check_close(masked, torch.tensor([[[2.0, 4], [2, 4]]]), "with a masked token the result", hint="Is the mask used?")
### BEGIN HIDDEN TESTS
for _ in range(3):
    seed = secrets.randbelow(2**31)
    model, generator = random_model(seed), torch.Generator().manual_seed(seed)
    layer = model.cross_attentions[0]
    source, target = draw(2, 6, generator), draw(1, 6, generator)
    with torch.no_grad():
        k, v = layer.keys_values(torch.randn(4, source, 12, generator=generator, dtype=torch.float64))
    x = torch.randn(4, target, 12, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([source, *(draw(1, source, generator) for _ in range(3))])
    for mask in (None, (torch.arange(source) < lengths[:, None])[:, None, None]):
        masked = "without a mask" if mask is None else f"masked behind {lengths.tolist()}"
        check_module(partial(cross_attention, layer), layer, x, (k, v, mask), f"({masked}, seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# ## Task 3 · The decoder's block (15 points)
#
# Three sublayers, each with its norm before it and its residual connection around it, in this order: self-attention
# over the target so far, cross-attention to the source, the feed-forward network (§3.1, figure 1).
#
# - `self.attention(normed, None, kv)`: the second argument is a rotation, and this model has none. `kv` lets no token
#   see a later one: that is the *masked* self-attention of the paper.
# - `self.cross_attention(normed, k, v, mask)`: as in task 2. The check uses the package's, so that a mistake there does
#   no harm here.
#
# *By hand:* the stand-ins of task 1, and cross_attention(x, k, v, mask) is k · max(x, 0) with k = 2. For x = (1, 3):
# after attention (−9, 13), as before; norm: (−11, 11), cross-attention: (0, 22), added: (−9, 35); norm: (−22, 22),
# feed_forward: (−21, 23), added: **(−30, 58)**.


# %% tags=["solution:a2_decoder"]
class DecoderBlock(nn.Module):
    """Masked self-attention, attention to the source, a feed-forward network."""

    def __init__(
        self,
        attention: nn.Module,
        cross_attention: nn.Module,
        feed_forward: nn.Module,
        attention_norm: nn.Module,
        cross_attention_norm: nn.Module,
        feed_forward_norm: nn.Module,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.cross_attention = cross_attention
        self.feed_forward = feed_forward
        self.attention_norm = attention_norm
        self.cross_attention_norm = cross_attention_norm
        self.feed_forward_norm = feed_forward_norm

    def forward(
        self,
        x: Float[Tensor, "batch target hidden"],
        k: Float[Tensor, "batch heads source head_dim"],
        v: Float[Tensor, "batch heads source head_dim"],
        mask: Bool[Tensor, "batch 1 1 source"] | None,
        kv: KVStore,
    ) -> Float[Tensor, "batch target hidden"]:
        ### BEGIN SOLUTION
        x = x + self.attention(self.attention_norm(x), None, kv)
        x = x + self.cross_attention(self.cross_attention_norm(x), k, v, mask)
        return x + self.feed_forward(self.feed_forward_norm(x))
        ### END SOLUTION


# %% tags=["tests:a2_decoder_tests:15"]
from minillm.course.checks import check, check_close, check_equal, without

closed = ("minillm.transformer.blocks:CrossAttentionBlock", "minillm.transformer.blocks:ResidualNorm")
x = torch.tensor([[[1.0, 3]]])
sublayers = (
    StandIn(lambda x, rotation, kv: 10 * x),
    StandIn(lambda x, k, v, mask: k * x.clamp(min=0)),
    StandIn(lambda x: x + 1),
)
with without(*closed):
    got = DecoderBlock(*sublayers, *(StandIn(centred) for _ in range(3)))(x, 2.0, None, None, None)
typical = {
    "Cross-attention stands second, behind self-attention.": [-40.0, 48],
    "That is post-norm: the norm belongs before the sublayer, inside the residual connection.": [-44.0, 44],
    "Cross-attention's residual connection is missing.": [-10.0, 34],
    "Cross-attention's own norm is missing.": [-32.0, 64],
}
typical = {mistake: torch.tensor([[wrong]]) for mistake, wrong in typical.items()}
check_hand(got, torch.tensor([[[-30.0, 58]]]), typical)
check_equal(x.tolist(), [[[1.0, 3.0]]], "the block's input afterwards", hint="Write x = x + …, not x += …")
### BEGIN HIDDEN TESTS
for _ in range(3):
    seed = secrets.randbelow(2**31)
    model, generator = random_model(seed), torch.Generator().manual_seed(seed)
    lengths = [5, draw(1, 5, generator), draw(1, 5, generator)]
    with torch.no_grad():
        memory = model.encode(torch.randint(0, 20, (3, 5), generator=generator), lengths)
    for package, k, v in zip(model.decoder, memory.keys, memory.values, strict=True):
        norms = (package.attention_norm.norm, package.cross_attention_norm.norm, package.feed_forward_norm.norm)
        mine = DecoderBlock(package.attention, package.cross_attention, package.feed_forward, *norms)
        target = draw(2, 6, generator)
        kv = NoCache(model.config.attention_specs)
        kv.begin(PaddedBatch.full(3, target))
        x = torch.randn(3, target, 12, generator=generator, dtype=torch.float64)
        check_module(mine, package, x, (k, v, memory.mask, kv), f"(seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# ## Task 4 · What is to be learned (10 points)
#
# In *teacher forcing* the decoder reads the target **shifted right** (§3.1): the start token first, then the target.
# At each position it must say the next token: the target, then the stop token. Rows of a batch are padded on the right
# to the longest. Padding is nothing to be learned: there the label is `IGNORED` (−100). What the decoder reads there
# matters to nobody, but it must be a token that exists: take 0.
#
# `shift(rows, start_id, stop_id)` returns two tensors of whole numbers, `[batch, longest + 1]`: inputs and labels.
#
# *By hand:* start 1, stop 2, the rows `[7, 8]` and `[9]`:
#
# | inputs | labels |
# | --- | --- |
# | `1 7 8` | `7 8 2` |
# | `1 9 0` | `9 2 −100` |
#
# *Hint:* `pad_right(rows, pad_id)` makes a tensor of lists of different lengths.


# %% tags=["solution:a2_shift"]
def shift(
    rows: Sequence[Sequence[int]], start_id: int, stop_id: int
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """What the decoder reads, and what it must say at each position."""
    ### BEGIN SOLUTION
    inputs = pad_right([[start_id, *row] for row in rows])
    labels = pad_right([[*row, stop_id] for row in rows], IGNORED)
    return inputs, labels
    ### END SOLUTION


# %% tags=["tests:a2_shift_tests:10"]
from minillm.course.checks import check, check_close, check_equal, without


def check_shift(rows: list[list[int]], start_id: int, stop_id: int, inputs: Tensor, labels: Tensor, hint: str) -> None:
    kept = copy.deepcopy(rows)
    with without("minillm.training.batching:PairBatch", "minillm.training.batching:TextBatch"):
        got = shift(rows, start_id, stop_id)
    check(isinstance(got, tuple) and len(got) == 2, "shift should return two tensors, inputs and labels")
    check_equal(rows, kept, "the rows afterwards", hint="They are only to be read.")
    check_close(got[1], labels, "labels", hint=hint)
    check_close(got[0], inputs, "inputs", hint=hint)


hint = "Inputs begin with the start token, labels end with the stop token, and padding's label is IGNORED."
right = (torch.tensor([[1, 7, 8], [1, 9, 0]]), torch.tensor([[7, 8, 2], [9, 2, IGNORED]]))
check_shift([[7, 8], [9]], 1, 2, *right, hint)
### BEGIN HIDDEN TESTS
for _ in range(4):
    seed = secrets.randbelow(2**31)
    generator = torch.Generator().manual_seed(seed)
    rows = [[draw(5, 99, generator) for _ in range(draw(1, 7, generator))] for _ in range(draw(1, 5, generator))]
    start_id, stop_id = draw(0, 2, generator), draw(3, 4, generator)
    right = PairBatch.of([(row, row) for row in rows], start_id, stop_id)
    check_shift(rows, start_id, stop_id, right.inputs, right.targets, f"{hint} (rows {rows}, seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# ## Task 5 · The loss (15 points)
#
# The loss of a position is the **cross-entropy** −log p(label), in nats. With **label smoothing** ε (Szegedy et al.
# 2016, §7; Vaswani et al. 2017, §5.4) the label should get only 1 − ε, and ε is spread evenly over *all* tokens of the
# vocabulary, the label included:
#
# > loss = (1 − ε) · (−log p(label)) + ε · (mean of −log p over the vocabulary)
#
# `smoothed_loss(logits, labels, smoothing)` is the mean of this over all positions whose label is not `IGNORED`.
#
# *By hand:* four tokens, and logits (ln 4, ln 2, 0, 0), so that p = (1/2, 1/4, 1/8, 1/8) and −log p = ln 2 · (1, 2, 3,
# 3). The label is token 0. Without smoothing the loss is ln 2 = **0.6931**. With ε = 0.4 it is
# ln 2 · (0.6 · 1 + 0.4 · 9/4) = 1.5 · ln 2 = **1.0397**. A second position that is padding changes nothing.
#
# *Hints:* `logits.log_softmax(dim=-1)`; never `log(softmax(…))`, which loses small probabilities.
# `table.gather(-1, index[..., None])` picks one number from each row. `IGNORED` is no index: choose the real positions
# first, `log_probs[labels != IGNORED]`.


# %% tags=["solution:a2_loss"]
def smoothed_loss(
    logits: Float[Tensor, "batch seq vocab"], labels: Int[Tensor, "batch seq"], smoothing: float
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the labels that are not IGNORED, `smoothing` of it spread over the vocabulary."""
    ### BEGIN SOLUTION
    real = labels != IGNORED
    costs = -logits.log_softmax(dim=-1)[real]  # [real positions, vocab]
    of_labels = costs.gather(-1, labels[real][:, None]).squeeze(-1)
    return ((1 - smoothing) * of_labels + smoothing * costs.mean(dim=-1)).mean()
    ### END SOLUTION


# %% tags=["tests:a2_loss_tests:15"]
from minillm.course.checks import check, check_close, check_equal, without

closed = (
    "torch.nn.functional:cross_entropy",
    "torch.nn.functional:nll_loss",
    "torch.nn.functional:kl_div",
    "minillm.training.batching:cross_entropy",
)
logits = torch.tensor([[[math.log(4), math.log(2), 0, 0], [9, 0, 0, 0]]])
labels = torch.tensor([[0, IGNORED]])
ln2 = torch.tensor(math.log(2))
with without(*closed):
    plain, smoothed = (smoothed_loss(logits, labels, smoothing) for smoothing in (0.0, 0.4))
typical = {
    "Padding takes part in the mean: divide by the number of real positions.": ln2 / 2,
    "That is in bits: take natural logarithms.": torch.tensor(1.0),
    "The sign is wrong: a loss is −log p.": -ln2,
}
check_hand(plain, ln2, typical)
typical = {
    "ε is spread over all tokens, the label included.": ln2 * (0.6 + 0.4 * 8 / 3),
    "The mean over the vocabulary, not the sum.": ln2 * (0.6 + 0.4 * 9),
    "The label keeps 1 − ε.": ln2 * (1 + 0.4 * 9 / 4),
}
check_hand(smoothed, 1.5 * ln2, typical)
### BEGIN HIDDEN TESTS
for smoothing in (0.0, 0.1, random.SystemRandom().uniform(0.2, 0.9)):
    seed = secrets.randbelow(2**31)
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(draw(2, 6, generator) for _ in range(3))
    logits = 30 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    labels[torch.rand(shape[:-1], generator=generator) < 0.4] = IGNORED
    labels[0, 0] = draw(0, shape[-1] - 1, generator)

    def package(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        reference = nn.CrossEntropyLoss(ignore_index=IGNORED, label_smoothing=smoothing)
        return reference(logits.flatten(0, 1), labels.flatten())

    check_module(smoothed_loss, package, logits, (labels, smoothing), f"(smoothing {smoothing:.2f}, seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# ## Task 6 · A step of training (10 points)
#
# `train_step(model, optimizer, batch, learning_rate, smoothing)` takes one step and returns the loss as a number:
#
# 1. set the learning rate: `group["lr"]` of every group in `optimizer.param_groups`;
# 2. the loss: `batch.loss(model, smoothing)`;
# 3. its gradient, and nothing that an earlier step has left in `.grad`;
# 4. if the gradient of all parameters together is longer than 1, shorten it to 1
#    (`nn.utils.clip_grad_norm_`; Pascanu et al. 2013, §3.2);
# 5. let the optimizer step.
#
# *By hand:* a model of one number, w = 2, and plain gradient descent. The loss is slope · w, for slopes 1/4, 1/4 and 3
# in the three steps, with learning rates 0.5, 0.5 and 1:
#
# | step | loss | gradient, clipped | w afterwards |
# | --- | --- | --- | --- |
# | 0 | 0.5 | 0.25 | 1.875 |
# | 1 | 0.46875 | 0.25 | 1.75 |
# | 2 | 5.25 | 3, clipped to 1 | 0.75 |


# %% tags=["solution:a2_step"]
def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, learning_rate: float, smoothing: float = 0.0
) -> float:
    """Take one step of training on `batch`; return the loss before it."""
    ### BEGIN SOLUTION
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss = batch.loss(model, smoothing)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()
    ### END SOLUTION


# %% tags=["tests:a2_step_tests:10"]
from minillm.course.checks import check, check_close, check_equal, without


class OneNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))


model = OneNumber()
optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
hand = [(0.25, 0.5, 0.5, 1.875), (0.25, 0.5, 0.46875, 1.75), (3.0, 1.0, 5.25, 0.75)]
hints = [
    "Is the learning rate set before the step?",
    "Does the gradient of the step before remain (zero_grad)?",
    "Is the gradient clipped to length 1, before the optimizer steps?",
]
for number, ((slope, rate, loss, after), hint) in enumerate(zip(hand, hints, strict=True)):
    batch = SimpleNamespace(loss=lambda model, smoothing, slope=slope: slope * model.w)
    with without("minillm.training.trainer:Trainer"):
        got = train_step(model, optimizer, batch, rate)
    check_close(model.w.detach(), torch.tensor(after), f"w after step {number}", hint=hint)
    check_equal(got, loss, f"the loss returned by step {number}", hint="Return loss.item(), a float.")
### BEGIN HIDDEN TESTS
seed = secrets.randbelow(2**31)
generator = torch.Generator().manual_seed(seed)
package = random_model(seed)
mine = copy.deepcopy(package)


def random_pair() -> tuple[list[int], list[int]]:
    return tuple([draw(2, 19, generator) for _ in range(draw(1, 5, generator))] for _ in range(2))


batches = [PairBatch.of([random_pair() for _ in range(4)], 0, 1) for _ in range(5)]
config = TrainingConfig(steps=5, learning_rate=0.03, schedule=cosine(5, 2), label_smoothing=0.1)
optimizer = Trainer(mine, batches.__getitem__, config).optimizer
expected = Trainer(package, batches.__getitem__, config).train(progress=False)
mine.train()
with without("minillm.training.trainer:Trainer"):
    got = [train_step(mine, optimizer, batches[step], 0.03 * config.schedule(step), 0.1) for step in range(5)]
check(all(isinstance(loss, float) for loss in got), f"train_step returned {got}, and should return floats")
check_close(torch.tensor(got), torch.tensor(expected), f"the losses of five steps (seed {seed})", rtol=1e-5)
for (name, ours), theirs in zip(mine.named_parameters(), package.parameters(), strict=True):
    check_close(ours.detach(), theirs.detach(), f"{name} after five steps (seed {seed})", rtol=1e-4, atol=1e-6)
### END HIDDEN TESTS

# %% [markdown]
# ## Task 7 · Until it is good enough (5 points)
#
# `train_until(step, score, target, every, max_steps)` is the loop around the steps:
#
# - call `step(0)`, `step(1)`, …; each returns a loss;
# - after every `every` steps call `score()`, and stop when it says `target` or more;
# - stop after `max_steps` steps in any case. Return the list of losses.
#
# *By hand:* `every=2`, `target=0.9`, and a score that is 0.5, then 0.9: steps 0, 1, score 0.5, steps 2, 3, score 0.9,
# end. Four losses.


# %% tags=["solution:a2_until"]
def train_until(
    step: Callable[[int], float], score: Callable[[], float], target: float, every: int, max_steps: int
) -> list[float]:
    """Train until the score is reached, or for `max_steps` steps; return the losses."""
    ### BEGIN SOLUTION
    losses: list[float] = []
    while len(losses) < max_steps:
        losses.append(step(len(losses)))
        if len(losses) % every == 0 and score() >= target:
            break
    return losses
    ### END SOLUTION


# %% tags=["tests:a2_until_tests:5"]
from minillm.course.checks import check, check_close, check_equal, without


def check_until(scores: list[float], target: float, every: int, max_steps: int) -> None:
    calls: list[str] = []
    given = iter(scores)

    def step(number: int) -> float:
        calls.append(f"step {number}")
        check(len(calls) <= 10 * max_steps, f"your loop does not end; it began with {calls[:12]}")
        return number / 2

    def score() -> float:
        calls.append("score")
        return next(given, 1.0)

    got = train_until(step, score, target, every, max_steps)
    reached = next((number for number, value in enumerate(scores) if value >= target), len(scores))
    taken = min((reached + 1) * every, max_steps)
    asked = f"scores {scores}, target {target}, every {every}, max_steps {max_steps}:"
    expected = [call for n in range(taken) for call in ([f"step {n}"] + (["score"] if (n + 1) % every == 0 else []))]
    check_equal(calls, expected, f"{asked} calls")
    check_equal(got, [number / 2 for number in range(taken)], f"{asked} the losses")


check_until([0.5, 0.9], target=0.9, every=2, max_steps=100)
check_until([0.5, 0.5, 0.5, 0.5], target=0.9, every=2, max_steps=5)
### BEGIN HIDDEN TESTS
for _ in range(5):
    numbers = random.Random(secrets.randbelow(2**31))
    scores = [numbers.choice([0.0, 0.25, 0.5, 0.75]) for _ in range(20)]
    check_until(scores, numbers.choice([0.25, 0.75]), numbers.randint(1, 4), numbers.randint(1, 12))
### END HIDDEN TESTS

# %% [markdown]
# ## Task 8 · A translator of numbers (15 points)
#
# Nothing more to write. The next cell makes the package's encoder/decoder, takes its blocks out, and puts yours in,
# with the same parameters. `MyBatch` shifts by your `shift` and costs what your `smoothed_loss` says.

# %% tags=["locked:a2_assembly"]
FOUR_DIGITS = dataclasses.replace(
    NUMBERS,
    hidden_size=64,
    num_heads=2,
    intermediate_size=256,
    layers=1,
    steps=360,
    batch_tokens=512,
    learning_rate=4e-3,
    warmup_steps=30,
)


class MyCrossAttention(nn.Module):
    """The package's layer, at work as your `cross_attention` says."""

    def __init__(self, layer: CrossAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return cross_attention(self.layer, x, k, v, mask)


def my_encoder_block(block: TransformerBlock) -> nn.Module:
    norms = (block.attention_norm.norm, block.feed_forward_norm.norm)
    return EncoderBlock(block.attention, block.feed_forward, *norms)


def my_decoder_block(block: CrossAttentionBlock) -> nn.Module:
    norms = (block.attention_norm.norm, block.cross_attention_norm.norm, block.feed_forward_norm.norm)
    return DecoderBlock(block.attention, MyCrossAttention(block.cross_attention), block.feed_forward, *norms)


def check_shape(block: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
    right = isinstance(out, Tensor) and out.shape == inputs[0].shape
    check(right, f"{type(block).__name__} should return a tensor of x's shape, {tuple(inputs[0].shape)}")


@dataclass(frozen=True)
class MyBatch:
    """A batch of the package, shifted and judged by your functions."""

    batch: PairBatch
    start_id: int
    stop_id: int

    def loss(self, model: Seq2Seq, smoothing: float) -> Tensor:
        rows = [[token for token in row if token not in (IGNORED, self.stop_id)] for row in self.batch.targets.tolist()]
        shifted = shift(rows, self.start_id, self.stop_id)
        check(isinstance(shifted, tuple) and len(shifted) == 2, "shift should return two tensors, inputs and labels")
        inputs, labels = shifted
        loss = smoothed_loss(model(self.batch.source, inputs, self.batch.source_lengths), labels, smoothing)
        check(isinstance(loss, Tensor), f"smoothed_loss returned {type(loss).__name__}, and should return a tensor")
        return loss


def wrong_ones(translator: Translator, numbers: Sequence[int]) -> list[str]:
    """What became of the numbers that do not come out right."""
    found = translator.translate_all([english(n) for n in numbers])
    return [
        f"{english(n)!r} became {text[:20]!r}, and should be {chinese(n)!r}"
        for text, n in zip(found, numbers, strict=True)
        if text != chinese(n)
    ]


def train_translator(target: float) -> tuple[Translator, list[float]]:
    """Train your pieces on numbers of up to four digits until `target` of 100 held-out ones come out right."""
    numbers = sample(random.Random(0), 6000, held_out=False, max_digits=4)
    trainer, translator = make_trainer([(english(n), chinese(n)) for n in numbers], FOUR_DIGITS)
    model, config = translator.model, trainer.config
    model.encoder = nn.ModuleList(map(my_encoder_block, model.encoder))
    model.decoder = nn.ModuleList(map(my_decoder_block, model.decoder))
    for block in (*model.encoder, *model.decoder):
        block.register_forward_hook(check_shape)
    held_out = sample(random.Random(1), 100, held_out=True, max_digits=4)
    start_id, stop_id = (translator.tokenizer.token_to_id(token) for token in (START, STOP))

    def step(number: int) -> float:
        batch = MyBatch(trainer.batch_at(number), start_id, stop_id)
        rate = config.learning_rate * config.schedule(number)
        return train_step(model, trainer.optimizer, batch, rate, config.label_smoothing)

    def score() -> float:
        return 1 - len(wrong_ones(translator, held_out)) / len(held_out)

    return translator, train_until(step, score, target, every=40, max_steps=config.steps)


# %% [markdown]
# Now it is trained, on numbers of up to four digits, until 95 of 100 held-out numbers come out without any mistake.
# It takes some ten seconds on two cores. Then it must know **85 %** of other numbers that training never saw.

# %% tags=["tests:a2_translator_tests:15"]
from minillm.course.checks import check, check_close, check_equal, without

closed = (
    "minillm.transformer.blocks:TransformerBlock.forward",
    "minillm.transformer.blocks:CrossAttentionBlock.forward",
    "minillm.transformer.blocks:ResidualNorm.forward",
    "minillm.transformer.multi_head:CrossAttention.forward",
    "minillm.transformer.multi_head:CrossAttention.queries",
    "minillm.training.batching:cross_entropy",
    "minillm.training.trainer:Trainer._take_step",
    "minillm.training.translator:Translator.load",
    "torch.nn.functional:cross_entropy",
)
torch.manual_seed(0)
hint = "Do the checks of tasks 1 to 7 all pass?"


def check_score(translator: Translator, numbers: list[int]) -> None:
    with without(*closed):
        wrong = wrong_ones(translator, numbers)
    score = 1 - len(wrong) / len(numbers)
    said = f"{score:.0%} of {len(numbers)} numbers that it never saw come out right"
    check(score >= 0.85, f"only {said}. {'; '.join(wrong[:2])}. {hint}")
    print(said)


with without(*closed):
    translator, losses = train_translator(target=0.95)
are_losses = isinstance(losses, list) and len(losses) > 0 and all(isinstance(loss, float) for loss in losses)
check(are_losses, "train_until should return the list of losses, and train_step each of them as a float")
check(losses[-1] < 0.3 < losses[0], f"the loss went from {losses[0]} to {losses[-1]}, not below 0.3. {hint}")
check_score(translator, sorted(set(sample(random.Random(2), 400, held_out=True, max_digits=4))))
### BEGIN HIDDEN TESTS
check_score(translator, sorted(set(sample(random.SystemRandom(), 400, held_out=True, max_digits=4))))
### END HIDDEN TESTS

# %% [markdown]
# How the loss fell, and some of what your translator says now (change the numbers):

# %%
plot_losses({"your translator": losses}, title=f"{len(losses)} steps")
plt.show()
for number in (7, 42, 305, 9_042, 6_400):
    print(f"{number:>6,}  {english(number):40} {translator.translate([english(number)])[0]}")

# %% [markdown]
# ## What to hand in
#
# This notebook, saved, under its own name (`a2_transformer.ipynb`). Before you do: restart the kernel and run all
# cells. Do not rename the functions and leave the locked cells as they are.
#
# ## If you want to go on
#
# - **Dropout** (§5.4) falls on each sublayer's output before it is added. Give your blocks an `nn.Dropout`. Does it
#   help here, where there is no end of numbers? Where would it?
# - Make your blocks **post-norm**, as in the paper, and train again with 10 and with 100 steps of warm-up.
# - Nine digits instead of four: what must grow, the model, the steps, or both? (Notebook 04 shows what the package's
#   translator took.)
