# %% [markdown]
# # 05 · Decoder only
#
# The Transformer of 2017 translates: an encoder reads one text, a decoder writes another. Today's language models are
# half of it. This notebook takes the encoder away, loads a real trained model into what is left, and makes it write.
#
# **By the end of this notebook you will be able to**
#
# - say what a decoder-only model keeps of the Transformer of 2017, and count its parameters by hand;
# - load a published checkpoint, and prove that your model computes what the published one computes;
# - read a model's predictions token by token, and measure them with perplexity;
# - choose between greedy decoding, temperature, top-k, top-p and min-p, knowing what each of them cuts;
# - explain how a conversation becomes one text.
#
# **You need** notebooks [01](01_tokens_and_embeddings.ipynb) to [04](04_encoder_decoder.ipynb). No GPU.
#
# **New here**: one text where notebook 04 had two, weights read from a file, and a next token
# that is drawn by chance.
#
# **Time**: about 90 minutes (it runs in about 25 s on two cores).

# %%
import math
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown

import minillm
from minillm.viz import (
    describe,
    distribution,
    entropy_bits,
    explore_sampling,
    plot_against_temperature,
    plot_packed_rows,
    plot_parameter_parts,
    plot_sampling,
    plot_surprise,
    plot_what_stays,
    show_source,
)

# %% [markdown]
# ## 1 · What goes, and what stays
#
# In notebook 04 the source and the target were two texts, so there were two stacks, and cross-attention between them.
# If source and target are put into *one* text, one after the other, a single stack can read the first part and write
# the second. The encoder goes, and with it cross-attention, which has nothing left to look at. (Liu et al. 2018,
# §4.2.3, did this first; Radford et al. 2018, the first GPT, made it the model that everybody knows.)

# %%
plot_what_stays(title="Grey is what goes: the encoder and cross-attention")
plt.show()

# %% [markdown]
# In code, nothing has to be written. The block that is left is the one that notebook 04 used in the *encoder*:

# %%
from minillm.transformer.blocks import TransformerBlock

show_source(TransformerBlock)

# %% [markdown]
# So what makes it a decoder? Only the mask: no token may see a later one. And the mask does not live in the block. It
# is the key/value store that knows it, from the layer's `AttentionSpec`. We build one small model of each kind (random
# weights) and look:

# %%
from minillm.transformer.blocks import CrossAttentionBlock
from minillm.transformer.decoder import Decoder, DecoderConfig, LayerConfig
from minillm.transformer.seq2seq import Seq2Seq, Seq2SeqConfig

both = Seq2Seq(Seq2SeqConfig(100, 32, 2, 64, num_encoder_layers=1, num_decoder_layers=1))
alone = Decoder(DecoderConfig(100, 32, 2, 2, 16, 64, 50, layers=(LayerConfig(),)))

assert type(both.encoder[0]) is type(alone.layers[0]) is TransformerBlock
print("encoder block: causal =", both.config.encoder_specs[0].causal)
print("decoder-only block: causal =", alone.config.attention_specs[0].causal)

old_parts = {name for name, _ in both.decoder[0].named_children()}
new_parts = {name for name, _ in alone.layers[0].named_children()}
assert type(both.decoder[0]) is CrossAttentionBlock
print("left out of the decoder's block:", ", ".join(sorted(old_parts - new_parts)))

# %% [markdown]
# ### One objective
#
# With one text there is one task: after each token, predict the next. For a text $u_1, \dots, u_n$ training maximises
# $\sum_i \log P(u_i \mid u_1, \dots, u_{i-1})$ (Radford et al. 2018, §3.1, eq. 1, there with a limited context); the
# model is **autoregressive**. No labels are needed, and a text of $n$ tokens gives $n - 1$ exercises at once:

# %%
tokenizer = minillm.get_tokenizer("tiny")
pieces = [tokenizer.decode([token]) for token in tokenizer("Once upon a time there was").input_ids]
for count in range(1, len(pieces)):
    print(f"{''.join(pieces[:count])!r:28} → {pieces[count]!r}")

# %% [markdown]
# ## 2 · What has changed since 2017
#
# The blocks stay, but their parts have been improved. In this package no such change is a new class of model. Each is a
# field of one frozen `DecoderConfig`. Let us start from the choices of 2017, in a small size, and make the changes one
# by one.

# %%
from minillm.models.loader import num_parameters
from minillm.transformer.positions import RotaryConfig

config = DecoderConfig(
    vocab_size=1536,
    hidden_size=192,
    num_heads=6,
    num_kv_heads=6,
    head_dim=32,
    intermediate_size=4 * 192,
    max_position_embeddings=512,
    layers=(LayerConfig(),) * 6,
    positions="sinusoidal",
    qkv_bias=True,
    attention_out_bias=True,
    activation="relu",
    gated=False,
    feed_forward_bias=True,
    norm="layer_norm",
    norm_eps=1e-5,
    norm_placement="post",
    final_norm=False,
)

# %%
changes = {
    "pre-norm": {"norm_placement": "pre", "final_norm": True},
    "RMSNorm": {"norm": "rms_norm"},
    "gated SiLU": {"gated": True, "activation": "silu", "intermediate_size": 512},
    "rotary": {"positions": "none", "layers": (LayerConfig(rotary=RotaryConfig(dim=32)),) * 6},
    "grouped heads": {"num_kv_heads": 2},
    "no biases": {"qkv_bias": False, "attention_out_bias": False, "feed_forward_bias": False},
}
print(f"{'as in 2017':14}{num_parameters(Decoder(config)):>10,} parameters")
for name, fields in changes.items():
    config = replace(config, **fields)
    print(f"{name:14}{num_parameters(Decoder(config)):>10,}")

# %% [markdown]
# | change | what it does | from |
# | --- | --- | --- |
# | pre-norm | normalises what enters a sublayer (notebook 04) | Radford et al. 2019; Xiong et al. 2020 |
# | RMSNorm | divides by the root mean square; no mean is taken away, no bias added | Zhang & Sennrich 2019 |
# | gated SiLU | multiplies two projections of the input, one of them through SiLU | Shazeer 2020 |
# | rotary | turns queries and keys instead of adding positions (notebook 02) | Su et al. 2021 |
# | grouped heads | several query heads share one key/value head (notebook 03) | Ainslie et al. 2023 |
# | no biases | matrices only | Chowdhery et al. 2022 (PaLM), §2 |
#
# What is new is the gated network:

# %%
from minillm.transformer.feed_forward import GatedFeedForward

show_source(GatedFeedForward)

# %% [markdown]
# (`twin` asks whether there is a compiled kernel for this operation on this device, and whether it may be used, that
# is, where no gradient is wanted. It computes what the last two lines say.)
#
# Two of the numbers deserve a look. The gated network has three matrices where the plain one had two, so Shazeer makes
# its inner size 2/3 as large: 512 instead of 768, and the count stays nearly the same. And grouped heads save few
# parameters; what they really save is the memory of keys and values, the subject of the next notebook.
#
# ### Every parameter has a place
#
# The result has the sizes of `tiny`, the model of the next section. Count it by hand, one layer first. The packed
# projection makes 6 query heads, 2 key heads and 2 value heads of 32 channels each, out of 192 channels:

# %%
hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
by_hand = {
    "embedding": config.vocab_size * hidden,
    "attention": 6 * (hidden * (6 + 2 + 2) * head + 6 * head * hidden),  # qkv, out
    "feed_forward": 6 * (hidden * 2 * inner + inner * hidden),  # gate and up, down
    "norms": 6 * 2 * hidden + hidden,  # two a layer, one at the end
}
for part, count in by_hand.items():
    print(f"{part:14}{count:>10,}")
print(f"{'together':14}{sum(by_hand.values()):>10,}")
assert sum(by_hand.values()) == sum(p.numel() for p in Decoder(config).parameters())

# %% [markdown]
# There is no line for the output head. It is tied to the embedding table (notebook 01, "One table for two ends").
#
# ### Four families
#
# Published models describe themselves in a file `config.json`, in words that differ from family to family. The package
# translates each into a `DecoderConfig`. Here are the entries that matter of five published files:

# %%
import json

published = json.loads("""
{
  "GPT-2": {
    "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12
  },
  "SmolLM2-135M": {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "tie_word_embeddings": true,
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3,
    "max_position_embeddings": 8192, "rope_theta": 100000
  },
  "Llama-3.2-1B": {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "tie_word_embeddings": true,
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rope_theta": 500000,
    "rope_scaling": {"rope_type": "llama3", "factor": 32, "low_freq_factor": 1, "high_freq_factor": 4,
                     "original_max_position_embeddings": 8192}
  },
  "Qwen3-0.6B": {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "tie_word_embeddings": true,
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960, "rope_theta": 1000000
  },
  "Gemma-3-1B": {
    "architectures": ["Gemma3ForCausalLM"], "vocab_size": 262144,
    "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "max_position_embeddings": 32768, "rope_theta": 1000000, "sliding_window": 512
  }
}
""")

# %% [markdown]
# `translate` finds the family and does the work. To count parameters we need no numbers, only shapes: the "meta" device
# again, as for the paper's base model in notebook 04.

# %%
from minillm.models.loader import translate

show_source(translate)

# %%
configs = {name: translate(raw)[1] for name, raw in published.items()}
with torch.device("meta"):
    empty = {name: Decoder(config) for name, config in configs.items()}


def choices(name):
    c, rotary = configs[name], configs[name].layers[0].rotary
    return {
        "layers × hidden": f"{c.num_layers} × {c.hidden_size}",
        "norms": f"{c.norm}, {c.norm_placement}",
        "positions": c.positions if rotary is None else "rotary",
        "heads: query / key-value": f"{c.num_heads} / {c.num_kv_heads}",
        "norm of q and k": "yes" if c.qk_norm else "–",
        "layers with a window": sum(layer.window is not None for layer in c.layers) or "–",
        "feed-forward": f"{c.activation}{', gated' if c.gated else ''}",
        "biases": "yes" if c.qkv_bias else "–",
        "parameters": f"{num_parameters(empty[name]):,}",
    }


columns = {name: choices(name) for name in configs}
rows = [["", *columns], ["---"] * 6]
rows += [[what, *(str(column[what]) for column in columns.values())] for what in columns["GPT-2"]]
Markdown("\n".join(f"| {' | '.join(row)} |" for row in rows))

# %% [markdown]
# One class runs all five. The table is a short history: learned positions, LayerNorm and biases in 2019; rotary
# positions, RMSNorm and grouped heads since. Qwen3 and Gemma normalise queries and keys as well. Gemma adds a second
# norm behind each sublayer ("sandwich") and lets most layers look back over a short window only. Where do the
# parameters sit?


# %%
def part_of(name):
    """The part of a decoder that a parameter belongs to, by its name."""
    if "norm" in name:
        return "norms"
    words = name.split(".")
    return words[2] if words[0] == "layers" else words[0]


def parts_of(model):
    parts = Counter()
    for name, parameter in model.named_parameters():
        parts[part_of(name)] += parameter.numel()
    return parts


assert parts_of(Decoder(config)) == by_hand
parts = {"tiny": parts_of(Decoder(config))} | {name: parts_of(model) for name, model in empty.items()}
plot_parameter_parts(parts, title="The feed-forward networks hold most; a large vocabulary, up to a third")
plt.show()

# %% [markdown]
# ## 3 · A real checkpoint
#
# So far all weights were random. Now a trained model: `tiny`, which ships in the package in the form in which models
# are published on Hugging Face's hub. That form is a folder: `config.json` says what the model is,
# `model.safetensors` holds its weights by name, `tokenizer.json` its tokenizer.

# %%
from minillm.models.loader import read_config
from minillm.models.source import resolve

folder = resolve("tiny")
raw = read_config(folder)
family, from_file = translate(raw)
print({key: raw[key] for key in ("architectures", "hidden_size", "num_key_value_heads", "hidden_act")})
assert from_file == config
print("config.json describes exactly the model that we built above")

# %% [markdown]
# The weights carry the names of Hugging Face's Llama. Here are those of the first layer:

# %%
from minillm.models.checkpoint import iterate_weights

stored = dict(iterate_weights(folder))
for name, tensor in stored.items():
    if "layers.0." in name:
        print(f"{name:50} {list(tensor.shape)}")

# %% [markdown]
# There are three matrices `q_proj`, `k_proj` and `v_proj`, and our layer has one, `attention.qkv` (notebook 03,
# "Heads"). So the loader **packs** them: each published matrix fills some rows of ours. The family's table says which:

# %%
for published_name, ours in family.weights.items():
    if "self_attn" in published_name or "mlp" in published_name:
        print(f"{published_name:30} → {ours}")

# %% [markdown]
# The brackets name a part of a packed matrix. We load the model and check that its rows are what the file holds.

# %%
model = minillm.load_model("tiny", dtype="float32", device="cpu")
qkv = model.layers[0].attention.qkv.weight
matrices = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
published_rows = torch.cat([torch.cat(list(stored[name].blocks())) for name in matrices])
assert torch.equal(qkv, published_rows.float())
rows = {name.split(".")[-2]: stored[name].shape[0] for name in matrices}
plot_packed_rows(qkv, rows, title="Three published matrices are the rows of one")
plt.show()

# %% [markdown]
# ### Is it the same model?
#
# A wrong transpose or a forgotten norm does not crash. It gives a model that writes a little worse than it should. So
# we compare with an independent implementation: Hugging Face's `transformers` reads the same folder.

# %%
import transformers

transformers.utils.logging.disable_progress_bar()
theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

prompt = "Once upon a time there was a kind girl called Mia."
tokens = tokenizer(prompt).input_ids
with torch.inference_mode():
    difference = (model(torch.tensor([tokens])) - theirs(torch.tensor([tokens])).logits).abs().max()
assert difference < 1e-4
print("largest difference of two logits: below 1e-4")

# %% [markdown]
# Not zero: two programs add the same numbers in another order, and float32 rounds each sum. Next, 40 tokens of greedy
# text from both. (`ContiguousCache` is the store that remembers earlier tokens, so that each step reads one token only;
# the next notebook is about it.)

# %%
from minillm.cache.contiguous import ContiguousCache
from minillm.models.tokenizer import stop_token_ids
from minillm.transformer.generation import generate
from minillm.transformer.sampling import GREEDY, Sampling

stops = stop_token_ids("tiny", tokenizer)


def write(tokens, sampling=GREEDY, count=40):
    """The tokens that the model puts behind `tokens`."""
    store = ContiguousCache.for_decoder(model, max_len=len(tokens) + count)
    steps = generate(model, [tokens], store, max_tokens=count, sampling=sampling, stop_ids=stops)
    return [step[0] for step in steps]


ours = write(tokens)
reference = theirs.generate(torch.tensor([tokens]), max_new_tokens=40, do_sample=False)
reference = [token for token in reference[0, len(tokens) :].tolist() if token not in stops]
assert ours == reference
print(f"{len(ours)} greedy tokens, all equal")

# %% tags=["nbval-ignore-output"]
print(prompt + tokenizer.decode(ours))

# %% [markdown]
# That is the whole proof that the package gives for every family: same logits within rounding, same tokens. And the
# same lines load a model fifty times the size that has read a good part of the internet. (`minillm pull smollm2-135m`
# brings it to your disk; without it, this cell says so.)

# %% tags=["nbval-ignore-output"]
from minillm.models.source import is_on_disk

if is_on_disk("smollm2-135m"):
    larger = minillm.load_model("smollm2-135m", dtype="float32", device="cpu")
    its_tokenizer = minillm.get_tokenizer("smollm2-135m")
    asked = its_tokenizer("The capital of France is").input_ids
    store = ContiguousCache.for_decoder(larger, max_len=len(asked) + 20)
    written = [step[0] for step in generate(larger, [asked], store, max_tokens=20)]
    print(f"{sum(p.numel() for p in larger.parameters()):,} parameters:", its_tokenizer.decode(asked + written))
else:
    print("SmolLM2 is not on this disk; to see it: minillm pull smollm2-135m, then run this cell again")

# %% [markdown]
# ## 4 · What the model knows, token by token
#
# A decoder gives a prediction after *every* token, not only after the last. Because no token sees a later one, the
# predictions for the beginning of a text do not depend on how it goes on:

# %%
whole = tokenizer(prompt + " She had a red ball, and she loved it very much.").input_ids
with torch.inference_mode():
    of_whole, of_start = model(torch.tensor([whole]))[0], model(torch.tensor([tokens]))[0]
assert whole[: len(tokens)] == tokens
assert torch.allclose(of_whole[: len(tokens)], of_start, atol=1e-4)
print(f"{len(whole)} tokens → logits {list(of_whole.shape)}: one prediction after each")

# %% [markdown]
# So one pass over a finished text tells, for each token, how likely the model thought it *before* seeing it. This is
# **teacher forcing**, which you met in training (notebook 04): the model is fed the true text, whatever it would have
# written itself. Here is a story that `tiny` cannot have seen, because its combination of hero, thing and event was
# kept out of training:

# %%
from minillm.training.stories import tell

story = tell(random.Random("a fresh story"), held_out=True)
story_tokens = tokenizer(story.text).input_ids


def probabilities_of(tokens):
    """What the model gave to each token but the first, before it saw it."""
    with torch.inference_mode():
        given = model(torch.tensor([tokens]))[0, :-1].softmax(dim=-1)
    return given[range(len(tokens) - 1), tokens[1:]]


probabilities = probabilities_of(story_tokens)  # [tokens − 1]

# %%
pieces = [tokenizer.decode([token]) for token in story_tokens]
title = "White: the model was sure. Orange: it could not know"
plot_surprise(pieces, [float("nan"), *probabilities.tolist()], title=title)
plt.show()

# %% [markdown]
# Read it as the model does, from left to right, and ask at each orange spot: could *you* have known? The colour of the
# thing, the first mention of a name, the place: the author drew them by lot. Nobody can know them. Once drawn, they
# come back later, and then a good model looks back and is sure. Let us measure it over 25 fresh stories:

# %%
from minillm.training import story_parts

names, colours = {*story_parts.GIRLS, *story_parts.BOYS}, {*story_parts.COLOURS}
surprises = {"name, first time": [], "name again": [], "colour": [], "everything else": []}
for number in range(25):
    ids = tokenizer(tell(random.Random(f"fresh {number}"), held_out=True).text).input_ids
    words = [tokenizer.decode([token]).strip() for token in ids]
    for place, p in enumerate(probabilities_of(ids).tolist(), start=1):
        word, kind = words[place], "everything else"
        if word in names:
            kind = "name again" if word in words[:place] else "name, first time"
        elif word in colours:
            kind = "colour"
        surprises[kind].append(-math.log2(p))

# %%
means = {kind: sum(bits) / len(bits) for kind, bits in surprises.items()}
for kind, bits in surprises.items():
    print(f"{kind:18}{len(bits):>6,} tokens, {means[kind]:5.2f} bits each on average")
print(f"\n{len(colours)} equally likely colours: {math.log2(len(colours)):.2f} bits")
assert means["name again"] < means["name, first time"] - 1
assert means["everything else"] < 1

# %% [markdown]
# A surprise of $b$ bits is a probability of $2^{-b}$. The last line is what a fair draw among the colours of this
# world costs on average; no model can do better on a colour that nothing before it gives away.
#
# ### Perplexity
#
# The mean of $-\ln p$ over a text is the training loss, the **cross-entropy**. Its exponential is the **perplexity**: a
# model that hesitates between $k$ equally likely tokens at every step has perplexity $k$.

# %%
from torch.nn.functional import cross_entropy


def perplexity(tokens):
    with torch.inference_mode():
        logits = model(torch.tensor([tokens]))[0]
    return math.exp(cross_entropy(logits[:-1], torch.tensor(tokens[1:])))


assert abs(perplexity(story_tokens) - math.exp(-probabilities.log().mean())) < 1e-3
shuffled = random.Random(0).sample(story_tokens, len(story_tokens))
outside = tokenizer("The central bank raised its interest rate by half a percent on Thursday.").input_ids
texts = {"the fresh story": story_tokens, "its tokens, shuffled": shuffled, "a newspaper": outside}
measured = {name: perplexity(ids) for name, ids in texts.items()}
for name, value in {**measured, "knowing nothing": config.vocab_size}.items():
    print(f"{name:22}{float(f'{value:.2g}'):>12,g}")

assert measured["the fresh story"] < 5
assert measured["its tokens, shuffled"] > config.vocab_size
assert measured["a newspaper"] > config.vocab_size

# %% [markdown]
# Two lines are above the perplexity of somebody who knows nothing and guesses evenly: the model is not merely unsure
# there, it is confidently wrong. (Hence two digits only; the others mean nothing.) Perplexity is always the perplexity
# *of a model on a text*. And since it counts tokens, it compares models only if they have the same tokenizer.
#
# ## 5 · Sampling
#
# The model gives a distribution; which token do we write? **Greedy** decoding takes the likeliest. It gives one text
# for each prompt, always the same. To get different ones, we must draw. As an example we take the moment in which a
# story may go anywhere: its first paragraph is told, the second begins.

# %%
beginning = (
    "Once upon a time there was a kind girl called Mia. She had a red ball, and she loved it very much. "
    "One sunny morning Mia went to the park with her friend Tom.\n\n"
)
beginning_tokens = tokenizer(beginning).input_ids
with torch.inference_mode():
    logits = model(torch.tensor([beginning_tokens]))[0, -1]  # [vocab]
plot_sampling(logits, tokenizer, Sampling(), title="What comes first in the second paragraph?")
plt.show()

# %% [markdown]
# Are these numbers any good? For once we can check: this world is generated, so we can ask it. We tell 2,000 new
# stories, call the hero Mia and the friend Tom, and count how their second paragraphs begin.

# %%
rng, begins = random.Random("count"), Counter()
for _ in range(2000):
    first, second = tell(rng).text.split("\n\n")[:2]
    hero, friend = list(dict.fromkeys(word for word in re.findall(r"\w+", first) if word in names))[:2]
    word = re.match(r"\w+|\W", second)[0]
    renamed = {hero: "Mia", friend: "Tom"}.get(word, word) + second[len(word) : 40]
    begins[tokenizer(renamed).input_ids[0]] += 1

own = logits.softmax(dim=-1)
for token, count in begins.most_common(8):
    name = repr(tokenizer.decode([token]))
    print(f"{name:12} {count / 2000:6.1%} of stories, {own[token]:6.1%} says the model")
distance = sum(abs(begins[token] / 2000 - float(own[token])) for token in range(config.vocab_size)) / 2
print(f"shares of probability that would have to move to make both equal: {distance:.0%}")
assert distance < 0.4

# %% [markdown]
# Not equal, as the last line tells. The two names get too little, and Tom's nearly nothing. But all other beginnings
# that happen often are likely. To come nearer is what training on the next token aims at, and why drawing from the
# distribution just as it is (temperature 1, nothing cut) gives texts like those of the corpus.
#
# ### Temperature
#
# Divide all logits by a number $T$, the **temperature**, before the softmax. $T < 1$ sharpens, $T > 1$ flattens; the
# order of the tokens never changes.

# %%
from minillm.transformer.sampling import apply_temperature

show_source(apply_temperature)

# %%
samplings = [Sampling(temperature=temperature) for temperature in (0.5, 1, 2)]
plot_sampling(logits, tokenizer, *samplings, title="Low temperature sharpens, high temperature flattens")
plt.show()
tails = [float(1 - distribution(logits, sampling).topk(16).values.sum()) for sampling in samplings]
print("the last row:", ", ".join(f"{tail:.1%}" for tail in tails))
assert tails == sorted(tails)

# %% [markdown]
# Look at the last row. At temperature 2 the hundreds of tokens that have no row of their own, most of them nonsense
# here, have gained weight. One number says how open a distribution is: its **entropy** $-\sum p \log_2 p$, in bits. It
# is 0 when one token has everything, and $\log_2 n$ when $n$ tokens share equally. We draw it for three places in a
# story:

# %%
places = {
    "Once upon …": "Once upon",
    "a girl called …": "Once upon a time there was a kind girl called",
    "second paragraph …": beginning,
}
at_places = {}
for label, text in places.items():
    with torch.inference_mode():
        at_places[label] = model(torch.tensor([tokenizer(text).input_ids]))[0, -1]
temperatures = [number / 10 for number in range(1, 41)]
curves = {
    label: [float(entropy_bits(distribution(at, Sampling(temperature)))) for temperature in temperatures]
    for label, at in at_places.items()
}

# %%
everything = math.log2(config.vocab_size)
limit = (f"all {config.vocab_size:,} tokens equal", everything)
title = "Hot enough, every distribution becomes noise"
plot_against_temperature(temperatures, curves, ylabel="entropy (bits)", limit=limit, title=title)
plt.show()
assert all(warm > cool - 1e-4 for curve in curves.values() for cool, warm in pairwise(curve))

# %% [markdown]
# After "Once upon" there is one way to go on, and it takes a high temperature to make the model doubt it. At the name
# there are as many as the world has girls' names: where many tokens are almost equally good, even a low temperature
# leaves several of them.
#
# ### Greedy, warm, hot
#
# What does it do to texts? The seeds are fixed, so that you and we see the same; change them.

# %% tags=["nbval-ignore-output"]
for seed, temperature in enumerate((0, 0.7, 1, 2, 3)):
    written = write(tokens, Sampling(temperature, seed=seed), count=45)
    print(f"— temperature {temperature}: …{tokenizer.decode(written)}\n")

# %% [markdown]
# At temperature 1 the stories differ and hold together. At 2 and 3 they fall apart. There is a simple way to measure
# that here. This world has few words, and fewer ways to put one behind another: two neighbouring words that stand in
# none of thousands of stories were hardly learned from one.


# %%
def pairs_of(text):
    """Every two neighbouring words."""
    return list(pairwise(re.findall(r"[a-z]+", text.lower())))


rng = random.Random("pairs")
known = {pair for _ in range(3000) for pair in pairs_of(tell(rng).text)}
fresh_pairs = pairs_of(story.text)
known_in_fresh = sum(pair in known for pair in fresh_pairs) / len(fresh_pairs)
print(f"{len(known):,} pairs; of those in the fresh story, {known_in_fresh:.0%} are known")
assert known_in_fresh > 0.9


# %% tags=["nbval-ignore-output"]
def known_share(sampling, stories=6, count=30):
    """The share of known pairs in what the model writes, in percent."""
    store = ContiguousCache.for_decoder(model, stories, len(tokens) + count)
    steps = generate(model, [tokens] * stories, store, max_tokens=count, sampling=sampling)
    written = [pairs_of(tokenizer.decode(list(row))) for row in zip(*steps, strict=True)]
    return 100 * sum(pair in known for text in written for pair in text) / sum(map(len, written))


hotter = [0.5, 1, 2, 3]
shares = {"nothing cut": [known_share(Sampling(temperature, seed=0)) for temperature in hotter]}
for temperature, share in zip(hotter, shares["nothing cut"], strict=True):
    print(f"temperature {temperature}: {share:.0f}%")
assert shares["nothing cut"][0] > 90 > 50 > shares["nothing cut"][3]

# %% [markdown]
# ### Cut the tail
#
# The trouble is not any single bad token. It is that there are so many of them: hundreds of tokens with a tiny
# probability each sum to something, a text has hundreds of steps, and one bad token spoils what follows. So cut the
# tail off before drawing. Three ways are common; each is a pure function from logits to logits that puts −∞ where a
# token is cut.
#
# **Top-k** (Fan et al. 2018, §5.4) keeps the $k$ likeliest tokens:

# %%
from minillm.transformer.sampling import keep_min_p, keep_top_k, keep_top_p

show_source(keep_top_k)

# %% [markdown]
# **Top-p**, or nucleus sampling (Holtzman et al. 2019, §3.1), keeps the fewest tokens that have the share $p$ of the
# probability together:

# %%
show_source(keep_top_p)

# %% [markdown]
# **Min-p** (Nguyen et al. 2024, §3) keeps the tokens that are at least $p$ times as likely as the likeliest. In logits
# a factor is a difference, hence the logarithm:

# %%
show_source(keep_min_p)

# %% [markdown]
# Side by side on our distribution. What is cut has no colour, and what is kept shares its probability:

# %%
cuts = [Sampling(top_k=5), Sampling(top_p=0.8), Sampling(min_p=0.1)]
plot_sampling(logits, tokenizer, *cuts, title="Three ways to cut the tail")
plt.show()

for cut in cuts:
    is_kept = distribution(logits, cut) > 0
    assert torch.allclose(distribution(logits, cut)[is_kept], own[is_kept] / own[is_kept].sum(), atol=1e-5)
print("what is kept keeps its proportions")

# %% [markdown]
# On one distribution you could tune any of the three to do what another does. The difference shows when the
# distribution changes, as it does at every step. Here are the numbers of tokens kept at our three places, the same
# settings everywhere:

# %%
print(f"{'kept with':>30}", *(f"{describe(cut).split(', ')[1]:>10}" for cut in cuts))
for label, at in at_places.items():
    counts = [int((distribution(at, cut) > 0).sum()) for cut in cuts]
    print(f"{label:>30}", *(f"{count:>10}" for count in counts))
sure = at_places["Once upon …"]
assert int((keep_top_k(sure, 5) > -math.inf).sum()) == 5
assert int((keep_top_p(sure, 0.8) > -math.inf).sum()) == 1

# %% [markdown]
# Top-k keeps five everywhere: four too many where there is one way to go on, and far too few names. That is Holtzman et
# al.'s argument against it (§3.2). Top-p and min-p follow the distribution. Top-p counts from the top until a share is
# reached, and so may leave out one of several equally good tokens (look at the names: it keeps most, not all). Min-p
# compares with the best, and treats equals as equals.
#
# ### The order matters
#
# `transform` puts the steps together, in the order of vLLM; `Sampling` calls it with its numbers:

# %%
from minillm.transformer.sampling import transform

show_source(transform)

# %% [markdown]
# Temperature comes first, so top-p and min-p look at the *flattened* distribution. Applied the other way round, they
# would cut what the model itself finds unlikely, and temperature would then act on the rest. Top-k does not care: it
# only needs the order of the tokens.


# %% tags=["nbval-ignore-output"]
def kept(logits):
    return int((logits > -math.inf).sum())


hot = apply_temperature(logits, 2.0)
for name, cut, p in (("top-p", keep_top_p, 0.8), ("min-p", keep_min_p, 0.1)):
    after, before = kept(cut(hot, p)), kept(cut(logits, p))
    print(f"{name} {p} keeps {after} tokens behind temperature 2, {before} before it")

# %%
assert kept(keep_top_k(hot, 5)) == kept(keep_top_k(logits, 5)) == 5
assert kept(keep_top_p(hot, 0.8)) > kept(keep_top_p(logits, 0.8))
assert kept(keep_min_p(hot, 0.1)) >= kept(keep_min_p(logits, 0.1))

# %% [markdown]
# The same settings in two programs may thus mean two things. vLLM, transformers and this package apply temperature
# first. Now let the cuts show what they are for: the share of known pairs of words against the temperature.

# %%
for name, cut in {"top-p 0.9": {"top_p": 0.9}, "min-p 0.1": {"min_p": 0.1}}.items():
    shares[name] = [known_share(Sampling(temperature, seed=0, **cut)) for temperature in hotter]
for place in (2, 3):
    assert shares["min-p 0.1"][place] > shares["top-p 0.9"][place]
    assert shares["min-p 0.1"][place] > shares["nothing cut"][place]

# %%
title = "Cutting the tail keeps hot texts in the world"
plot_against_temperature(hotter, shares, ylabel="known pairs of words (%)", title=title)
plt.show()

# %% [markdown]
# This is the picture that Nguyen et al. argue with, in our small world: min-p lets the temperature rise further before
# the text falls apart. Top-p fails earlier, because at a high temperature its share $p$ of a flat distribution is made
# of hundreds of tokens.
#
# ### The draw
#
# What is left is one draw. A **generator** with a seed makes it repeatable; drawn often enough, the shares are the
# probabilities:

# %%
chosen = Sampling(temperature=0.8, top_p=0.9, seed=7)
draws = chosen.choose(logits.expand(5000, -1), chosen.generator())
again = chosen.choose(logits.expand(5000, -1), chosen.generator())
assert torch.equal(draws, again)
shares_drawn = torch.bincount(draws, minlength=config.vocab_size) / 5000
assert (shares_drawn - distribution(logits, chosen)).abs().max() < 0.03
print("5,000 draws, twice the same, in the right proportions")

# %% [markdown]
# ## 6 · Try it yourself
#
# One sampling, as a figure: grey is the model's own distribution, blue what we draw from.

# %%
mixed = Sampling(temperature=1.5, top_k=12, min_p=0.2)
plot_sampling(logits, tokenizer, mixed, title="Temperature, top-k and min-p together")
plt.show()

# %% [markdown]
# With a running kernel, here it is with sliders; above the picture stands a text drawn with these settings. Predict
# before you move:
#
# 1. Temperature 3, nothing cut: what happens to the text, and to the last bar? How small a min-p repairs the text?
# 2. Temperature 0: what does the seed change?
# 3. Top-k 1, at any temperature: which other setting gives the same text?

# %% tags=["nbval-ignore-output"]
explore_sampling(model, beginning, tokenizer=tokenizer, stop_ids=stops)

# %% [markdown]
# <details><summary>Answers</summary>
#
# 1. The text becomes a mixture of pieces of words; "the others" have most of the probability. A min-p of 0.1 to 0.3
#    repairs it mostly.
# 2. Nothing: at temperature 0 there is no draw.
# 3. Temperature 0. One token is left, so every draw takes it.
#
# </details>
#
# ## 7 · A conversation is one text
#
# A chat is a list of messages, and a decoder reads one text. The chat template (notebook 01, "The tokenizer of `tiny`")
# turns the one into the other. `tiny` uses ChatML, as Qwen and SmolLM2 do. The prompt ends where the assistant's turn
# begins; all that the model does is go on.

# %%
greeting = [{"role": "user", "content": "Hello!"}]
print(tokenizer.apply_chat_template(greeting, tokenize=False, add_generation_prompt=True))


# %%
def ask(messages):
    """The model's greedy answer to each message, every one a conversation of its own."""
    template = tokenizer.apply_chat_template
    talks = [[{"role": "user", "content": message}] for message in messages]
    texts = [template(talk, tokenize=False, add_generation_prompt=True) for talk in talks]
    prompts = tokenizer(texts).input_ids
    store = ContiguousCache.for_decoder(model, len(prompts), max(map(len, prompts)) + 30)
    steps = generate(model, prompts, store, max_tokens=30, stop_ids=stops)
    rows = zip(*steps, strict=True)
    return [tokenizer.decode([token for token in row if token is not None]) for row in rows]


# %% tags=["nbval-ignore-output"]
print(ask(["Hello!"])[0])

# %% [markdown]
# The model stops by itself: it has learned to write `<|im_end|>` at the end of its turn, and `generate` stops there.
# Now we give it the fresh story of section 4, and ask.

# %% tags=["nbval-ignore-output"]
print(story.text)
questions = story.questions[:5]
answers = ask([f"{story.text}\n\n{question.text}" for question in questions])
for question, answer in zip(questions, answers, strict=True):
    verdict = "✓" if answer == question.answer else f"✗ {question.answer}"
    print(f"\n{question.text}\n  {answer}   {verdict}")

# %% [markdown]
# Nothing but attention connects the question with the story: to answer, some heads must look back to the right word.
# (Notebook 03 went looking for heads that look back.) The same questions without the story:

# %% tags=["nbval-ignore-output"]
answers = ask([question.text for question in questions])
for question, answer in zip(questions, answers, strict=True):
    print(question.text, "→", answer)

# %% [markdown]
# Over several stories, two questions each:

# %% tags=["nbval-ignore-output"]
told = [tell(random.Random(f"asked {number}"), held_out=True) for number in range(12)]
asked = [(one.text, question) for one in told for question in one.questions[:2]]
right = [question.answer for _, question in asked]
with_story = ask([f"{text}\n\n{question.text}" for text, question in asked])
without = ask([question.text for _, question in asked])

right_with = sum(found == answer for found, answer in zip(with_story, right, strict=True))
right_without = sum(found == answer for found, answer in zip(without, right, strict=True))
print(f"{len(asked)} questions, right word for word:")
print(f"{right_with} with the story, {right_without} without")

# %%
assert right_with > len(asked) / 2 > len(asked) / 4 > right_without

# %% [markdown]
# The knowledge is in the context, not in the weights. That is how large models work with documents as well, and it is
# why the **context length**, the most tokens that a model can look at, and the memory that it costs matter so much.
#
# ## What to take along
#
# | | what it does | keeps |
# | --- | --- | --- |
# | greedy | the likeliest token | 1 token |
# | temperature $T$ | logits divided by $T$ | everything |
# | top-k | cuts by rank | the same number everywhere |
# | top-p | cuts by cumulated probability | few where the model is sure, many where not |
# | min-p | cuts by probability relative to the best | likewise; equals are treated alike |
#
# And: a decoder-only model is a stack of the encoder's blocks with a causal mask; a family of models is a row of
# configuration; a model is loaded rightly when its logits are those of an independent implementation.
#
# ## Sources
#
# - Liu et al. 2018, "Generating Wikipedia by Summarizing Long Sequences"; Radford et al. 2018, "Improving Language
#   Understanding by Generative Pre-Training" (GPT); 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2)
# - Zhang & Sennrich 2019, "Root Mean Square Layer Normalization"; Shazeer 2020, "GLU Variants Improve Transformer";
#   Chowdhery et al. 2022, "PaLM: Scaling Language Modeling with Pathways"; the others of section 2's table: notebooks
#   02 to 04
# - Fan et al. 2018, "Hierarchical Neural Story Generation" (top-k); Holtzman et al. 2019, "The Curious Case of Neural
#   Text Degeneration" (top-p); Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM
#   Outputs"; Tang et al. 2024, "Top-nσ: Not All Logits Are You Need"
# - Keskar et al. 2019, "CTRL: A Conditional Transformer Language Model for Controllable Generation"
#
# ## Exercises
#
# Replace each `None`; when the answer is right, the cell says so.
#
# **1.** `tiny` has 6 query heads and 2 key/value heads. How many parameters more would it have with 6 key/value heads?

# %%
more = None

if more is not None:
    with torch.device("meta"):
        full = Decoder(replace(config, num_kv_heads=6))
    assert more == num_parameters(full) - num_parameters(model), "which rows of qkv grow, in how many layers?"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `more = 6 * (4 + 4) * 32 * 192`: in each of 6 layers, four more key heads and four more value heads, each 32 rows of
# 192 columns. That is 294,912.
#
# </details>
#
# **2.** Write the template of section 7 by hand: the text of a conversation (a list of messages), ending where the
# assistant's turn begins.


# %%
def chat_text(messages):
    return None


talk = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello!"}]
talk += [{"role": "user", "content": "Tell me a story."}]
if chat_text(talk) is not None:
    expected = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert chat_text(talk) == expected, f"it should be {expected!r}"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def chat_text(messages):
#     turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
#     return "".join(turns) + "<|im_start|>assistant\n"
# ```
#
# </details>
#
# **3.** *Top-nσ* (Tang et al. 2024) keeps the tokens whose logit is at most $n$ standard deviations (of all logits)
# below the largest. Write it as a pure function, −∞ where a token is cut. Before you run the check: does it matter
# whether temperature is applied before it or after?


# %%
def keep_top_n_sigma(logits, n):
    return None


some = torch.tensor([4.0, 3.0, 1.0, -2.0, -6.0])
if keep_top_n_sigma(some, 1) is not None:
    assert [kept(keep_top_n_sigma(some, n)) for n in (0.5, 1, 2)] == [2, 3, 4], "how far below the largest?"
    for temperature in (0.5, 3):
        cooled = keep_top_n_sigma(logits / temperature, 2)
        assert torch.equal(cooled == -math.inf, keep_top_n_sigma(logits, 2) == -math.inf)
    print("right, and the same tokens at every temperature")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def keep_top_n_sigma(logits, n):
#     threshold = logits.amax(dim=-1, keepdim=True) - n * logits.std(dim=-1, keepdim=True)
#     return logits.masked_fill(logits < threshold, -math.inf)
# ```
# Temperature divides the differences and the standard deviation alike, so the same tokens stay.
#
# </details>
#
# **4.** A **repetition penalty** (Keskar et al. 2019, §4.1) makes tokens less likely that have been written
# already. In the form that most programs use, the logits of such tokens are divided by the penalty where they are
# positive and multiplied by it where they are negative. (Why not divide always?) `seen` is a list of token ids.


# %%
def penalise(logits, seen, penalty):
    return None


mine = penalise(logits, tokens, 1.3)
if mine is not None:
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty=1.3)
    reference = processor(torch.tensor([tokens]), logits[None].clone())[0]
    assert torch.allclose(mine, reference), "each seen token once, whichever way its sign says"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def penalise(logits, seen, penalty):
#     penalised = logits.clone()
#     values = logits[seen]
#     penalised[seen] = torch.where(values > 0, values / penalty, values * penalty)
#     return penalised
# ```
# Dividing a negative logit would bring it nearer to 0, and make the token *more* likely. (That the effect depends on
# where 0 lies, though a softmax does not, is a blemish of the method.)
#
# </details>
#
# ---
# **Back:** [04_encoder_decoder](04_encoder_decoder.ipynb) · **Next:** [06_kv_cache](06_kv_cache.ipynb): why generating
# a token need not read the whole text again, and what remembering costs.
