# %% [markdown]
# # 13 · Making it fast
#
# The loop of notebook 05 and the engine of notebook 12 write the same tokens with the same weights. One of them is
# many times faster. This notebook goes the way from one to the other once more, one stage at a time, and measures what
# each stage is worth, here, on your machine. And it asks at each stage how much is left: a machine can read only so
# many bytes and multiply only so many numbers a second, and nothing that we do will change that.
#
# **By the end of this notebook you will be able to**
#
# - say from two measurements how fast a model could be on a machine, alone and in a batch;
# - tell what each optimisation removes: arithmetic, passes over the weights, calls, or bytes;
# - round weights to 8 and to 4 bits by hand, say what they take then, and measure what that costs in quality;
# - find out how much of an engine's step is not the model;
# - decide what to do next, and what would be in vain.
#
# **You need** notebooks [06](06_kv_cache.ipynb) (arithmetic intensity, the roofline), [09](09_paged_attention.ipynb)
# (kernels) and [11](11_continuous_batching.ipynb) (the engine's step). No GPU.
#
# **New here**: weights that are laid out anew, and weights of 8 and 4 bits. All else you have built; new is that each
# stage is measured against the machine's limit.
#
# **Time**: about 75 minutes (it runs in about 30 s on two cores).

# %%
import random
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minillm import LLM, SamplingParams, get_tokenizer, load_model
from minillm.bench.limits import measure_rates
from minillm.cache.contiguous import ContiguousCache
from minillm.kernels.cpu import decoder_layers
from minillm.models.loader import cpu_has_bfloat16, resolve_dtype
from minillm.training.stories import tell
from minillm.transformer import linear
from minillm.transformer.decoder import Decoder
from minillm.transformer.generation import generate
from minillm.transformer.kv import NoCache, PaddedBatch
from minillm.transformer.linear import Int4Linear, Int8Linear, PackedLinear, pack, quantize
from minillm.viz import (
    Machine,
    forward_bytes,
    forward_flops,
    matrix_weights,
    plot_gains,
    plot_lines,
    plot_parts,
    plot_reached,
    plot_roofline,
    plot_rounding,
    published_model,
    show_part,
    show_source,
)

with LLM("tiny", dtype="float32", device="cpu", num_gpu_blocks_override=16):
    pass  # compiles the kernels, and lets Numba start its threads, which sets PyTorch's number of them too
torch.set_num_threads(1)
model = load_model("tiny", dtype="float32", device="cpu")

# %% [markdown]
# Everything here runs on one core. A second one would make most of it faster, and everything harder to compare, since
# two cores wait for each other, and for whatever else your computer is doing. All times are yours and differ from run
# to run; look at proportions. Where we claim something, a cell checks it.
#
# ## 0 · Where the time must go
#
# To write a token, each weight of the model is multiplied once and added once: two FLOPs. To be multiplied, it has to
# come from memory: four bytes in float32. Notebook 06 drew what follows from this for an H100 and for an imagined
# laptop. Now for the machine before you. `measure_rates` reads half a gigabyte, and multiplies two large matrices, and
# takes the times:

# %%
show_source(measure_rates)

# %% tags=["nbval-ignore-output"]
rates = measure_rates(torch.float32)
machine = Machine("this machine, one core", rates.matrix_flops, rates.read_bandwidth)
print(f"reads     {machine.bandwidth / 1e9:6.1f} GB a second")
print(f"computes  {machine.flops / 1e9:6.1f} GFLOPs a second")
print(f"ridge at  {machine.ridge:6.1f} FLOPs a byte")

# %% [markdown]
# Work that does fewer FLOPs for each byte than the **ridge** waits for memory; work that does more waits for arithmetic
# (Williams et al. 2009). Where does our work stand? It depends on how many sequences write together, because they share
# the reading of the weights:

# %%
smollm = published_model("SmolLM2-135M")
batches = [1, 2, 4, 8, 16, 32, 64, 128]


def intensity(decoder, batch, dtype=torch.float32, keys=88):
    """FLOPs a byte when so many sequences write a token each."""
    return forward_flops(decoder, 1, keys, batch) / forward_bytes(decoder, 1, keys, batch, dtype)


assert round(intensity(model, 1), 1) == 0.5, "two FLOPs for four bytes"

# %% tags=["nbval-ignore-output"]
curves = {
    "tiny, float32": [intensity(model, batch) for batch in batches],
    "SmolLM2-135M, float32": [intensity(smollm, batch) for batch in batches],
    "SmolLM2-135M, bfloat16": [intensity(smollm, batch, torch.bfloat16) for batch in batches],
}
labels = {"xlabel": "sequences that write together, 88 keys each", "ylabel": "FLOPs a byte", "scale": "log"}
title = "More sequences, or fewer bytes for a number: more FLOPs a byte"
plot_lines(batches, curves, **labels, levels={"ridge": machine.ridge}, title=title)
plt.show()

# %% [markdown]
# One sequence is far below the ridge, and in a batch the lines climb towards it. So there are two different problems.
# **Alone**, the bytes of the weights are all that counts. **Together**, arithmetic takes over at some size of the
# batch. An optimisation may help with one and not with the other.
#
# Here is our work on the machine's roof. The first mark is the loop that keeps nothing and computes the whole text for
# each token. It does not only have the *most* FLOPs a byte, it can also reach the most FLOPs a second. That is no
# merit, as we shall see: the FLOPs are the same ones again and again.

# %%
PROMPT, NEW, MANY = 64, 48, 16
KEYS = PROMPT + NEW // 2  # in the middle of the answer


def whole_text_flops(length):
    """A pass over the whole text; logits are wanted for its last token only."""
    return forward_flops(model, length, length) - 2 * (length - 1) * model.embedding.weight.numel()


flops = {"loop": whole_text_flops(KEYS), "alone": forward_flops(model, 1, KEYS)}
print(f"FLOPs for a token: {flops['loop'] / 1e6:.0f} million without a store, {flops['alone'] / 1e6:.1f} with one")

# %% tags=["nbval-ignore-output"]
places = {
    "the whole text again": flops["loop"] / forward_bytes(model, KEYS, KEYS, dtype=torch.float32),
    "one sequence": intensity(model, 1),
    "16 sequences": intensity(model, 16),
}
plot_roofline([machine], places, title="Where the stages of this notebook stand, and what they could reach")
plt.show()

# %% [markdown]
# From a place on the roof follows the least time of a token: its FLOPs divided by what the roof allows. Our workload
# will have prompts of 64 tokens and answers of 48, so each token written also has its share of a prompt, which stands
# on the flat part. Together they make a limit in tokens a second:


# %%
def limit(batch):
    """Tokens a second of `tiny` in float32 when every byte comes from memory and nothing else takes time."""
    writing = flops["alone"] / machine.attainable(intensity(model, batch))
    reading = whole_text_flops(PROMPT) / machine.flops / NEW
    return 1 / (writing + reading)


# %% tags=["nbval-ignore-output"]
print(f"one sequence: at most {limit(1):7,.0f} tokens a second")
print(f"16 sequences: at most {limit(16):7,.0f}")
assert limit(16) > limit(1)
assert round(4 * matrix_weights(model) / 1e6) == 11
assert round(4 * matrix_weights(smollm) / 1e9, 1) == 0.5

# %% [markdown]
# (One reservation. `tiny` has 11 MB of weights, which may well stay in the processor's cache between two tokens,
# and a cache is faster than memory. So the limit for one sequence is not a hard one here; you may see it passed. For
# SmolLM2, with half a gigabyte, it holds.)
#
# ## 1 · The naive loop
#
# The workload: 16 beginnings of stories, 64 tokens each, and 48 tokens to write for each of them, greedily, so that
# every stage has to write the same. The time of the prompts counts, too. `record` keeps the better of two runs,
# because whatever disturbs a measurement makes it slower.

# %%
tokenizer = get_tokenizer("tiny")
prompts = [tokenizer(tell(random.Random(number)).text).input_ids[:PROMPT] for number in range(MANY)]
measured = {}  # (stage, sequences) → tokens a second


def record(stage, write, sequences):
    """Let `write` answer the first prompts, twice."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        answers = write(prompts[:sequences])
        seconds.append(time.perf_counter() - start)
    measured[stage, sequences] = NEW * sequences / min(seconds)
    return answers


# %% [markdown]
# The first engine of the course is the loop of notebook 05. Without a store it feeds the whole text for every token:

# %%
show_part(generate.__wrapped__, "for _ in range", "rows = [[*row")


# %%
def loop(some, make_store):
    """One prompt after the other."""
    return [[token for (token,) in generate(model, [one], make_store(), max_tokens=NEW)] for one in some]


# %% tags=["nbval-ignore-output"]
naive = record("1 everything again", partial(loop, make_store=lambda: None), 1)
print(f"{measured['1 everything again', 1]:,.0f} tokens a second")
print(tokenizer.decode(naive[0]))

# %% [markdown]
# ## 2 · Keep the keys and values
#
# Notebook 06: a token's keys and values never change, so keep them. One line differs. It removes **arithmetic**, and
# the more the longer the text is:

# %% tags=["nbval-ignore-output"]
kept = record("2 keys and values kept", partial(loop, make_store=lambda: ContiguousCache.for_decoder(model)), 1)
assert kept == naive, "the same tokens"
rate = measured["2 keys and values kept", 1]
print(f"{rate:,.0f} tokens a second, {flops['loop'] / flops['alone']:.0f} times fewer FLOPs")

# %% [markdown]
# Is it as many times faster? Hardly. The pass over one token does a small fraction of the arithmetic and costs far
# more than that fraction: it still reads all weights, and calls PyTorch as often. To be sure of the direction, we
# compare at 256 tokens, in turn, best of five:


# %%
def pass_over(start, count, store):
    """Seconds of one pass over `count` tokens behind `start` others."""
    tokens, positions = torch.zeros(1, count, dtype=torch.long), torch.arange(start, start + count)[None]
    begin = time.perf_counter()
    with torch.inference_mode():
        store.begin(PaddedBatch((start,), (count,)))
        model.logits(model.hidden(tokens, positions, store)[:, -1])
    return time.perf_counter() - begin


# %% [markdown]
# (`begin` tells the store which tokens come, as in notebook 06.)

# %% tags=["nbval-ignore-output"]
store, nothing = ContiguousCache.for_decoder(model), NoCache(model.config.attention_specs)
trials = [(pass_over(0, 256, nothing), pass_over(255, 1, store)) for _ in range(5)]
again, one = (1000 * min(times) for times in zip(*trials, strict=True))
print(f"a token at position 256: {again:.1f} ms against {one:.1f} ms")
assert one < again

# %% [markdown]
# ## 3 · Many at once
#
# 16 sequences that take turns read the weights 16 times where once would do. The engine of notebook 11 puts them into
# one step. First in its plain form: paged attention in PyTorch (`attention_backend="reference"`), nothing prepared
# (`enforce_eager=True`). The cache of prefixes is off here, or the second run of a measurement would find its prompts
# computed.

# %%
tiny = partial(LLM, "tiny", device="cpu", enable_prefix_caching=False, num_gpu_blocks_override=256)
greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)


def answers_of(llm, some):
    return [output.outputs[0].token_ids for output in llm.generate(some, greedy, use_tqdm=False)]


def record_engine(stage, llm):
    """Alone and together; the answers of all."""
    record(stage, partial(answers_of, llm), 1)
    return record(stage, partial(answers_of, llm), MANY)


# %% tags=["nbval-ignore-output"]
plain = tiny(dtype="float32", attention_backend="reference", enforce_eager=True)
expected = record_engine("3 many at once", plain)
assert expected[0] == naive[0], "still the same tokens"
alone, together = (measured["3 many at once", sequences] for sequences in (1, MANY))
print(f"{alone:,.0f} tokens a second alone, {together:,.0f} together: {together / alone:.1f} times as many")
assert together > alone

# %% [markdown]
# This is the largest step of all for whoever serves many, and it is worth nothing to a single user. Alone, the engine
# may even be slower than the loop: a scheduler, block tables and a gather come on top.
#
# ## 4 · Fewer and better calls: kernels
#
# What does a single sequence wait for? Let us count how often one step calls PyTorch, as in notebook 10 (section 9).
# Four operations we leave out: they are what PyTorch makes of handing a tensor over to Numba, and compute nothing.
# (Numba's own functions are not PyTorch's and are not counted either. There are a handful in each layer.)


# %%
HANDING_OVER = {"to", "detach", "resolve_conj", "resolve_neg"}


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.names[name] += name not in HANDING_OVER
        return func(*args, **(kwargs or {}))


# %%
def calls_of_a_step(llm):
    """Operations of PyTorch in one decode step of one sequence."""
    llm.engine.add_request("counted", prompts[0], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    llm.engine.step()  # the prompt
    with Calls() as calls:
        llm.engine.step()
    llm.engine.abort("counted")
    return calls.names


# %% tags=["nbval-ignore-output"]
before = calls_of_a_step(plain)
print(f"{before.total():,} calls for one token; {before['linear']} of them are products with weights")
print("most frequent:", ", ".join(f"{name} {count}" for name, count in before.most_common(8)))

# %% [markdown]
# Only the matrix products read weights. All else together moves a few kilobytes, and yet each call costs its fixed
# price of a microsecond or several. So write what lies between the products as few compiled functions. Notebook 09 has
# built the largest of them, paged attention in Numba. First that one alone (and RMSNorm), without fused operations:

# %%
numba = tiny(dtype="float32", attention_backend="numba", enforce_eager=True)
kv = numba.engine.runner.kv
whole_backend = kv.backend
kv.backend = whole_backend._replace(rotate_and_write=None)
assert not kv.fuses

# %% tags=["nbval-ignore-output"]
assert record_engine("4a kernels", numba) == expected
unfused = calls_of_a_step(numba)
print(f"{unfused.total():,} calls for one token")

# %% [markdown]
# **Fusing** goes further: where one operation only writes what the next one reads, make them one. Notebook 10 (section
# 9) has shown the two such pairs of every layer, and `run_layers`, which the engine runs on a CPU as well. With them:

# %% tags=["nbval-ignore-output"]
kv.backend = whole_backend
assert kv.fuses
assert record_engine("4b kernels, fused", numba) == expected
after = calls_of_a_step(numba)
print(f"{after.total():,} calls for one token, of {before.total():,}")
assert after.total() < unfused.total() < before.total()

# %% [markdown]
# The tokens are the same. What has gone is calls, and small tensors that were written only to be read once.
#
# ## 5 · Weights in the right order
#
# Now the matrix products themselves. A processor multiplies in tiles: some rows at a time by some columns at a time,
# with vector instructions that want their 8 or 16 numbers side by side. The weights lie as they were published, row by
# row. Whoever multiplies must either rearrange them, in each call, or read them against the grain. But weights never
# change, so rearrange them once:

# %%
show_source(PackedLinear)

# %% [markdown]
# Is that faster? It depends on the processor, and on what PyTorch uses for its own `F.linear` there. So the engine
# does not believe, it tries, on a large layer, when it starts:

# %%
show_source(linear.packing_pays)

# %% [markdown]
# An engine prepares more than that, unless `enforce_eager=True` forbids it. We take the other two things away for now:

# %%
packed = tiny(dtype="float32", attention_backend="numba")  # enforce_eager=False is the default
decoder = packed.engine.runner.decoder
laid_out = [layer for layer in decoder.modules() if isinstance(layer, PackedLinear)]
in_place, gathered = [layer.few for layer in laid_out], decoder.gathered
decoder.gathered = None
for layer in laid_out:
    layer.few = None

# %% tags=["nbval-ignore-output"]
assert record_engine("5a weights laid out", packed) == expected
print("here it pays" if laid_out else "here it does not pay: weights stay as they are")

# %% [markdown]
# For a batch, the products are most of a step, and a better product is felt. For one row there is less to win: each
# weight is read, multiplied once, and gone. So for one row the question is how well it is *read*. oneDNN's product is
# made for many rows, and reads at half of what the memory gives. The order itself is a good one, though: 64 outputs'
# weights for the first input, then for the second, and so on. A loop that takes one number of x at a time, multiplies
# it with 64 weights, and adds them to 64 sums in registers, goes straight through the memory. The layout is oneDNN's
# own affair and differs between processors, so the layer tries at the start whether this loop's product is oneDNN's:

# %%
show_source(PackedLinear._for_few_rows)

# %% tags=["nbval-ignore-output"]
for layer, view in zip(laid_out, in_place, strict=True):
    layer.few = view
assert record_engine("5b few rows read in place", packed) == expected
print(f"{sum(view is not None for view in in_place)} of {len(laid_out)} layers are read in place here")

# %% [markdown]
# ### One call for all layers
#
# Now the products are faster, and what lies between them weighs more. Section 4 made few calls of many. For few
# tokens one can go to the end: the whole pass through the layers as *one* compiled function, which calls the kernels
# that we know, one after the other. This is its loop over the layers:

# %%
show_part(decoder_layers._layers, "_add_and_normalise(by_many", "multiply(threads, _matrix(x, weight[DOWN])")

# %% tags=["nbval-ignore-output"]
decoder.gathered = gathered
assert record_engine("5c all layers in one call", packed) == expected
at_last = calls_of_a_step(packed)
print(f"{at_last.total():,} calls of PyTorch for one token, of {after.total():,} in section 4")
assert gathered is None or at_last.total() < after.total() / 2

# %% [markdown]
# (Where the layout is another one, or the layers are of a kind that the function does not know, the engine goes the
# way of section 4. So do batches, except where registers have 512 bits: there the products of up to 96 rows are made
# in place too, faster than oneDNN makes them, and a batch of that size is one call.) On a GPU the same is done by
# recording a step once and replaying it: CUDA graphs.
#
# ## 6 · Fewer bytes
#
# One sequence alone cannot be faster than its bytes. There is only one thing left that helps: have fewer of them.
#
# ### Half: bfloat16
#
# bfloat16 keeps float32's exponent and cuts the fraction from 23 bits to 7. Half the bytes, for weights, keys and
# values. But the processor must be able to multiply such numbers. One that has no instructions for them converts each
# to float32 first, and is slower than before. `dtype="auto"` looks:

# %%
show_source(cpu_has_bfloat16)

# %% tags=["nbval-ignore-output"]
chosen = resolve_dtype("auto", "bfloat16", torch.device("cpu"))
if cpu_has_bfloat16():
    record_engine("6a bfloat16", tiny(dtype="auto", attention_backend="numba"))
    print("this CPU multiplies bfloat16: 'auto' takes it")
else:
    print(f"this CPU has no instructions for bfloat16: 'auto' takes {chosen}, and the stage is left out")

# %% [markdown]
# ### A quarter: eight bits
#
# We can go further if numbers need not be floating-point. **Quantisation** (Gholami et al. 2021, §3) writes
# a weight as a whole number times a scale. Take a row of a weight matrix. Its largest magnitude becomes 127, the
# scale is that magnitude divided by 127, and all others are rounded to a multiple of the scale:


# %%
def eight_bits(weight):
    """What remains of a weight [out, in] that is rounded to whole numbers from -127 to 127, row by row."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round() * scale


# %% [markdown]
# Three lines, and the package's layer does the same:

# %%
weight = model.layers[0].feed_forward.gate_up.weight.detach()  # [out, in]
assert torch.equal(Int8Linear(weight).dequantized(), eight_bits(weight))
print("equal to Int8Linear")

# %% [markdown]
# The layer keeps the whole numbers and the scales. Few rows are multiplied with these as they are (`product`, by a
# kernel); for many it makes the wide weights again, once for all of them:

# %%
show_source(Int8Linear.forward)

# %% [markdown]
# ### An eighth: four bits
#
# Four bits tell 16 numbers apart. With one scale for a whole row this is too coarse: a single large weight would
# stretch the 16 numbers over a range in which most weights fall on two or three of them. So a row is cut into
# **groups**, here of 32, and each has a scale of its own. And since the weights of a group seldom lie evenly around
# zero, the 16 numbers are laid from its smallest weight to its largest:


# %%
def round_groups(weight, group, bits=4):
    """What remains of a weight [out, in] when each group of a row is rounded to 2**bits numbers."""
    groups = weight.unflatten(1, (-1, group))  # [out, groups, group]
    low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    numbers = ((groups - low) / scale).round()
    return (low + numbers * scale).flatten(1)


# %% [markdown]
# `Int4Linear` packs two numbers into a byte, in an order that its matrix product likes, so we cannot look at them. But
# a layer that is given the rows of the identity matrix answers with its weights:

# %%
answers = Int4Linear(weight)(torch.eye(weight.shape[1])).T
torch.testing.assert_close(answers, round_groups(weight, group=linear.GROUP), atol=1e-5, rtol=0)
print("equal to Int4Linear")

# %% [markdown]
# (Up to float32's own rounding, since a product comes after it.) Here is the beginning of one row, three groups of it:

# %%
row = weight[:1, :96]
rounded = round_groups(row, group=32)
plot_rounding(row[0], rounded[0], group=32, bits=4, title="Each group has 16 numbers of its own")
plt.show()

# %% [markdown]
# Where a group's weights lie close together, its numbers do too. On the right are the errors, in units of the
# distance between two numbers. They are spread between minus and plus a half, with a peak in the middle: the smallest
# and the largest weight of each group are met exactly. So the error is proportional to the group's *range*, and the
# smaller the group, the smaller its range:

# %%
sizes = [8, 16, 32, 64, 192]
errors = {
    f"{bits} bits": [100 * float((round_groups(weight, size, bits) - weight).std() / weight.std()) for size in sizes]
    for bits in (3, 4, 5)
}
labels = {"xlabel": "weights in a group", "ylabel": "error (% of the weights' deviation)", "scale": "log"}
plot_lines(sizes, errors, **labels, title="One bit more halves the error; smaller groups help, too")
plt.show()
assert all(values == sorted(values) for values in errors.values())
assert all(1.8 < three / four < 2.5 for three, four in zip(errors["3 bits"], errors["4 bits"], strict=True))

# %% [markdown]
# Nothing is free: each group brings a scale and a lowest number. With two of 16 bits for 32 weights, "four bits" are
# in truth five, and in groups of 8 they would be eight. Here in float32 the pair takes 64 bits, so that it is six.


# %%
def stored_bits(layer):
    """Bits for each weight of a quantised layer, scales included."""
    tensors = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return 8 * sum(tensor.nbytes for tensor in tensors) / (layer.in_features * layer.out_features)


print(f"Int8Linear: {stored_bits(Int8Linear(weight)):.2f} bits, Int4Linear: {stored_bits(Int4Linear(weight)):.2f}")
assert stored_bits(Int4Linear(weight)) == 4 + 64 / linear.GROUP

# %% [markdown]
# ### What it costs in quality
#
# The answers are now those of another model, close to the first. How close? The usual measure is **perplexity**
# (notebook 05, section 4).
#
# Perplexity asks what the *text* says. Rounding errors may by chance make the right token more likely. So we also ask
# how far the two models are from each other: how often both have the same favourite, and how many nats of information
# are lost when one's probabilities stand in for the other's (the Kullback-Leibler divergence, which is never below 0).
#
# Eight stories serve as the text. Since our functions are equal to the layers, we may use rounded weights in ordinary
# layers, and then try bits for which there are no layers.

# %%
stories = [tokenizer(tell(random.Random(1000 + number)).text).input_ids for number in range(8)]


@torch.inference_mode()
def log_probabilities(decoder):
    """Of every token that could come next, at every place of the stories: [places, vocab]."""
    return torch.cat([decoder(torch.tensor([story[:-1]]))[0].float().log_softmax(dim=-1) for story in stories])


def with_weights(rounding):
    """`tiny` with what `rounding` makes of the weights of its linear layers and its head."""
    decoder = load_model("tiny", dtype="float32", device="cpu")
    decoder.make_head()
    for layer in decoder.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight = torch.nn.Parameter(rounding(layer.weight.detach()), requires_grad=False)
    return decoder


# %%
variants = {
    "float32": model,
    "bfloat16": load_model("tiny", dtype="bfloat16", device="cpu"),
    "int8": with_weights(eight_bits),
    **{f"int{bits}": with_weights(partial(round_groups, group=32, bits=bits)) for bits in (4, 3, 2)},
}
found = {name: log_probabilities(decoder) for name, decoder in variants.items()}

# %%
right, true = torch.tensor([token for story in stories for token in story[1:]]), found["float32"]
quality = {}  # name → perplexity, nats lost, share of places with another favourite
for name, ours in found.items():
    lost = (true.exp() * (true - ours)).sum(dim=-1).mean()
    other = (ours.argmax(dim=-1) != true.argmax(dim=-1)).float().mean()
    quality[name] = F.nll_loss(ours, right).exp().item(), lost.item(), other.item()
    print("{:9s} perplexity {:.2f}, {:.3f} nats lost, {:.0%} other favourites".format(name, *quality[name]))

# %%
lost = {name: values[1] for name, values in quality.items()}
assert max(lost["bfloat16"], lost["int8"]) < 0.002
assert 5 * lost["int8"] < lost["int4"] < lost["int3"] < lost["int2"]
assert quality["int2"][0] > 1.1 * quality["float32"][0]
assert abs(quality["int4"][0] / quality["float32"][0] - 1) < 0.03

# %% [markdown]
# bfloat16 and eight bits cost nothing that matters. Four bits are seen in the nats and hardly in the perplexity: they
# move the probabilities a little, for the text now better, now worse. With two bits the harm is plain in every
# column. What your own use can bear, your own use must show, so measure it there. (There are better ways to round
# than to the nearest number: GPTQ (Frantar et al. 2022, §3) and AWQ (Lin et al. 2023, §3) look at what a layer is used
# on.)
#
# ### What it gains
#
# In the engine it is an argument:

# %% tags=["nbval-ignore-output"]
for name, kind in (("6b int8", "int8"), ("6c int4", "int4")):
    with tiny(dtype="float32", attention_backend="numba", quantization=kind) as llm:
        texts = record_engine(name, llm)
    alike = sum(text == other for text, other in zip(texts, expected, strict=True))
    print(f"{kind}: {measured[name, 1]:,.0f} tokens a second alone, {measured[name, MANY]:,.0f} together; ", end="")
    print(f"{alike} of {MANY} answers are those of float32")

# %% [markdown]
# If you are disappointed, remember section 0. `tiny` may well fit into the processor's cache, so there are hardly
# bytes from memory to save. And in a batch it is arithmetic that counts, to which unpacking is *added*. Quantised
# weights are for a model that is much larger than the cache, and for few sequences.
#
# So let us take a larger one: the shapes of SmolLM2-135M, with 6 of its 30 layers and random weights, since only the
# sizes matter for time. One token after the other, best of eleven:


# %%
def smollm_shapes():
    config = smollm.config
    decoder = Decoder(replace(config, layers=config.layers[:6])).eval()
    decoder.make_head()
    return decoder


def milliseconds(decoder):
    """The time of one token."""
    times, store = [], ContiguousCache.for_decoder(decoder, max_len=16)
    start = time.perf_counter()
    for _ in generate(decoder, [[1]], store, max_tokens=12):
        times.append(1000 * (time.perf_counter() - start))
        start = time.perf_counter()
    return min(times[1:])


# %% tags=["nbval-ignore-output"]
large = smollm_shapes()
weights = matrix_weights(large)
tokens = {("float32", 32): milliseconds(large)}
if pack(large):
    tokens["float32, laid out", 32] = milliseconds(large)
for kind, bits in (("int8", 8), ("int4", 6)):
    large = smollm_shapes()
    quantize(large, kind)
    tokens[kind, bits] = milliseconds(large)

# %% tags=["nbval-ignore-output"]
print("weights              MB   ms a token  at best  of the bandwidth")
for (name, bits), taken in tokens.items():
    size = weights * bits / 8
    best = 1000 * size / machine.bandwidth
    print(f"{name:18s} {size / 1e6:5,.0f} {taken:10.1f} {best:9.1f} {best / taken:12.0%}")

# %% [markdown]
# The column "at best" is the weights' bytes divided by the bandwidth of section 0. Where a row is close to it, only
# fewer bytes can help. Where it is far above it, the bytes are not what is waited for: unpacking numbers costs
# arithmetic, and how well it is done differs between processors and versions of PyTorch.
#
# ## 7 · What is not the model
#
# All this made the *model* faster. But a step of the engine is more than that: somebody decides who is in it, writes
# down its tensors, chooses tokens, makes text of them. The faster the model, the more of the time this is. Let us take
# stopwatches to the engine's parts:

# %%
spent = Counter()


def watch(owner, name):
    """Replace a method by one that adds up its time in `spent`."""
    work = getattr(owner, name)

    def watched(*args):
        start = time.perf_counter()
        result = work(*args)
        spent[name] += time.perf_counter() - start
        return result

    setattr(owner, name, watched)


# %% [markdown]
# `step` calls `schedule`, `compute` and `sample` (notebook 11). Within `compute`, the decoder's `hidden` and `logits`
# are the model; what is left of it is the making of the step's tensors. And what is left of `step` is the answers'
# text and their bookkeeping.

# %%
engine = packed.engine
for owner, name in (
    (engine, "step"),
    (engine.scheduler, "schedule"),
    (engine.runner, "compute"),
    (engine.sampler, "sample"),
    (engine.runner.decoder, "hidden"),
    (engine.runner.decoder, "logits"),
):
    watch(owner, name)


# %%
def parts_of_a_step(sequences):
    """Milliseconds of a step, averaged over an answer."""
    spent.clear()
    answers_of(packed, prompts[:sequences])
    parts = {
        "model": spent["hidden"] + spent["logits"],
        "the step's tensors": spent["compute"] - spent["hidden"] - spent["logits"],
        "scheduling": spent["schedule"],
        "sampling": spent["sample"],
        "text and bookkeeping": spent["step"] - spent["schedule"] - spent["compute"] - spent["sample"],
    }
    return {name: 1000 * seconds / NEW for name, seconds in parts.items()}


# %% tags=["nbval-ignore-output"]
parts = {f"{count} sequence{'s' * (count > 1)}": parts_of_a_step(count) for count in (1, MANY)}
plot_parts(parts, xlabel="milliseconds of a step", title="A small model makes the engine's own work visible")
plt.show()
for name, one in parts.items():
    print(f"{name}: {sum(one.values()) - one['model']:.2f} ms of {sum(one.values()):.2f} are not the model")
print(f"SmolLM2-135M has {matrix_weights(smollm) / matrix_weights(model):.0f} times as many weights")

# %% [markdown]
# What is not the model is Python: it grows with the number of sequences and hardly with the size of the model. For
# `tiny` it is a part that one sees. Beside the passes of SmolLM2 the same milliseconds are little. This is **Amdahl's
# law** (Amdahl 1967): what a part can gain for the whole is limited by the share that it has.
#
# ## 8 · What is left
#
# All stages in one picture, together first, since that is what a server does. The loops take one sequence after the
# other, so for them the rate of one is the rate of all.

# %%
loops = ("1 everything again", "2 keys and values kept")


def rates_of(sequences):
    """Stage → tokens a second."""
    stages = dict.fromkeys(stage for stage, _ in measured)
    return {stage: measured[stage, 1 if stage in loops else sequences] for stage in stages}


# %% tags=["nbval-ignore-output"]
labels = {"xlabel": "tokens a second (logarithmic), and the gain over the stage before"}
plot_gains(rates_of(MANY), limit=limit(MANY), **labels, title=f"{MANY} sequences")
plt.show()

# %% tags=["nbval-ignore-output"]
plot_gains(rates_of(1), limit=limit(1), **labels, title="One sequence")
plt.show()

# %% [markdown]
# The limits are those of float32, so the quantised stages have higher ones. Compare the two pictures. Batching is a
# large gain in one and none in the other. Kernels and fused operations remove calls, so they should help one sequence
# most, whose calls are divided among the fewest tokens. Do they on your machine?
#
# And on the roofline. A mark says how many FLOPs a second went into writing, over the time of the whole workload (the
# prompts take time and are not counted as FLOPs here). Only for the first one are the repeated FLOPs counted, too.

# %% tags=["nbval-ignore-output"]
reached = {"1 everything again": (places["the whole text again"], flops["loop"] * measured["1 everything again", 1])}
for stage in ("2 keys and values kept", "3 many at once", "5c all layers in one call"):
    for count in (1,) if stage in loops else (1, MANY):
        name = f"{stage} ({count})"
        reached[name] = intensity(model, count), flops["alone"] * measured[stage, count]
plot_reached(machine, reached, title="Up along a dotted line is left to gain; to the right lead larger batches")
plt.show()

# %% [markdown]
# The naive loop stands well, in FLOPs. A processor that is busy is not yet one that is useful. All other stages do the
# same useful work, so among them, higher is better.
#
# A step to the *right* changes the question: more sequences, or fewer bytes. A step *up* answers it better: fewer
# calls, better order. Whoever knows which of the two is possible knows what to do next.
#
# ### SmolLM2-135M, measured
#
# `tiny` shows the steps; a real model shows what they are worth. `minillm bench compare` runs SmolLM2-135M on four
# workloads, beside transformers, and beside vLLM and llama.cpp if you name their environments:
#
# - **W1**: one prompt of 32 tokens, 128 new;
# - **W2**: 64 requests at once, prompts and answers of 16 to 256 tokens;
# - **W3**: 32 requests that share a prefix of 512 tokens;
# - **W4**: one prompt of 4,096 tokens, 64 new.
#
# What was measured so far, and on which machine, stands in
# [docs/benchmarks.md](../docs/benchmarks.md).
#
# ### What one would do next
#
# - **Compile the step.** `torch.compile` does what sections 4 and 5 did by hand: it joins operations into larger ones
#   and takes the calls away. It needs a C++ compiler on your machine and its time at the start, and it must be told
#   which shapes will come. vLLM does that on a CPU.
# - **Guess ahead.** The bytes for one token alone are used for a single row. In *speculative decoding* (Leviathan et
#   al. 2023, §2), a small model guesses some tokens and the large one checks them in one pass, as if they were a
#   prompt. It moves to the right on the roofline *with a single user*, and the answers stay exactly as distributed as
#   before.
# - **Better units.** AMX, on newer server processors, multiplies whole tiles of bfloat16 or int8 in one instruction. It
#   raises the flat part of the roof many times over, and with it what a batch or a long prompt can reach. It does
#   nothing for one sequence, whose bytes come no faster.
# - **More cores, more memory channels.** The roof itself goes up. That costs money rather than thought, and is often
#   the cheaper of the two.
#
# ## What to take along
#
# | step | removes | helps one sequence | helps a batch |
# | --- | --- | --- | --- |
# | keys and values kept | arithmetic that was done before | yes | yes |
# | many at once | passes over the weights | no | most of all |
# | kernels, fused | calls, small tensors written to be read once | yes | yes |
# | weights laid out once | rearranging in each product | where the trial says so | where the trial says so |
# | few rows read in place | waiting for memory | yes | no |
# | all layers in one call | calls | yes | no |
# | bfloat16 | half of all bytes | yes, with instructions for it | yes, with instructions for it |
# | int8, int4 | bytes of weights | if the model is larger than the cache, and unpacking is cheap | hardly |
#
# - Measure the machine first: it says what is possible, and when to stop.
# - Change one thing, check that the tokens are the same, measure, keep it or throw it away.
# - What cannot be the same (rounded weights) gets a number for what it costs.
#
# ## Sources
#
# - Amdahl 1967, "Validity of the single processor approach to achieving large scale computing capabilities", AFIPS.
# - Williams, Waterman and Patterson 2009, "Roofline: An Insightful Visual Performance Model for Multicore
#   Architectures", Communications of the ACM 52 (4).
# - Gholami et al. 2021, "A Survey of Quantization Methods for Efficient Neural Network Inference", arXiv:2103.13630.
# - Frantar, Ashkboos, Hoefler and Alistarh 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
#   Transformers", arXiv:2210.17323.
# - Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv:2306.00978.
# - Leviathan, Kalman and Matias 2023, "Fast Inference from Transformers via Speculative Decoding", ICML.
#
# ## Exercises
#
# Replace each `None`; when the answer is right, the cell says so.
#
# **1.** Leave keys and values aside. A machine has its ridge at `ridge` FLOPs a byte, weights have `itemsize` bytes.
# From how many sequences on does a step wait for arithmetic?


# %%
def turning_point(ridge, itemsize):
    """The size of the batch at which both limits are equal."""
    return None


if turning_point(10, 4) is not None:
    assert turning_point(10, 4) == 20, "a weight is used for two FLOPs by each sequence"
    assert turning_point(295, 2) == 295
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def turning_point(ridge, itemsize):
#     return ridge * itemsize / 2
# ```
# A batch does $2 \cdot \text{batch}$ FLOPs with a weight of `itemsize` bytes. Halving the bytes halves the batch that
# is needed to be busy.
#
# </details>
#
# **2.** How many bits does a weight take, its share of scale and lowest number included, if these two have 16 bits
# each?


# %%
def bits_a_weight(bits, group):
    return None


if bits_a_weight(4, 32) is not None:
    in_half = Int4Linear(weight.bfloat16())
    assert bits_a_weight(4, 32) == stored_bits(in_half)
    assert bits_a_weight(4, 8) == 8
    assert bits_a_weight(3, 64) == 3.5
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def bits_a_weight(bits, group):
#     return bits + 2 * 16 / group
# ```
#
# </details>
#
# **3.** Many formats do without a lowest number: the 15 numbers of a group lie evenly around zero, −7 to 7 times a
# scale. Write it. What does it cost in accuracy?


# %%
def round_around_zero(weight, group):
    """As `round_groups`, with 4 bits, but around zero."""
    return None


around_zero = round_around_zero(weight, 32)
if around_zero is not None:
    groups, largest = around_zero.unflatten(1, (-1, 32)), weight.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True)
    numbers = 7 * groups / largest
    assert torch.allclose(numbers, numbers.round(), atol=1e-3), "whole numbers times a scale"
    error, ours = (float((kept - weight).std()) for kept in (around_zero, round_groups(weight, 32)))
    assert ours < error < 1.5 * ours, "rounded to the nearest?"
    print(f"right: the error is {error / ours:.2f} times as large, with half as many extra bits")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def round_around_zero(weight, group):
#     groups = weight.unflatten(1, (-1, group))
#     scale = groups.abs().amax(dim=2, keepdim=True) / 7
#     return ((groups / scale).round() * scale).flatten(1)
# ```
#
# </details>
#
# **4.** A share of a step is not the model. The model becomes `faster` times faster. How much faster is the step?


# %%
def gain(other_share, faster):
    """Old time over new time."""
    return None


if gain(0.3, 3) is not None:
    assert abs(gain(0.3, 3) - 1.875) < 1e-9, "what was not touched stays as long as it was"
    assert gain(0.0, 3) == 3
    assert gain(0.5, 1e12) < 2.0001
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def gain(other_share, faster):
#     return 1 / (other_share + (1 - other_share) / faster)
# ```
# With half of the time elsewhere, not even an infinitely fast model makes more than 2 of it.
#
# </details>
#
# **5.** In speculative decoding, `drafts` tokens are guessed. Each is right with probability `p`, and all behind the
# first wrong one are thrown away. The pass that checks them gives one correct token more, in any case. How many tokens
# does a pass bring on average?


# %%
def tokens_a_pass(p, drafts):
    return None


if tokens_a_pass(0.8, 4) is not None:
    rng = random.Random(0)
    guesses = [[rng.random() < 0.8 for _ in range(4)] for _ in range(20_000)]
    played = sum(1 + ([*guess, False].index(False)) for guess in guesses) / len(guesses)
    assert abs(tokens_a_pass(0.8, 4) - played) < 0.05, f"played through: {played:.2f}"
    assert abs(tokens_a_pass(0.0, 4) - 1) < 1e-9
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def tokens_a_pass(p, drafts):
#     return sum(p**right for right in range(drafts + 1))
# ```
# The token at place $i$ is given out when all $i$ guesses before it are right. The sum is
# $(1 - p^{d+1}) / (1 - p)$, equation 1 of Leviathan et al. (§3.1).
#
# </details>
#
# ---
# **Back:** [12_sharing](12_sharing.ipynb) · **Next:** [14_serving](14_serving.ipynb): the engine behind a door that
# many can knock at.
