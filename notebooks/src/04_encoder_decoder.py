# %% [markdown]
# # 04 · Encoder and decoder
#
# This is the model of "Attention Is All You Need" (Vaswani et al. 2017), the one that gave the Transformer its name.
# It translates: an **encoder** reads the source, a **decoder** writes the target and looks at what the encoder read.
# We follow the paper's order, train a small one while you watch, and look inside a better one.
#
# **By the end of this notebook you will be able to**
#
# - draw the whole stack from memory, and say what each piece is for, because you have seen what breaks without it;
# - account for the parameters of the paper's base model, all 63.1 million;
# - train a translator, score it, search with it greedily and with beams, and see which words it looked at.
#
# **You need** notebooks [01](01_tokens_and_embeddings.ipynb) to [03](03_attention.ipynb). No GPU.
#
# **New here**: the layers between which attention stands, attention from one text to another, and training.
#
# **Time**: about 90 minutes (it runs in about 70 s on two cores).

# %%
import dataclasses
import random

import matplotlib.pyplot as plt
import torch
from torch import nn

from minillm.training.numbers import chinese, english, sample
from minillm.training.translator import number_pairs
from minillm.viz import (
    gloss,
    plot_alignment,
    plot_exact_match,
    plot_losses,
    plot_schedules,
    plot_signal,
    plot_stack,
    show_source,
)

# %% [markdown]
# ## 1 · A translation task that needs no download
#
# The paper translates English to German, on 4.5 million sentence pairs and eight GPUs. We have a laptop, so we choose a
# language that can be generated: numbers in words, English to Chinese.

# %%
for number in (7, 42, 305, 11_042, 120_000, 100_000_005):
    print(f"{number:>11,}   {english(number):45} {chinese(number)}")

# %% [markdown]
# Small as it is, this is a real translation, not a table to learn by heart:
#
# - **Words do not line up.** English groups digits by three (thousand, million), Chinese by four (万 is ten thousand,
#   亿 a hundred million). "One hundred and twenty thousand" is 十二万: *twelve* ten-thousands.
# - **Something appears from nothing.** A gap between digits is silent in English and spoken in Chinese: 零.
# - **Something disappears**: "and" has no counterpart.
#
# And it can be scored exactly: every number has one right spelling. A tenth of all numbers, chosen by a hash of the
# number, is **held out**: training never sees them, so that knowing them means having understood.

# %%
pairs = number_pairs(30_000)
print(f"{len(pairs):,} pairs to train on; the first three:")
for source, target in pairs[:3]:
    print(f"  {source}\n  → {target}")

# %% [markdown]
# ## 2 · The stack
#
# From the bottom up (the paper's Figure 1): tokens become vectors; each encoder block lets every token look at every
# other and then thinks about each token by itself; each decoder block does the same for the target, and in between
# looks at the encoder's result. One table turns the last vector back into scores for every token.

# %%
plot_stack()
plt.show()

# %% [markdown]
# Now the pieces, one by one, in the paper's order.
#
# ### Residual connections and norms (§3.1)
#
# Around each sublayer f stands a **residual connection**: the block does not replace x, it adds to it. And a
# **LayerNorm** (Ba et al. 2016) keeps the sizes in hand: subtract the mean, divide by the standard deviation, then
# scale and shift by learned numbers.

# %%
from minillm.transformer.norms import LayerNorm

x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1
mean = x.mean(dim=-1, keepdim=True)
variance = x.var(dim=-1, keepdim=True, unbiased=False)
by_hand = (x - mean) / (variance + 1e-5).sqrt()
assert torch.allclose(by_hand, LayerNorm(16)(x), atol=1e-5)
print("our four lines equal the package's LayerNorm (whose scale is 1 and shift 0 before training)")

# %% [markdown]
# Where does the norm go? The paper puts it *after* the addition: norm(x + f(x)), "post-norm". Most later models put it
# *before* the sublayer: x + f(norm(x)), "pre-norm" (Xiong et al. 2020), because then an untouched path leads from the
# top of the network to its bottom, and it trains without coaxing. The package has both, in one class:

# %%
from minillm.transformer.blocks import CrossAttentionBlock, ResidualNorm, TransformerBlock

show_source(ResidualNorm)

# %% [markdown]
# See what they do to a signal. We send random vectors through 24 random feed-forward layers: with nothing around them,
# with a residual connection only, and with both kinds of norm.

# %%
from minillm.transformer.feed_forward import FeedForward

torch.manual_seed(0)
layers = [FeedForward(64, 256, "relu") for _ in range(24)]
norms = {placement: ResidualNorm(placement, lambda: LayerNorm(64)) for placement in ("post", "pre")}
steps = {
    "nothing": lambda x, layer: layer(x),
    "residual only": lambda x, layer: x + layer(x),
    "residual, post-norm": norms["post"],
    "residual, pre-norm": norms["pre"],
}

# %%
sizes, differences = {}, {}
with torch.no_grad():
    for name, step in steps.items():
        x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
        sizes[name] = [float(x.std())]
        for layer in layers:
            x = step(x, layer)
            sizes[name].append(float(x.std()))
        differences[name] = float(x.std(dim=0).mean())  # between the 100 vectors, a channel at a time
plot_signal(sizes)
plt.show()
for name, values in sizes.items():
    print(f"{name:20} size {values[-1]:.2f}, of which differs from one vector to another: {differences[name]:.2f}")

# %% [markdown]
# Without a residual connection the signal is gone after a few layers: what comes out is the layers' own biases, and it
# is the same whatever went in. With one it survives. Post-norm holds its size at exactly 1; pre-norm lets it grow
# slowly, and norms only what each sublayer reads.

# %%
assert differences["nothing"] < 1e-6 < 0.5 < differences["residual only"]
assert abs(sizes["residual, post-norm"][-1] - 1) < 0.01

# %% [markdown]
# ### Attention, three times (§3.2.3)
#
# The same multi-head attention as in notebook 03 stands in three places. Two are **self-attention**: the queries come
# from the text that they look at.
#
# | where | queries from | keys and values from | may see |
# | --- | --- | --- | --- |
# | encoder | source | source | everything |
# | decoder | target | target | nothing later |
# | cross-attention | target | the encoder's output | everything |
#
# The encoder's block and the decoder-only model's (notebook 05) are one class; whether attention is causal is for the
# key/value store to know.

# %%
show_source(TransformerBlock.forward)

# %%
show_source(CrossAttentionBlock.forward)

# %% [markdown]
# ### The feed-forward network (§3.3)
#
# Attention moves information between positions; the feed-forward network works on each position by itself: widen four
# times, cut off what is negative, narrow again. "Position-wise" is easily checked:

# %%
feed_forward = FeedForward(16, 64, "relu")
x = torch.randn(1, 5, 16)
together = feed_forward(x)
one_by_one = torch.cat([feed_forward(x[:, [position]]) for position in range(5)], dim=1)
assert torch.allclose(together, one_by_one, atol=1e-6)
print("five positions together are five positions one by one")

# %% [markdown]
# ### Embeddings, positions, output (§3.4, §3.5)
#
# One table serves three times: for the source, for the target, and read the other way round for the output scores. Its
# rows are drawn small (standard deviation 1/√d), so that the output scores start small; as an input they are multiplied
# by √d, which makes them as large as the sinusoids of notebook 02 that are added.

# %%
from minillm.transformer.seq2seq import Seq2Seq, Seq2SeqConfig

show_source(Seq2Seq.embed)

# %% [markdown]
# ### All together
#
# `encode` reads the source once and keeps, for every decoder layer, the keys and values that cross-attention needs:
# they never change while the target is written. `hidden` is the decoder.

# %%
show_source(Seq2Seq.encode)

# %%
show_source(Seq2Seq.hidden)

# %% [markdown]
# ## 3 · Sixty-three million numbers
#
# The paper's base model: d = 512, 8 heads, 6 + 6 layers, an inner width of 2048, one vocabulary of 37,000 tokens. We
# build it on the "meta" device, where tensors have shapes and no memory, and add up.

# %%
config = Seq2SeqConfig.base()
with torch.device("meta"):
    base = Seq2Seq(config)
d, inner = config.hidden_size, config.intermediate_size
attention = 4 * (d * d + d)  # query, key, value, output: a matrix and a bias each
feed_forward_size = (d * inner + inner) + (inner * d + d)
norm = 2 * d
encoder_layer = attention + feed_forward_size + 2 * norm
decoder_layer = 2 * attention + feed_forward_size + 3 * norm

# %%
table = {
    "embedding table": config.vocab_size * d,
    "6 encoder layers": 6 * encoder_layer,
    "6 decoder layers": 6 * decoder_layer,
}
for name, count in table.items():
    print(f"{name:18} {count:>12,}   {count / sum(table.values()):4.0%}")
total = sum(table.values())
assert total == sum(parameter.numel() for parameter in base.parameters())
print(f"{'together':18} {total:>12,}   ({total / 1e6:.1f} million; the paper's table says 65)")

# %% [markdown]
# ## 4 · Training
#
# ### What is learned from one pair
#
# The decoder is given the target **shifted right**: a start token, then the target without its end. At each position it
# must say the next token; the causal mask keeps it from looking. So one pass learns from every position at once. This
# is called *teacher forcing*.

# %%
from minillm.training.translator import NUMBERS, SMALL_NUMBERS, START, STOP, Translator, make_trainer

trainer, small = make_trainer(pairs, SMALL_NUMBERS)
tokenizer = small.tokenizer
source, target = pairs[0]
written = tokenizer.encode(target)
print("decoder reads :", [tokenizer.decode([token]) for token in [tokenizer.token_to_id(START), *written]])
print("and must write:", [tokenizer.decode([token]) for token in [*written, tokenizer.token_to_id(STOP)]])

# %% [markdown]
# (� is a part of a character: the rarer ones are still written as bytes.) The tokenizer is the byte-pair encoding of
# notebook 01, trained on these pairs; no token crosses a Chinese character.
# Source and target share it, as in the paper (§5.1).
#
# ### Batches (§5.1)
#
# Sequences of like length go together, so that little of a batch is padding. A batch knows its own loss:

# %%
batch = trainer.batch_at(0)
padding = 1 - sum(batch.source_lengths) / batch.source.numel()
print(f"{len(batch.source)} pairs, sources padded to {batch.source.shape[1]} tokens: {padding:.0%} is padding")
show_source(type(batch).loss)

# %% [markdown]
# ### The learning rate (§5.3)
#
# The paper raises the rate for 4,000 steps and then lets it fall with 1/√step. We use pre-norm and a cosine
# (Loshchilov & Hutter 2017), which ends at zero: right when the number of steps is known beforehand.

# %%
from minillm.training.schedules import cosine, inverse_sqrt

plot_schedules({"inverse square root (paper)": inverse_sqrt(40), "cosine": cosine(400, 40)}, 400)
plt.show()

# %% [markdown]
# ### Not too sure (§5.4)
#
# Two habits of the paper keep a large model from learning its training pairs by heart. **Dropout** (Srivastava et al.
# 2014) sets a random tenth of each sublayer's output to zero while training (`dropout` in `ResidualNorm` above).
# **Label smoothing** (Szegedy et al. 2016, §7) asks for a little less than certainty: the right token should get
# $1 - \varepsilon$, and $\varepsilon$ is spread over all tokens. What a prediction costs then, if the right one of five
# tokens has the logit below and the others 0:

# %%
from minillm.training.batching import cross_entropy

logits, target_token = torch.zeros(1, 1, 5), torch.tensor([[2]])
for logit in (0, 2, 4, 8, 16):
    logits[..., 2] = logit
    plain, smoothed = (float(cross_entropy(logits, target_token, smoothing)) for smoothing in (0.0, 0.1))
    print(f"logit {logit:2d}: loss {plain:.3f}, smoothed by 0.1: {smoothed:.3f}")

# %% [markdown]
# Without smoothing, more certainty is always better. With it there is a best certainty, and beyond it the loss rises.
# There is no end of our pairs and each has exactly one right answer, so our translator uses neither habit; the
# package's settings for sentences of people (`CORPUS` in `translator.py`) use both.
#
# ### The loop
#
# A step of training, from the package: take the batch, compute the loss, follow the gradient (AdamW; Loshchilov &
# Hutter 2019), no further than `clip_norm`.

# %%
from minillm.training.trainer import Trainer

show_source(Trainer._take_step)

# %% [markdown]
# Now train, live. This one is small, so that it takes less than a minute.

# %% tags=["nbval-ignore-output"]
losses = trainer.train()
parameters = sum(parameter.numel() for parameter in small.model.parameters())
print(f"{parameters:,} parameters, {len(losses)} steps, {trainer.seconds:.0f} s")
plot_losses({"small translator": losses}, title="The loss of each step of training, live")
plt.show()

# %%
factor = 2
assert factor * sum(losses[-20:]) < sum(losses[:20])
print(f"the loss has fallen to less than 1/{factor} of what it was")

# %% [markdown]
# What does it say? Here are held-out numbers, of which it has never seen one. Training live gives a little different
# weights on every machine, so this output is yours alone.

# %% tags=["nbval-ignore-output"]
unseen = sample(random.Random(5), 8, held_out=True)
for number, text in zip(unseen, small.translate_all([english(n) for n in unseen]), strict=True):
    print(f"{number:>11,}  {text:22} {'right' if text == chinese(number) else 'not ' + chinese(number)}")

# %% [markdown]
# ## 5 · The same for longer
#
# The package ships a translator of the same kind, larger and trained longer (`python -m minillm.training.translator
# numbers`, some minutes on two cores).

# %%
import json

from minillm.training.translator import NUMBER_TRANSLATOR, exact_match

shipped = Translator.load()
card = json.loads((NUMBER_TRANSLATOR / "evaluation.json").read_text())
found = exact_match(shipped, 300)
print(f"{card['parameters']:,} parameters; {card['numbers']:,} held-out numbers, {card['all']:.1%} exactly right")
print(f"on 300 of them here: {found.all:.0%}, and {found.inner_zero:.0%} of those with 零")
assert found.all > 0.95

# %% tags=["nbval-ignore-output"]
live = exact_match(small, 300)
plot_exact_match({"trained live": live.by_digits, "shipped": found.by_digits})
plt.show()
print(f"trained live: {live.all:.0%} exactly right")

# %% [markdown]
# ## 6 · What it looks at
#
# For every target token, cross-attention spreads a weight of 1 over the source. Averaged over the heads of a layer, it
# draws the **alignment**: which English words each Chinese character was made of (Bahdanau et al. 2015 drew the first
# such pictures). Each row is the token being *written*, so the first row is what the model looked at when it had only
# seen the start token.

# %%
from minillm.transformer.seq2seq import cross_attention_weights


def alignment(translator, text):
    """(weights [layers, target, source], source pieces, target pieces) of a greedy translation."""
    tokenizer = translator.tokenizer
    source = tokenizer.encode(text)
    target = tokenizer.encode(translator.translate([text])[0])
    read = [tokenizer.token_to_id(START), *target]
    weights = cross_attention_weights(translator.model, source, read).mean(dim=1)
    pieces = [tokenizer.decode([token]).strip() for token in source]
    return weights, pieces, [*(gloss(tokenizer.decode([token])) for token in target), "stop"]


# %%
weights, source_pieces, target_pieces = alignment(shipped, english(120_305))
print(english(120_305), "→", shipped.translate([english(120_305)])[0])
for layer, layer_weights in enumerate(weights):
    plot_alignment(layer_weights, source_pieces, target_pieces, title=f"layer {layer}, mean of its heads")
    plt.show()

# %% [markdown]
# Read along a row. (What is rarer is several tokens: "twenty" is cut into pieces, and 零 into bytes, �.) To write
# shí (十, ten) and èr (二, two), the model looks at the first half of the source, for "one hundred and twenty
# *thousand*" is "*twelve* ten-thousands"; to write sān (三, three) and wǔ (五, five), at the second. Count it, as a
# mean over the layers:

# %%
half = source_pieces.index("thousand") + 1
halves = {"十": slice(half), "二": slice(half), "三": slice(half, None), "五": slice(half, None)}
for character, columns in halves.items():
    row = weights.mean(dim=0)[target_pieces.index(gloss(character))]
    seen, even = float(row[columns].sum()), len(source_pieces[columns]) / len(source_pieces)
    print(f"{gloss(character):8} {seen:4.0%} of the weight is on its half; spread evenly it would be {even:.0%}")
    assert seen > 0.75

# %% [markdown]
# Weights are not the whole story: what a head passes on depends on its values too, and the layers below have mixed the
# source already. But the order shows.

# %% [markdown]
# ## 7 · Searching for a target
#
# The model gives probabilities; a **search** makes a target of them. *Greedy* search takes the likeliest token each
# time and never looks back. *Beam* search keeps the `num_beams` best beginnings (the paper: 4 beams, §6.1). Longer
# targets have more factors below 1, so scores are divided by a length penalty (Wu et al. 2016, §7).

# %%
from minillm.transformer.search import beam_search, greedy_search

show_source(greedy_search)

# %%
text = english(70_042)
start_id, stop_id = (shipped.tokenizer.token_to_id(token) for token in (START, STOP))
ids = {"start_id": start_id, "stop_id": stop_id, "max_tokens": 24}
(beams,) = beam_search(shipped.model, [shipped.tokenizer.encode(text)], num_beams=4, **ids)
for tokens, score in beams:
    print(f"{score:7.2f}  {shipped.tokenizer.decode(tokens)}")
assert beams[0].tokens == greedy_search(shipped.model, [shipped.tokenizer.encode(text)], **ids)[0]

# %% [markdown]
# A model that is sure of itself gains nothing: the best beam is the greedy target, and the others trail far behind. The
# half-trained model is less sure. Count how often beams change its answer, and whether for the better:

# %% tags=["nbval-ignore-output"]
numbers = sample(random.Random(6), 120, held_out=True)
texts = [english(n) for n in numbers]
greedy, beam = small.translate_all(texts), small.translate_all(texts, num_beams=4)
right = [[a == chinese(n) for a, n in zip(answers, numbers, strict=True)] for answers in (greedy, beam)]
changed = sum(a != b for a, b in zip(greedy, beam, strict=True))
print(f"{changed} of {len(numbers)} answers changed; right: greedy {sum(right[0])}, beams {sum(right[1])}")

# %% [markdown]
# Both searches can use a **KV cache** (notebook 06): keys and values of the target so far are kept, those of the source
# were computed once in `encode`. The result is the same, the work is less:

# %%
from minillm.cache.contiguous import ContiguousCache

sources = [shipped.tokenizer.encode(text) for text in texts[:20]]
cache = ContiguousCache.for_decoder(shipped.model, len(sources), ids["max_tokens"])
assert greedy_search(shipped.model, sources, kv=cache, **ids) == greedy_search(shipped.model, sources, **ids)
print("20 targets, the same with and without a cache")

# %% [markdown]
# ## 8 · What each piece is for
#
# The honest way to learn what something does is to take it away. We train the same model four times for the same number
# of steps on the same batches: whole; without residual connections; without norms; without positions. (Shorter numbers
# and a smaller model, so that it takes seconds; three layers each, so that depth matters.)


# %%
class Bare(nn.Module):
    """A sublayer with its norm and without its residual connection."""

    def __init__(self, inner):
        super().__init__()
        self.norm = inner.norm

    def forward(self, x, sublayer):
        return sublayer(self.norm(x))


def without_residuals(model):
    for block in (*model.encoder, *model.decoder):
        for name, child in list(block.named_children()):
            if isinstance(child, ResidualNorm):
                setattr(block, name, Bare(child))


# %%
def without_norms(model):
    for module in list(model.modules()):
        if isinstance(module, ResidualNorm):
            module.norm = nn.Identity()
    model.encoder_norm = model.decoder_norm = nn.Identity()


def without_positions(model):
    model.embed = lambda tokens, positions: model.embedding(tokens) * model.config.hidden_size**0.5


# %% tags=["nbval-ignore-output"]
rng = random.Random(0)
short = [(english(n), chinese(n)) for n in sample(rng, 8000, held_out=False, max_digits=4)]
shape = {"hidden_size": 64, "num_heads": 2, "intermediate_size": 256, "layers": 3}
tried = dataclasses.replace(NUMBERS, **shape, steps=150, batch_tokens=1024)
curves = {}
for name, take_away in (
    ("whole", lambda model: None),
    ("no residuals", without_residuals),
    ("no norms", without_norms),
    ("no positions", without_positions),
):
    trainer, translator = make_trainer(short, tried)
    take_away(translator.model)
    trainer = Trainer(translator.model, trainer.batch_at, trainer.config)
    curves[name] = trainer.train()
plot_losses(curves, title="The same training with one piece taken away")
plt.show()

# %%
last = {name: sum(values[-20:]) / 20 for name, values in curves.items()}
assert last["whole"] < 0.7 * min(last["no residuals"], last["no positions"])
print("the whole model has learned more than the one without residuals and the one without positions")

# %% tags=["nbval-ignore-output"]
print({name: f"{loss:.2f}" for name, loss in last.items()})

# %% [markdown]
# These are the losses of the last 20 steps, yours beside ours. What is behind them:
#
# - **Without residual connections** least is learned: gradients must pass every sublayer, and nothing of the token
#   itself reaches the top.
# - **Without positions** the model sees a bag of words. It learns which characters occur, but
#   "two hundred and five" and "five hundred and two" are the same to it.
# - **Without norms** such a small model begins far worse, and then learns as well as the whole one, if not better.
#   Norms buy depth and higher learning rates: try six layers, or `learning_rate=5e-3`.
#
# ## What to take along
#
# - An encoder reads the whole source once; a decoder writes the target token by token and looks at both.
# - Every sublayer adds to what it got: x + f(x). Norms keep the sizes in hand, before (today) or after (the paper).
# - Training is teacher forcing: one pass, every position a question, the mask keeps it honest.
# - Cross-attention shows which words a word was made of; search makes a target of probabilities.
#
# ## Sources
#
# - Vaswani et al. 2017, "Attention Is All You Need": section signs without a name are its own
# - Ba et al. 2016, "Layer Normalization"; Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture"
# - Loshchilov & Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts" (cosine); 2019, "Decoupled Weight
#   Decay Regularization" (AdamW)
# - Srivastava et al. 2014, "Dropout"; Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision"
# - Bahdanau et al. 2015, "Neural Machine Translation by Jointly Learning to Align and Translate"
# - Wu et al. 2016, "Google's Neural Machine Translation System"; Papineni et al. 2002, "BLEU"
#
# ## Exercises
#
# Replace each `None`; when the answer is right, the cell says so.
#
# **1.** The paper's *big* model has d = 1024, an inner width of 4096 and 16 heads. How many million parameters is that
# with the same vocabulary? Make its `Seq2SeqConfig`. (The paper's table says 213.)

# %%
big = None
if big is not None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in Seq2Seq(big).parameters())
    assert round(count / 1e6) == 214, f"{count / 1e6:.1f} million"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `big = Seq2SeqConfig(37_000, hidden_size=1024, num_heads=16, intermediate_size=4096)`. The number of heads changes
# nothing: more heads are smaller heads.
#
# </details>
#
# **2.** Beam search with one beam is greedy search. Check it on the 20 `sources` above, with the shipped model: make a
# list of 20 token lists.

# %%
one_beam = None
if one_beam is not None:
    assert one_beam == greedy_search(shipped.model, sources, **ids)
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `one_beam = [found[0].tokens for found in beam_search(shipped.model, sources, num_beams=1, **ids)]`
#
# </details>
#
# **3.** Padding must change nothing. `rows` holds "seven" and a long number, padded to one width with token 0. Get from
# `shipped.model.encode` the keys of the first layer for both, `[2, heads, width, head_dim]`, so that those of "seven"
# are what they are for "seven" alone.

# %%
short, long = (shipped.tokenizer.encode(text) for text in ("seven", english(999_999_999)))
rows = torch.tensor([[*short, *[0] * (len(long) - len(short))], long])
keys = None
if keys is not None:
    with torch.inference_mode():
        alone = shipped.model.encode(torch.tensor([short])).keys[0]
    apart = float((alone[0] - keys[0, :, : len(short)]).abs().max())
    assert apart < 1e-4, f"{apart:.2g} apart: who told the encoder which tokens are real?"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# with torch.inference_mode():
#     keys = shipped.model.encode(rows, [len(short), len(long)]).keys[0]
# ```
# Without the lengths, "seven" looks at the padding, and its keys are others.
#
# </details>
#
# **To go on**: a corpus of your own. Download a language from manythings.org/anki and run
# `python -m minillm.training.translator corpus deu-eng.zip --tokenize 13a`. It reports BLEU (Papineni et al. 2002; by
# `sacrebleu`). What does label smoothing change? It costs perplexity and gains BLEU in the paper; in yours? (In Python:
# `make_trainer(pairs, dataclasses.replace(CORPUS, label_smoothing=0.0))`.)
#
# ---
# **Back:** [03_attention](03_attention.ipynb) · **Next:** [05_decoder_only](05_decoder_only.ipynb): leave out the
# encoder, train on all text there is, and you have a language model.
