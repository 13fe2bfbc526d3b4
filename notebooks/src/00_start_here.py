# %% [markdown]
# # 00 · Start here
#
# A language model is a function from a text to the probabilities of the next piece of text. Everything else is how to
# compute that function, and how to compute it for many people at once without wasting memory.
#
# **By the end of this notebook you will be able to**
#
# - say what this course builds, and find any part of it in the package;
# - load a real trained model and let it write, with code short enough to read in full;
# - check your own work, here and in every notebook that follows.
#
# **You need** Python and a laptop; no GPU.
#
# **New here**: everything, once and quickly; each later notebook takes one part of it apart.
#
# **Time**: about 30 minutes (it runs in about 15 s on two cores).
#
# **How to run it.** `make lab` opens JupyterLab on this folder. Click into a cell and press <kbd>Shift</kbd>+
# <kbd>Enter</kbd>: it runs, and the next one is chosen. Cells depend on those above them, so run them in order; if
# something is strange, *Kernel → Restart Kernel and Run All Cells* starts afresh. Sliders and buttons appear when their
# cell has been run (or, as they were saved, after *File → Trust Notebook*).

# %% [markdown]
# ## 1 · The road
#
# The course follows one lineage of code. It starts with the Transformer of 2017 (Vaswani et al., "Attention Is All You
# Need") and ends with an engine that serves many users from one pool of memory, as vLLM does (Kwon et al. 2023,
# "PagedAttention"). Nothing is thrown away on the road: the attention layer that notebook 03 takes apart is the one in
# the engine of notebook 11; only the memory behind it is another.

# %%
import matplotlib.pyplot as plt
import torch

import minillm
from minillm.viz import plot_course_map, plot_next_token, show_source

plot_course_map()
plt.show()

# %% [markdown]
# This notebook is stop 00. Each notebook names at its end the one before and the next.
#
# ## 2 · A first text
#
# `tiny` is a small trained model that ships in the package. Its numbers were found by training on short stories that
# the project generated ([docs/tiny.md](../docs/tiny.md) tells how). It knows nothing but these stories, and it answers
# in milliseconds. We ask for float32, ordinary 32-bit numbers, so that everybody computes alike.

# %%
model = minillm.load_model("tiny", dtype="float32", device="cpu")
tokenizer = minillm.get_tokenizer("tiny")
parameters = sum(parameter.numel() for parameter in model.parameters())
print(f"{parameters / 1e6:.1f} million parameters, {parameters * 4 / 2**20:.0f} MiB in float32")

# %% [markdown]
# A model does not see letters. The **tokenizer** cuts a text into pieces from a fixed list and numbers them: these
# numbers are the **tokens**. A word may be one token or several, and the space before it belongs to it. How the list
# is found is the subject of notebook 01.

# %%
text = "Once upon a time there was a brave girl called"
tokens = tokenizer(text).input_ids
for token in tokens:
    print(f"{token:6d}  {tokenizer.decode([token])!r}")

# %% [markdown]
# Given those tokens, the model returns one number for every token of its vocabulary: the **logits**. Their softmax is a
# probability distribution over what comes next. `model` takes `[batch, seq]` tokens and gives `[batch, seq, vocab]`
# logits: a prediction after *every* token, of which we look at the last.

# %%
with torch.inference_mode():
    logits = model(torch.tensor([tokens]))
print("tokens", [1, len(tokens)], "→ logits", list(logits.shape))
assert logits.shape == (1, len(tokens), model.config.vocab_size)

# %%
plot_next_token(logits[0, -1], tokenizer, title=f"after “{text}”")
plt.show()

# %% [markdown]
# Now write. Take the likeliest token, put it at the end, ask again: this is **greedy** generation, and it is the whole
# idea of text generation.

# %%
written = list(tokens)
with torch.inference_mode():
    for _ in range(30):
        following = model(torch.tensor([written]))[0, -1].argmax()
        written.append(int(following))
print(tokenizer.decode(written))

# %% [markdown]
# ## 3 · The same loop, in the package
#
# The loop above reads the whole text again for every token. The package's loop does the same with a **key/value
# store**, an object that remembers what attention needs of earlier tokens, so that each step reads one new token only.
# Here is its real source, not a copy; throughout the course, `show_source` shows you the code that runs.

# %%
from minillm.transformer.generation import generate

show_source(generate)

# %% [markdown]
# Three stores can be plugged into it, and the model does not change between them. `None` keeps nothing and recomputes
# everything, as our loop did. `ContiguousCache` reserves one stretch of memory for each sequence of tokens. The third,
# the paged store, is what this course is about; it arrives in notebook 08.

# %%
from minillm.cache.contiguous import ContiguousCache

cache = ContiguousCache.for_decoder(model, batch_size=1, max_len=len(tokens) + 30)
kept = [step[0] for step in generate(model, [tokens], cache, max_tokens=30)]
recomputed = [step[0] for step in generate(model, [tokens], None, max_tokens=30)]
assert kept == recomputed == written[len(tokens) :]
print("both stores wrote the same tokens as our own loop")

# %% [markdown]
# Same tokens, at a different price. The price of remembering is memory: two vectors for each token, in each layer and
# key/value head. The price of forgetting is time: each token takes longer than the one before. (Times vary from machine
# to machine; the ratio is what to look at.)

# %% tags=["nbval-ignore-output"]
import time


def seconds(store, count=200):
    start = time.perf_counter()
    list(generate(model, [tokens], store, max_tokens=count))
    return time.perf_counter() - start


longer = ContiguousCache.for_decoder(model, max_len=len(tokens) + 200)
with_cache, without = seconds(longer), seconds(None)
print(
    f"200 tokens: {with_cache:.2f} s with the cache, {without:.2f} s without: {without / with_cache:.1f} times longer"
)

# %%
per_token = model.config.kv_bytes_per_token(torch.float32)
config = model.config
assert per_token == 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
longest = config.max_position_embeddings
share = longest * per_token / (parameters * 4)
print(f"one token's keys and values: {per_token:,} bytes")
print(f"the longest text, {longest:,} tokens: {longest * per_token / 2**20:.0f} MiB, {share:.0%} of the model itself")

# %% [markdown]
# That is small beside the model, as everything about `tiny` is small. For a real one it is not: one text of 8,192
# tokens with SmolLM2-135M takes most of what its weights take, and a server holds many texts at once. That is why the
# second half of this course exists.

# %%
from minillm.viz import published_model

smollm2 = published_model("SmolLM2-135M")  # its sizes, without its weights
one_text = 8192 * smollm2.config.kv_bytes_per_token(torch.float32)
weights = 4 * sum(parameter.numel() for parameter in smollm2.parameters())
print(f"8,192 tokens: {one_text / 2**20:.0f} MiB, {one_text / weights:.0%} of the {weights / 2**20:.0f} MiB of weights")

# %% [markdown]
# ## 4 · A conversation
#
# A chat model is the same function, trained on conversations written down in a fixed form, its **chat template**. The
# tokenizer knows the template:

# %%
import random

from minillm.training.stories import tell

story = tell(random.Random(1), held_out=True)  # a new one, in the manner of those that the model learned from
asked = next(one for one in story.questions if one.text.startswith("What colour"))
question = [{"role": "user", "content": f"{story.text}\n\n{asked.text}"}]
print(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True))

# %%
from minillm.models.tokenizer import stop_token_ids


def answer(messages, max_tokens=200):
    """What the model says next in a conversation."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    store = ContiguousCache.for_decoder(model, max_len=len(prompt) + max_tokens)
    stops = stop_token_ids("tiny", tokenizer)
    steps = generate(model, [prompt], store, max_tokens=max_tokens, stop_ids=stops)
    return tokenizer.decode([step[0] for step in steps])


print(answer(question))

# %%
assert answer(question) == asked.answer

# %% [markdown]
# It also tells stories of its own, and answers questions about them:

# %%
conversation = [{"role": "user", "content": "Tell me a story about Mia and a green boat."}]
conversation.append({"role": "assistant", "content": answer(conversation)})
conversation.append({"role": "user", "content": "What colour was the boat?"})
print(conversation[1]["content"], "\n")
print(answer(conversation))

# %%
assert "green" in answer(conversation)

# %% [markdown]
# The same from a terminal: `minillm chat`. A larger model, which knows something of the world, is one download away:
# `minillm chat -m smollm2-135m`, or `minillm.load_model("smollm2-135m")` in Python.
#
# ## 5 · How to check your work
#
# Learning here means predicting and then checking, and a check is a line of code:
#
# - **In a notebook**, an `assert` says nothing when you are right and stops you when you are not. Exercises begin with
#   a `None` for you to replace, and end with asserts and the word "right". The solution is folded up below.
# - **In the package**, `make test` runs every test, and runs every notebook again and compares its outputs with those
#   that you see here (with nbval). If you have changed the code and it is green, the course still tells the truth.
#
# ## Exercises
#
# **1.** How many tokens is your own name? Guess first. Then try a name in another script.

# %%
name, guess = "Leila", None

if guess is not None:
    pieces = [tokenizer.decode([token]) for token in tokenizer(" " + name).input_ids]
    assert guess == len(pieces), f"the pieces are {pieces}"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `guess = 1` for Leila, a name of the stories. A name that the stories do not have falls into pieces, and in another
# script at last into single bytes, which decode to �.
#
# </details>
#
# **2.** Greedy generation always takes the likeliest token. Write the loop so that it *draws* the next token from the
# probabilities (`torch.multinomial`), and run it twice. Replace `draw`:


# %%
def draw(logits):
    """The next token, drawn from softmax(logits). (Here still greedy: yours to change.)"""
    return logits.argmax()


some = torch.tensor([0.0, 1.0, -1.0])
print({int(draw(some)) for _ in range(200)})

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def draw(logits):
#     return torch.multinomial(logits.softmax(dim=-1), 1)[0]
# ```
# With it, the set above is `{0, 1, 2}`: everything that is possible happens now and then.
#
# </details>
#
# **3.** From `model.config`, work out how many tokens of keys and values (float32) fit into as many bytes as the
# model's weights take. Replace `None`:

# %%
tokens_that_fit = None
if tokens_that_fit is not None:
    weights, one_token = parameters * 4, per_token
    assert int(tokens_that_fit) == weights // one_token, "bytes of all weights over the bytes of one token"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `tokens_that_fit = parameters * 4 // per_token`: each weight is four bytes, and `per_token` is 2 (a key and a value) ×
# 6 layers × 2 key/value heads × 32 numbers × 4 bytes.
#
# </details>
#
# ---
# **Next:** [01_tokens_and_embeddings](01_tokens_and_embeddings.ipynb): where tokens come from, and how a number becomes
# a vector.
