# %% [markdown]
# # 12 · Sharing blocks
#
# Four answers to one prompt read the same prompt. The beams of a beam search have the same beginning. A thousand users
# of one service send the same instructions before every question. In each case the same keys and values would be
# computed and kept many times over, were it not for blocks that several tables name.
#
# **By the end of this notebook you will be able to**
#
# - follow a block through a fork, a copy-on-write and its return to the pool, for samples and for beams;
# - predict how many blocks `n` answers need, and how much sharing saves, from four numbers;
# - measure the saving as Kwon et al. 2023 do, and say why your figure differs from theirs;
# - say how many tokens of a prompt an engine will find in memory, and write prompts that let it find many;
# - name the cases in which sharing does not help.
#
# **You need** notebooks [08](08_paged_blocks.ipynb) (forks, copy-on-write, names of blocks) and
# [11](11_continuous_batching.ipynb) (the scheduler), and of [04](04_encoder_decoder.ipynb) what a beam is. No GPU.
#
# **New here**: notebook 08 built the means of sharing. Now they are used, by samples, beams and strangers, and we count
# what they save and when they save nothing.
#
# **Time**: about 75 minutes (it runs in about 30 s on two cores).

# %%
import random
import time
from collections import defaultdict
from functools import partial
from itertools import pairwise, takewhile

import matplotlib.pyplot as plt
import torch

from minillm import LLM, SamplingParams
from minillm.cache.block_pool import BlockPool
from minillm.cache.block_table import BlockTable
from minillm.training.stories import tell
from minillm.viz import (
    RecordingRunner,
    Sharing,
    TableState,
    block_chain,
    explore_sharing,
    fork_samples,
    plot_beams,
    plot_blocks_over_steps,
    plot_prefix_tree,
    plot_saved_share,
    plot_sharing,
    plot_tables,
    sharing_of_samples,
    show_source,
    traced_tables,
)

torch.set_num_threads(1)  # enough for so small a model, and it does not wait for other programs
on_laptop = partial(LLM, "tiny", dtype="float32", device="cpu", num_gpu_blocks_override=512, trace=True)
llm = on_laptop(enable_prefix_caching=False)
tokenizer, pool, size = llm.get_tokenizer(), llm.engine.scheduler.pool, 16
assert pool.block_size == size

# %% [markdown]
# ## 1 · Three ways to share
#
# Kwon et al. (2023, §4.4) go through the ways of generating in which sequences have tokens in common:
#
# | | what is common | who shares | drawn in the paper |
# | --- | --- | --- | --- |
# | **parallel samples** | the prompt | the `n` answers of one request | figure 8 |
# | **beams** | the prompt, and a beginning of the answer that changes | the beams of one search | figure 9 |
# | **shared prefix** | the beginning of the prompt | requests that know nothing of each other | figure 10 |
#
# All three rest on one fact of notebook 06: in a causal decoder, the keys and values of a token depend on this token
# and on those before it, and on nothing else. Where two sequences have the same tokens *from the very first on*, they
# have the same keys and values. And all three need only what `BlockPool` and `BlockTable` have already: a count of
# holders for each block.
#
# In sections 2 and 3 the third way is switched off (`enable_prefix_caching=False`), to see the first two alone.
#
# ## 2 · Parallel samples
#
# `SamplingParams(n=4)` asks for four answers. One request computes the prompt, and its table is forked three times
# ([notebook 08](08_paged_blocks.ipynb), section 5). By hand, without a model: a prompt of 22 tokens lies in two blocks,
# the second of which holds 6. Three forks, and then one token for each of the four.


# %%
def states(tables):
    return {f"answer {number}": TableState.of(table) for number, table in enumerate(tables)}


first = BlockTable(BlockPool(num_blocks=16, block_size=size))
first.append(22)
moments = {"the prompt": states([first])}
tables = [first, first.fork(), first.fork(), first.fork()]
moments["forked"] = states(tables)
copies = [table.append(1) for table in tables]
moments["a token each"] = states(tables)
print(copies)

# %%
plot_tables(moments, size, title="Full blocks stay shared; the partly filled one is copied when it is written")
plt.show()

# %% [markdown]
# Forking takes no memory: two blocks before, two blocks after. When they write, the first three answers copy block 1
# (copy-on-write). The last one does not: by then nobody else holds it.

# %%
assert [len(made) for made in copies] == [1, 1, 1, 0]
assert {copy.source for made in copies for copy in made} == {1}
assert first.pool.ref_counts[:5] == [4, 1, 1, 1, 1]

# %% [markdown]
# ### In the engine
#
# The scheduler does the same with the requests of one prompt, as soon as the prompt is computed:

# %%
show_source(llm.engine.scheduler.fork)

# %%
stories = [tokenizer(tell(random.Random(number)).text).input_ids for number in range(8)]
text = [token for story in stories for token in story]
several = SamplingParams(n=4, seed=7, max_tokens=60, ignore_eos=True)
(output,) = llm.generate([text[:22]], several, use_tqdm=False)
for answer in output.outputs:
    print(f"{answer.index}: {answer.text[:90]!r}")

# %% [markdown]
# The trace has kept every step's tables. They are the ones that we made by hand, block for block:

# %%
prompt_step, token_step, *_ = llm.trace.steps
assert list(traced_tables(prompt_step).values()) == list(moments["the prompt"].values())
assert list(traced_tables(token_step).values()) == list(moments["a token each"].values())
print({name: table.blocks for name, table in traced_tables(token_step).items()})

# %% [markdown]
# Does sharing change what is written? It must not: the four draw from the same logits at first, each with a random
# generator of its own, seeded with the seed plus the answer's number. So an answer is the same alone, and the same with
# strangers in the batch:

# %%
alone = SamplingParams(seed=7 + 2, max_tokens=60, ignore_eos=True)  # what answer 2 is given
others = [(text[50 * i : 50 * i + 30], SamplingParams(seed=i, max_tokens=40)) for i in range(1, 5)]
prompts, params = zip((text[:22], several), (text[:22], alone), *others, strict=True)
again, single, *_ = llm.generate(list(prompts), list(params), use_tqdm=False)
assert [answer.token_ids for answer in again.outputs] == [answer.token_ids for answer in output.outputs]
assert single.outputs[0].token_ids == output.outputs[2].token_ids
print("the same four answers beside five other requests, and the third one alone")

# %% [markdown]
# ### The memory, step by step
#
# `Sharing` counts two things: the blocks that some tables *hold*, a shared one once, and the blocks that they would
# *need* if each had its own.

# %%
show_source(Sharing)

# %%
steps = [Sharing.of(traced_tables(step).values()) for step in llm.trace.steps[:60]]  # of the first call above
assert steps[1] == (5, 8)
title = f"A prompt of 22 tokens, four answers of 60: {Sharing.total(steps).saved:.0%} saved over all steps"
plot_blocks_over_steps(steps, title=title)
plt.show()

# %% [markdown]
# Between the lines is what sharing saves: it stays as it is, while what is needed grows. With such a short prompt it is
# little, one block times three. Kwon et al. define the saving in §6.3: *blocks saved by sharing, over the blocks
# needed without it*. "Over all steps" means that both are added up over the steps, so that a block that is held for
# longer counts for more.
#
# ### A formula
#
# Of a prompt of $p$ tokens, the $\lfloor p/b \rfloor$ full blocks of $b$ tokens are there once. All other blocks of an
# answer are its own. An answer that has stored $a$ tokens needs $\lceil (p+a)/b \rceil$ blocks in all, so
#
# $$\text{saved} = \frac{(n-1)\,\lfloor p/b \rfloor}{n\,\lceil (p+a)/b \rceil}
# \;\approx\; \frac{n-1}{n}\cdot\frac{p}{p+a}.$$
#
# The approximation is good when blocks are small beside the texts. It says all that matters: **the saving is the
# prompt's share of the text, times $(n-1)/n$.** Nothing in it depends on the model.

# %%
show_source(sharing_of_samples)

# %% [markdown]
# Is it true? `fork_samples` makes real tables, forks them and lets them grow token by token. We compare them with the
# formula for many sizes:

# %%
for number in range(200):
    rng = random.Random(number)
    sizes = rng.randint(1, 100), rng.randint(0, 60), rng.randint(1, 6), rng.choice([1, 3, 8, 16])
    assert Sharing.of(map(TableState.of, fork_samples(*sizes))) == sharing_of_samples(*sizes)
print("200 sizes: the tables hold what the formula says")

# %% [markdown]
# And the engine itself. Nine requests with 2, 4 and 6 answers run together, each 80 stored tokens long, with short and
# long prompts. (The last token of an answer is given out and never stored, hence the 1.)


# %%
def sharing_of_requests(steps):
    """For each request of some traced steps, the blocks of its answers at every step."""
    found = defaultdict(list)
    for step in steps:
        answers = defaultdict(list)
        for name, table in traced_tables(step).items():
            answers[name.split("/")[0]].append(table)
        for request, its_tables in answers.items():
            found[request].append(Sharing.of(its_tables))
    return list(found.values())


# %%
total, start = 80, len(llm.trace.steps)
asked = [(n, prompt) for n in (2, 4, 6) for prompt in (16, 40, 64)]
params = [SamplingParams(n=n, seed=1, max_tokens=total - prompt + 1, ignore_eos=True) for n, prompt in asked]
llm.generate([text[:prompt] for _, prompt in asked], params, use_tqdm=False)
measured = defaultdict(dict)
for (n, prompt), its_steps in zip(asked, sharing_of_requests(llm.trace.steps[start:]), strict=True):
    assert its_steps[-1] == sharing_of_samples(prompt, total - prompt, n, size)
    measured[n][prompt] = its_steps[-1].saved

# %%
title = "The larger the prompt's share of the text, the more is saved"
plot_saved_share(total, size, measured, title=title)
plt.show()

# %% [markdown]
# The marks lie on the lines. The dotted lines are the approximation; the stairs below them come from whole blocks: a
# prompt of 31 tokens shares one block of 16, like a prompt of 16.
#
# ### Beside the paper's figures
#
# Kwon et al. ran OPT-13B with 2, 4 and 6 answers on prompts and answers of two data sets' lengths. Parallel sampling
# saved **6.1 % to 9.8 %** on Alpaca and **16.2 % to 30.5 %** on ShareGPT (§6.3, figure 15). Since the formula knows of
# no model, `tiny` may stand in for OPT-13B, if we give it the same lengths. The paper's mean lengths are 19 and 58
# tokens for Alpaca, 161 and 338 for ShareGPT (figure 11):

# %%
lengths = {"Alpaca": (19, 58), "ShareGPT": (161, 338)}
asked = [(*lengths[name], n) for name in lengths for n in (2, 4, 6)]
params = [SamplingParams(n=n, seed=1, max_tokens=answer + 1, ignore_eos=True) for _, answer, n in asked]
start = len(llm.trace.steps)
llm.generate([text[:prompt] for prompt, _, _ in asked], params, use_tqdm=False)
runs = sharing_of_requests(llm.trace.steps[start:])
for (prompt, answer, n), its_steps in zip(asked, runs, strict=True):
    assert its_steps[-1] == sharing_of_samples(prompt, answer, n, size)
    over_all, end = Sharing.total(its_steps[1:]).saved, its_steps[-1].saved
    print(f"{prompt:3d} + {answer:3d} tokens, n = {n}: {end:5.1%} saved at the end, {over_all:5.1%} over all steps")

# %% [markdown]
# The order of magnitude is right, and more is saved with more answers and with longer prompts, as in the paper. But on
# Alpaca's lengths we save more than the paper says. One reason is that we have put *means* into a formula with a floor,
# and real lengths vary. A prompt of 19 tokens shares a block; one of 15 shares nothing. Let us spread the lengths
# around the same means (log-normally: an assumption, as we do not have the data), and count at the answers' ends:


# %%
def spread(mean, rng, sigma=0.8):
    """A length drawn from a log-normal distribution with this mean."""
    return max(1, round(mean * rng.lognormvariate(-(sigma**2) / 2, sigma)))


saved_by_samples = {}
for name, (prompt, answer) in lengths.items():
    rng = random.Random(0)
    drawn = [(spread(prompt, rng), spread(answer, rng)) for _ in range(4000)]
    for n in (2, 4, 6):
        ends = [sharing_of_samples(*one, n, size) for one in drawn]
        saved_by_samples[name, n] = Sharing.total(ends).saved
    print(f"{name:8s}", " ".join(f"{saved_by_samples[name, n]:6.1%}" for n in (2, 4, 6)))

# %%
assert saved_by_samples["Alpaca", 2] < sharing_of_samples(19, 58, 2, size).saved
paper = {"Alpaca": (0.061, 0.098), "ShareGPT": (0.162, 0.305)}
for name, (low, high) in paper.items():
    assert abs(saved_by_samples[name, 2] - low) < 0.02
    assert abs(saved_by_samples[name, 6] - high) < 0.06

# %% [markdown]
# Now we are within two points of the paper's figures at $n = 2$, and within six at $n = 6$. We should not hope for
# more: the true lengths need not be log-normal, a prompt's length and its answer's need not be independent, and we do
# not know how the paper weighs the moments of an answer's life (ours counts the last one).
#
# Other traffic, other savings. For 2,000 requests of another conversation service (Azure's trace of 2023, Patel et al.
# 2024), the same formula gives

# %%
from minillm.simulate.trace import load_trace

azure = [(one.prompt_tokens, one.output_tokens) for one in load_trace()]
prompt_share = sum(prompt for prompt, _ in azure) / sum(map(sum, azure))
saved = Sharing.total(sharing_of_samples(*one, 4, size) for one in azure).saved
print(f"prompts are {prompt_share:.0%} of all tokens: four answers to each would save {saved:.0%}")
assert prompt_share * 3 / 4 - 0.02 < saved < prompt_share * 3 / 4

# %% [markdown]
# ### Try it
#
# Four numbers decide. Left are the tables, really forked and grown; right is the formula.

# %%
plot_sharing(prompt=100, answer=60, n=4, block_size=16)
plt.show()

# %% [markdown]
# With a running kernel, here it is with controls. Predict before you move:
#
# 1. Prompt 100, answer 60, block size 16. What does the saving tend to when `n` grows?
# 2. With blocks of 64 tokens instead of 16: is more saved or less?
# 3. Which prompt lengths share nothing at all, in blocks of 32?

# %% tags=["nbval-ignore-output"]
explore_sharing()

# %% [markdown]
# <details><summary>Answers</summary>
#
# 1. To 6 of 10 blocks, 60 %: the prompt's full blocks over an answer's blocks. At `n = 8` it is 52.5 %.
# 2. Less: only one block of 64 is full of prompt, of three in all. 25 % with four answers, against 45 %.
# 3. Those below 32 tokens (once the first token of the answer is written).
#
# </details>

# %%
assert sharing_of_samples(100, 60, 8, 16).saved == 0.525
assert (sharing_of_samples(100, 60, 4, 64).saved, sharing_of_samples(100, 60, 4, 16).saved) == (0.25, 0.45)
assert sharing_of_samples(31, 1, 4, 32).saved == 0 < sharing_of_samples(32, 1, 4, 32).saved

# %% [markdown]
# ## 3 · Beams
#
# Beam search (notebook 04) keeps the `beam_width` likeliest beginnings of an answer. At every step each beam is
# continued with every token of the vocabulary, and of all these continuations the best `beam_width` stay. So a beam may
# go on in several ways, and another may not go on at all.
#
# For memory this means: at every step, tables are forked and freed. Here is the whole of it:

# %%
from minillm.engine.beam_search import _search, beam_search
from minillm.engine.params import BeamSearchParams

show_source(_search)

# %% [markdown]
# `rows` says which beam each new one goes on from. Each takes a fork of that beam's table, and then all the old tables
# are freed. A beam with three children leaves its blocks held three times; the blocks of a beam without children that
# nobody shares go back to the pool.
#
# Beam search drives the runner itself. To watch it, we put a wrapper around the runner that notes which tables come
# with each call:

# %%
show_source(RecordingRunner)


# %%
def search(llm, prompt, **params):
    """The beams that beam search finds, and what the runner was given on the way."""
    recorder, its_pool = RecordingRunner(llm.engine.runner), llm.engine.scheduler.pool
    ends = llm.engine.end_ids
    found = beam_search(
        recorder, its_pool, prompt, BeamSearchParams(**params), end_ids=ends, max_num_batched_tokens=2048
    )
    assert its_pool.num_free == its_pool.num_blocks  # all tables were freed
    return found, recorder.steps


# %%
small_blocks = on_laptop(block_size=4, enable_prefix_caching=False)
prompt = tokenizer("Once upon a time there was a brave girl called Mia. One day she found").input_ids
found, recorded = search(small_blocks, prompt, beam_width=4, max_tokens=14)
print(len(prompt), "tokens of prompt,", len(recorded) - 1, "steps behind it")

# %%
plot_beams(recorded, tokenizer, title="Most beginnings die out; what lives on has few ancestors")
plt.show()

# %% [markdown]
# A column is a step, the best beam on top. Thick lines lead to a beam of the last step. The further back one goes from
# the end, the fewer ancestors there are: the tree has a trunk. What the beams have in common is not only the prompt, it
# is the trunk as well, **and the trunk grows**. That is why beams can save more memory than samples. Kwon et
# al. (§4.4) compare it with the tree of processes in an operating system, made by fork upon fork.

# %%
ancestors = set(range(4))
for step in reversed(recorded[2:]):
    ancestors = {step.parents[row] for row in ancestors}
print("beams after the first token that are ancestors of the last four:", len(ancestors))
assert len(ancestors) == 1

# %% [markdown]
# Here are their tables in blocks of 4 tokens (small, so that there is something to see) after 5 tokens and after 13:


# %%
def beam_states(step):
    return {f"beam {row + 1}": table for row, table in enumerate(step.tables)}


moments = {f"after {count} tokens": beam_states(recorded[count]) for count in (5, 13)}
shared_by_all = [set.intersection(*(set(table.blocks) for table in tables.values())) for tables in moments.values()]
assert [len(blocks) for blocks in shared_by_all] == [5, 5]
plot_tables(moments, block_size=4, title="Beams share the prompt, and each other's beginnings")
plt.show()

# %% [markdown]
# Five tokens in, the beams share the prompt's four blocks, and the first block of the *answer* too: compare with the
# tree, where one beam of the fourth token is the ancestor of all four. Eight tokens later, three of them share the next
# block as well. Blocks behind a parting belong to one beam.
#
# ### The same beams as elsewhere
#
# Whether tables were forked rightly shows in the results: a wrong block would give wrong logits. We let transformers,
# which keeps its beams in contiguous tensors, search with the same weights:

# %%
import transformers

from minillm.models.source import resolve

transformers.utils.logging.disable_progress_bar()
reference = transformers.AutoModelForCausalLM.from_pretrained(resolve("tiny"), dtype=torch.float32).eval()
same = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 14, "length_penalty": 1.0}
how = {"do_sample": False, "early_stopping": False, "return_dict_in_generate": True, "output_scores": True}
expected = reference.generate(torch.tensor([prompt]), **same, **how, pad_token_id=0)

# %%
for ours, tokens, score in zip(found, expected.sequences.tolist(), expected.sequences_scores.tolist(), strict=True):
    assert ours.tokens == tokens[len(prompt) :]
    assert abs(ours.score - score) < 1e-4
    print(f"{ours.score:6.3f}  {tokenizer.decode(ours.tokens)!r}")

# %% [markdown]
# ### What copying would cost
#
# In a contiguous store, each beam has a row of its own. When beam 2 goes on from beam 1, its row must become a copy of
# row 1, the whole of it. `ContiguousCache` can do that, and does it at every step:

# %%
from minillm.cache.contiguous import ContiguousCache

show_source(ContiguousCache.reorder)

# %% [markdown]
# Earlier serving systems had to copy keys and values from beam to beam all the time, as Kwon et al. point out (§4.4).
# Count the bytes for the search above: `reorder` copies four rows of everything so far at each step. A more careful
# system would copy only rows that go on from *another* row. With blocks, at most one block a beam is copied, and none
# when the last block is full:

# %%
decoder = llm.engine.runner.decoder
token_bytes = decoder.config.kv_bytes_per_token(torch.float32)


def copied(steps, block_size):
    """Bytes that are copied: by reorder, by one that moves only other rows, and in blocks."""
    everything = moved = 0
    for step in steps[2:]:
        old_tokens = step.tables[0].num_tokens - 1
        everything += len(step.tables) * old_tokens
        moved += sum(row != parent for row, parent in enumerate(step.parents)) * old_tokens
    in_blocks = sum(step.num_copies for step in steps[2:]) * block_size
    return [tokens * token_bytes for tokens in (everything, moved, in_blocks)]


# %% [markdown]
# (The first step is left out: there, all beams go on from the prompt.)

# %%
all_rows, other_rows, in_blocks = copied(recorded, block_size=4)
print(f"every row:            {all_rows / 2**20:5.2f} MiB")
print(f"rows of other beams:  {other_rows / 2**20:5.2f} MiB")
print(f"blocks of 4 tokens:   {in_blocks / 2**20:5.2f} MiB")
assert all_rows > other_rows > 5 * in_blocks
stored = recorded[-1].tables[0].num_tokens - 1
four_rows = ContiguousCache.for_decoder(decoder, batch_size=4, max_len=stored)
assert four_rows.num_bytes == 4 * stored * token_bytes  # what the last `reorder` copies

# %% [markdown]
# ### The memory of beams
#
# Now in blocks of 16, for longer answers: the paper's beam widths and mean lengths, with one text each.

# %%
beam_steps, saved_by_beams = {}, {}
for name, (prompt_tokens, answer) in lengths.items():
    for width in (2, 4, 6):
        _, recorded = search(llm, text[:prompt_tokens], beam_width=width, max_tokens=answer + 1, ignore_eos=True)
        beam_steps[name, width] = [Sharing.of(step.tables) for step in recorded[1:]]
        saved_by_beams[name, width] = Sharing.total(beam_steps[name, width]).saved

# %%
title = f"Four beams, 161 + 338 tokens: {saved_by_beams['ShareGPT', 4]:.0%} saved over all steps"
plot_blocks_over_steps(beam_steps["ShareGPT", 4], title=title)
plt.show()

# %% [markdown]
# What is needed grows steadily. What is held grows when beams begin new blocks, and falls when beams die and give
# theirs back. Over all steps, with 2, 4 and 6 beams:

# %%
for name in lengths:
    print(f"{name:8s}", " ".join(f"{saved_by_beams[name, width]:6.1%}" for width in (2, 4, 6)))
held = [moment.held for moment in beam_steps["ShareGPT", 4]]
assert any(after < before for before, after in pairwise(held))

# %% [markdown]
# Kwon et al. saved **37.6 % to 55.2 %** on Alpaca and **44.3 % to 66.3 %** on ShareGPT (§6.3). For beams, unlike
# samples, no formula of lengths alone can tell: it depends on *when the beams part*, and that depends on the model and
# the text. A model that is sure of itself has beams that differ in the last few tokens only, and saves much. A text
# with many equally good ways on keeps its beams apart for long.

# %%
for name in lengths:
    for width in (2, 4, 6):
        prompt_tokens, answer = lengths[name]
        samples = Sharing.total(sharing_of_samples(prompt_tokens, a, width, size) for a in range(1, answer + 1))
        assert samples.saved < saved_by_beams[name, width] < (width - 1) / width
    assert saved_by_beams[name, 2] < saved_by_beams[name, 4] < saved_by_beams[name, 6]
assert saved_by_beams["Alpaca", 6] < 0.552
assert saved_by_beams["ShareGPT", 6] > 0.663

# %% [markdown]
# So our figures need not be the paper's, and they are not: less on the short lengths, more on the long ones, and of one
# text each. What we find in all six cases: beams save more than as many samples of the same lengths (as in the paper),
# and the more beams, the more is saved. It is always less than $(n-1)/n$, which would mean that they never part.
#
# ## 4 · Shared prefixes
#
# Samples and beams belong to one request, so the engine knows from the start that they have the prompt in common. Now
# for requests that know nothing of each other. Many prompts begin alike:
#
# - a **system prompt**, the same for every user of a service;
# - **few-shot examples**, the same before every input;
# - a **document**, about which several questions are asked;
# - a **conversation**, which with every turn is sent again, whole.
#
# When a request arrives, the scheduler makes the chained hashes of its prompt's full blocks and looks each up
# ([notebook 08](08_paged_blocks.ipynb), section 6). vLLM calls this **automatic prefix caching**. `block_chain` makes
# the hashes of a text:

# %%
show_source(block_chain)

# %% [markdown]
# ### A story and its questions
#
# As in notebook 05, `tiny` is given a story and asked about it. A system prompt stands in front. Each question is a
# request of its own, one after the other.

# %%
caching = on_laptop()
rules = "You answer questions about stories. Use the words of the story, and answer in one short sentence."
told = [tell(random.Random(number), held_out=True) for number in (1, 2)]
greedy = SamplingParams(temperature=0, max_tokens=30)


def messages(story, question):
    return [{"role": "system", "content": rules}, {"role": "user", "content": f"{story.text}\n\n{question.text}"}]


asked = [(story, question) for story in told for question in story.questions[:3]]
outputs = [caching.chat(messages(*one), greedy, use_tqdm=False)[0] for one in asked]

# %%
print("prompt  found  computed")
for (_, question), output in zip(asked, outputs, strict=True):
    length, cached = len(output.prompt_token_ids), output.num_cached_tokens
    print(f"{length:6d} {cached:6d} {length - cached:9d}   {question.text} {output.outputs[0].text}")

# %% [markdown]
# The first question pays for the story. For the second and the third, the system prompt and nearly all of the story are
# found. The fourth is about another story and finds the system prompt only. `num_cached_tokens` says in every output
# how much was found.
#
# The blocks form a tree. A node is a block together with everything before it, and prompts share a path as long as they
# are equal:

# %%
chains = {
    question.text: block_chain(output.prompt_token_ids, size)
    for (_, question), output in zip(asked, outputs, strict=True)
}
plot_prefix_tree(chains)
plt.show()

# %% [markdown]
# Nobody has built this tree: there is a flat dictionary from hashes to blocks, and the chained hashes make it one.
# SGLang keeps the tree itself, with runs of tokens on its edges (**RadixAttention**, Zheng et al. 2024, §3). It can
# therefore match token by token where we match whole blocks. In both, a request walks down as long as it finds what it
# has. The engine's pool agrees with our tree:


# %%
def in_common(first, second):
    """How many elements two sequences have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


known = caching.engine.scheduler.pool
found = [size * in_common(before, chain) for before, chain in pairwise(chains.values())]
assert [output.num_cached_tokens for output in outputs] == [0, *found]
assert all(known.find(content) is not None for chain in chains.values() for content in chain)
assert known.num_free == known.num_blocks  # and yet nobody holds them
print("every block of the tree can be found, and every block of the pool is free")

# %% [markdown]
# Look at the last assertion. All requests are done, and all blocks are *free*: what is remembered takes no room from
# anybody.
#
# ### Tokens saved
#
# In sections 2 and 3, sharing saved memory. Here it saves arithmetic first of all: what is found is not computed. We
# count the tokens that went through the model, with and without:


# %%
def computed_tokens(llm):
    return sum(part.count for step in llm.trace.steps for part in step.parts)


start, start_caching = computed_tokens(llm), computed_tokens(caching)
assert caching.reset_prefix_cache()
plain = [llm.chat(messages(*one), greedy, use_tqdm=False)[0] for one in asked]
cached = [caching.chat(messages(*one), greedy, use_tqdm=False)[0] for one in asked]
assert [one.outputs[0].token_ids for one in plain] == [one.outputs[0].token_ids for one in cached]
without, with_caching = computed_tokens(llm) - start, computed_tokens(caching) - start_caching
print(f"{without} tokens without, {with_caching} with: {1 - with_caching / without:.0%} less, the same answers")
assert without - with_caching == sum(one.num_cached_tokens for one in cached)

# %% [markdown]
# In time (yours will differ, and on a model so small the fixed price of a step is much of it):


# %% tags=["nbval-ignore-output"]
def milliseconds(llm):
    llm.reset_prefix_cache()
    start = time.perf_counter()
    for one in asked:
        llm.chat(messages(*one), SamplingParams(max_tokens=1), use_tqdm=False)
    return 1000 * (time.perf_counter() - start)


print(f"six prompts and one token each: {milliseconds(llm):.0f} ms without, {milliseconds(caching):.0f} ms with")

# %% [markdown]
# And when requests run at the same time, memory is saved too. Five questions about the first story, which is in memory
# already, in one batch:

# %%
story = told[0]
caching.chat(messages(story, story.questions[0]), greedy, use_tqdm=False)
start = len(caching.trace.steps)
caching.chat([messages(story, question) for question in story.questions[:5]], greedy, use_tqdm=False)
together = Sharing.of(traced_tables(caching.trace.steps[start]).values())
saved_by_prefix = together.saved
print(f"{together.held} blocks held, {together.needed} needed without sharing: {saved_by_prefix:.0%} saved")
assert saved_by_prefix > 0.6

# %% [markdown]
# ### A conversation
#
# A chat model is sent the whole conversation at every turn. Each turn finds the turns before it, and not only the
# user's part: the model's own answer was computed while it was written, so its blocks are known as well.

# %%
talk = []
for said in ("Tell me a story about Mia and a green boat.", "What colour was the boat?", "Who is the story about?"):
    talk.append({"role": "user", "content": said})
    (output,) = caching.chat(talk, SamplingParams(temperature=0, max_tokens=200), use_tqdm=False)
    talk.append({"role": "assistant", "content": output.outputs[0].text})
    new = len(output.prompt_token_ids) - output.num_cached_tokens
    print(f"{len(output.prompt_token_ids):4d} tokens, {new:3d} of them computed   {output.outputs[0].text[:45]!r}")
    assert new < 19 + 2 * size

# %% [markdown]
# Without sharing, the work of a conversation would grow with the square of its length, as in notebook 06's loop without
# a store, a turn in place of a token.
#
# ### The last block
#
# Only full blocks are found. Common tokens behind the last full block are computed again:

# %%
first, second = (output.prompt_token_ids for output in outputs[:2])
common = in_common(first, second)
print(f"{common} tokens in common, {outputs[1].num_cached_tokens} found")
assert outputs[1].num_cached_tokens == common // size * size

# %% [markdown]
# ### Order matters: what changes goes last
#
# Since each hash contains all that came before, one different token at the very beginning makes every block a stranger.
# Suppose that the prompt should also tell the date. At the beginning, or behind the story?

# %%
dates = ("Monday", "Tuesday", "Friday", "Sunday")
forms = {
    "date first": "Today is {day}.\n\n{story}\n\n{question}",
    "date last": "{story}\n\nToday is {day}.\n\n{question}",
}
for name, form in forms.items():
    assert caching.reset_prefix_cache()
    counts = []
    for day, question in zip(dates, story.questions, strict=False):
        content = form.format(day=day, story=story.text, question=question.text)
        (output,) = caching.chat([{"role": "user", "content": content}], greedy, use_tqdm=False)
        counts.append(output.num_cached_tokens)
    print(f"{name}: found {counts}")
    assert counts == ([0, 0, 0, 0] if name == "date first" else [0, 144, 144, 144])

# %% [markdown]
# The same words, and everything is lost or nearly everything is found. **Put first what stays the same, and last what
# changes**: rules, then examples, then the document, then the date, then the question. A time of day, a user's name or
# a random id in the first line of a system prompt makes prefix caching useless.
#
# ### Requests that arrive together
#
# Five questions about a story arrive at the same moment, on an engine that has not seen it. Must each compute the story
# for itself, or one of them be sent ahead? No. The scheduler knows which blocks a step will fill, and gives them to the
# next requests of the same step, although nothing is in them yet. It may: a layer writes the keys and values of *all*
# tokens of a step before any of them attends.

# %%
assert caching.reset_prefix_cache()
five = [messages(story, question) for question in story.questions[:5]]
at_once = [output.num_cached_tokens for output in caching.chat(five, greedy, use_tqdm=False)]
afterwards = [output.num_cached_tokens for output in caching.chat(five, greedy, use_tqdm=False)]
print("at once:", at_once, " a second time:", afterwards)
assert at_once[0] == 0
assert all(at_once[1:])
assert all(afterwards)

# %% [markdown]
# Requests of later steps are told of a block only when its step has been computed. So a step that is interrupted leaves
# nothing behind that could be taken for a block's content.
#
# ## 5 · When it does not help, and what it costs
#
# **A full pool.** What is remembered lies in free blocks, and free blocks are given out. With a pool that has room for
# one story, the second story drives out much of the first:

# %%
for num_blocks in (15, 40):
    with on_laptop(num_gpu_blocks_override=num_blocks, max_model_len=240) as narrow:
        counts = []
        for story_number in (0, 1, 0, 1):
            some = told[story_number]
            (output,) = narrow.chat(messages(some, some.questions[0]), greedy, use_tqdm=False)
            counts.append(output.num_cached_tokens)
    print(f"{num_blocks} blocks: found {counts}")
    assert (counts[2] > 100) == (num_blocks == 40)

# %% [markdown]
# In the small pool, not quite everything is lost: a beginning survives, as in notebook 08, section 7.
#
# **Work.** Every full block of every request is hashed, found or not. It is not much:

# %% tags=["nbval-ignore-output"]
long_text = [token % 1000 for token in range(16_000)]
start = time.perf_counter()
hashes = len(block_chain(long_text, size))
seconds = time.perf_counter() - start
print(f"{hashes} blocks hashed in {1000 * seconds:.1f} ms, {1e6 * seconds / hashes:.1f} µs each")

# %% [markdown]
# **Nothing in common.** Prompts that part within the first block share nothing, and short prompts with long answers
# hardly profit from `n` (section 2). And decoding need not be faster for it: with most kernels, every sequence still
# reads all its keys and values for every token, whether others hold them too or not. (Juravsky et al. 2024, §3, read
# common blocks once for all. The package's CPU kernel does so with the blocks that *all* sequences of a step begin
# with, its GPU kernel does not.)
#
# ## 6 · All three side by side
#
# Here, beside Kwon et al. 2023. Samples are counted at the answers' ends, over lengths spread around the paper's means
# (section 2 has them over all steps too, where more is saved); beams over all steps, at the mean lengths:

# %%
print(f"{'blocks saved (n = 2, 4, 6)':34s} {'here':>22s}   Kwon et al. 2023")
published = {"Alpaca": ("6.1 % to 9.8 %", "37.6 % to 55.2 %"), "ShareGPT": ("16.2 % to 30.5 %", "44.3 % to 66.3 %")}
for kind, here in enumerate((saved_by_samples, saved_by_beams)):
    for name in lengths:
        row = "  ".join(f"{here[name, n]:6.1%}" for n in (2, 4, 6))
        label = f"{('samples', 'beams')[kind]}, {name}'s lengths"
        print(f"{label:34s} {row:>22s}   {published[name][kind]} (§6.3)")
print(f"{'five questions about a story':34s} {saved_by_prefix:22.1%}   no figure for memory (see below)")

# %% [markdown]
# How to read it:
#
# - **Samples** depend on lengths only, and with lengths like the paper's we come near its figures, with another model
#   on another machine.
# - **Beams** depend on the model and on the text. The paper's OPT-13B and our `tiny` need not agree, and our lengths
#   are the means only. The tendency is the same: more than samples, more with more beams, more with long prompts.
# - **Shared prefixes**: the paper reports throughput, not memory: 1.67 times that of Orca (Oracle) when a one-shot
#   prefix is shared, 3.58 times with five examples (LLaMA-13B, translation, §6.4). A share of blocks saved by a prefix
#   says more about the workload than about the engine: with $n$ requests at once it tends to the prefix's share of the
#   text, times $(n-1)/n$. It is the same formula once more.
#
# ## What to take along
#
# | | samples | beams | prefixes |
# | --- | --- | --- | --- |
# | who knows that they share | the request | the search | nobody: hashes are compared |
# | shared | the prompt's full blocks | and the trunk of the tree | full blocks from the first token on |
# | partly filled block | shared until written, then copied | likewise, at each parting | never shared |
# | saves | memory | memory and copying | arithmetic, and memory when together |
# | decided by | $\frac{n-1}{n}\cdot\frac{p}{p+a}$ | when beams part | the order of what the prompt is made of |
#
# - A fork copies no keys and no values. A write copies one block at most.
# - Sharing changes where keys and values lie, not what they are: the answers were the same each time we looked.
# - Put first what stays the same.
#
# ## Sources
#
# - Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP.
# - Patel et al. 2024, "Splitwise: Efficient Generative LLM Inference Using Phase Splitting", ISCA.
# - Zheng et al. 2024, "SGLang: Efficient Execution of Structured Language Model Programs", NeurIPS.
# - Juravsky et al. 2024, "Hydragen: High-Throughput LLM Inference with Shared Prefixes", arXiv:2402.05099.
#
# ## Exercises
#
# Replace each `None`; when the answer is right, the cell says so.
#
# **1.** Five answers to a prompt of 50 tokens have stored 30 tokens each, in blocks of 16. How many blocks are held?

# %%
blocks_held = None

if blocks_held is not None:
    real = Sharing.of(map(TableState.of, fork_samples(prompt=50, answer=30, n=5, block_size=16)))
    assert blocks_held == real.held, "how many of the prompt's blocks are full?"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `blocks_held = 13`: three full blocks of prompt once; 80 tokens take five blocks, so two more for each of the five
# answers: 3 + 5 · 2.
#
# </details>
#
# **2.** Beams have the prompt and the first `parted` tokens of the answer in common, and then go separate ways. Write
# the number of blocks held when each has `written` tokens in all of the answer, of which more than `parted`.


# %%
def blocks_of_beams(width, prompt, parted, written, block_size):
    """Blocks that `width` beams hold."""
    return None


if blocks_of_beams(2, 16, 0, 1, 16) is not None:
    for width, before, parted, written in ((4, 19, 30, 58), (2, 16, 16, 17), (6, 5, 0, 40), (3, 30, 2, 3)):
        trunk = fork_samples(before + parted, written - parted, width, 16)
        real = Sharing.of(map(TableState.of, trunk)).held
        assert blocks_of_beams(width, before, parted, written, 16) == real, (width, before, parted, written)
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def blocks_of_beams(width, prompt, parted, written, block_size):
#     common = (prompt + parted) // block_size
#     each = -(-(prompt + written) // block_size)
#     return common + width * (each - common)
# ```
# For the memory, the trunk is nothing but a longer prompt.
#
# </details>
#
# **3.** The engine finds blocks of `block_size` tokens. A prompt of `length` tokens has its first `common` tokens in
# common with one that was computed before. How many tokens are taken as found? (Do not forget the prompt that is found
# whole: notebook 08, section 6, "On the real engine".)


# %%
def tokens_found(common, length, block_size):
    """`num_cached_tokens` of the second prompt."""
    return None


if tokens_found(16, 40, 16) is not None:
    one_token = SamplingParams(temperature=0, max_tokens=1)
    for common, length in ((40, 60), (32, 40), (15, 30), (48, 48), (47, 48), (64, 64)):
        caching.reset_prefix_cache()
        changed = [*text[:common], *[(token + 1) % 1000 for token in text[common:length]]]
        for ids in (text[:length], changed):
            (output,) = caching.generate([ids], one_token, use_tqdm=False)
        assert tokens_found(common, length, 16) == output.num_cached_tokens, (common, length)
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def tokens_found(common, length, block_size):
#     return min(common // block_size * block_size, length - 1)
# ```
#
# </details>
#
# **4.** A service wants the date, the rules, the story and the question in its prompt, the date and the rules in the
# system message. The date changes daily; the rules never. Write the messages so that a new day costs as little as
# possible. You may move the date to where you like.


# %%
def daily_messages(day, story, question):
    """The conversation to send: the words `Today is <day>.`, `rules`, the story and the question are in it."""
    return None


if daily_messages("Monday", told[0], told[0].questions[0]) is not None:
    caching.reset_prefix_cache()
    for day, question in zip(dates, told[0].questions, strict=False):
        conversation = daily_messages(day, told[0], question)
        words = " ".join(message["content"] for message in conversation)
        assert all(part in words for part in (f"Today is {day}.", rules, told[0].text, question.text))
        (output,) = caching.chat(conversation, greedy, use_tqdm=False)
    assert output.num_cached_tokens >= 160, "what stands before the story must not change"
    print("right: found", output.num_cached_tokens, "of", len(output.prompt_token_ids))

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def daily_messages(day, story, question):
#     content = f"{story.text}\n\nToday is {day}.\n\n{question.text}"
#     return [{"role": "system", "content": rules}, {"role": "user", "content": content}]
# ```
# The date has to leave the system message: there, even at its end, it would stand before the story.
#
# </details>
#
# **5.** Prompts are 60 % of the text, and blocks are so small that the approximation of section 2 holds. How many
# samples are needed at least to save half of the memory?

# %%
samples_needed = None

if samples_needed is not None:
    assert sharing_of_samples(600, 400, samples_needed, 1).saved >= 0.5, "not yet half"
    assert sharing_of_samples(600, 400, samples_needed - 1, 1).saved < 0.5, "fewer would do"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `samples_needed = 6`: $\frac{n-1}{n} \cdot 0.6 \ge 0.5$ means $n \ge 6$.
#
# </details>
#
# ---
# **Back:** [11_continuous_batching](11_continuous_batching.ipynb) · **Next:**
# [13_making_it_fast](13_making_it_fast.ipynb): where the time of a step goes, and how to get it back.
