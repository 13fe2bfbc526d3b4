# %% [markdown]
# # 11 · Continuous batching
#
# Many users ask at different times, and their answers end at different times. The model should work on many of them
# together. Who sits in the batch, and when may somebody join or leave? This notebook is about the part of the engine
# that decides this, step by step: the **scheduler**.
#
# **By the end of this notebook you will be able to**
#
# - say how much of a static batch idles, and count it for real traffic;
# - read the scheduler, and predict which tokens of which requests a step computes;
# - read the tensors of a mixed step: whose token, at which position, into which slot;
# - choose a token budget, knowing what it does to running answers and to new prompts;
# - explain what happens when memory runs out, why it costs only time, and why it always ends;
# - look at what your own engine did, in a timeline.
#
# **You need** notebooks [06](06_kv_cache.ipynb) (the KV cache) and [08](08_paged_blocks.ipynb) (blocks);
# [09](09_paged_attention.ipynb) says what a kernel does with the batch that is made here. No GPU.
#
# **New here**: notebooks 08 to 10 took the batch as given. Now requests come and go, and somebody decides at every step
# which of their tokens are computed.
#
# **Time**: about 75 minutes (it runs in about 25 s on two cores).

# %%
import json
import random
import tempfile
from collections import deque
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt

import minillm
from minillm import LLM, SamplingParams
from minillm.cache.block_pool import BlockPool
from minillm.engine.request import Request
from minillm.engine.scheduler import Scheduler, SchedulerConfig
from minillm.engine.trace import Trace
from minillm.errors import InvalidRequestError
from minillm.simulate.simulator import CostModel, serve, simulate
from minillm.simulate.trace import Arrival, load_trace
from minillm.training.stories import tell
from minillm.viz import (
    explore_schedule,
    idle_seat_steps,
    num_steps,
    plot_flat_batch,
    plot_lines,
    plot_schedule,
    plot_seats,
    plot_timeline,
    plot_token_gaps,
    seat_plan,
    show_source,
    token_times,
)

# %% [markdown]
# ## 1 · Where we stand
#
# Two facts of notebook 06 meet here. **Decode is cheap together**: a pass reads every weight once, whether it writes a
# token for one sequence or for fifty. And **memory decides how many** sequences can be together; notebooks 07 to 09
# have removed most of the waste there.
#
# So a server wants a full batch, always. That would be easy if all answers were equally long. Here are the first 32
# requests of a real conversation service (Azure's trace of 2023, published with Patel et al. 2024):

# %%
traffic = load_trace(limit=32)
outputs = [request.output_tokens for request in traffic]
print("tokens of the answers:", outputs)
print(f"shortest {min(outputs)}, longest {max(outputs)}, mean {sum(outputs) / len(outputs):.0f}")

# %% [markdown]
# ## 2 · Static batching
#
# The plain way: wait until there are enough requests, put them into a batch, run it until all have ended, take the next
# batch. This is how a batch is treated when a network answers in a single pass, and it is what early servers of
# language models did. The 32 requests on 8 seats, all of them there from the beginning:

# %%
static = seat_plan(outputs, seats=8, continuous=False)
wasted = idle_seat_steps(static) / (8 * num_steps(static))
plot_seats(static, title=f"Static batches: {wasted:.0%} of the seats' time is idle, and all wait for the longest")
plt.show()

# %% [markdown]
# A **step** is one pass of the model; a request that sits in a seat gets a token from each. What is hatched are rows
# whose request has ended while the longest of the batch goes on. Count them by hand to be sure: in each batch, every
# request idles for as many steps as it is shorter than the longest.

# %%
batches = [outputs[start : start + 8] for start in range(0, 32, 8)]
idle = sum(max(batch) - length for batch in batches for length in batch)
assert idle == idle_seat_steps(static)
assert num_steps(static) == sum(max(batch) for batch in batches)
print(f"{idle:,} idle row-steps, {sum(outputs):,} useful ones, {num_steps(static)} steps")

# %% [markdown]
# This does harm twice. Seats idle; and a request that comes while a batch runs waits for its end, even where a seat has
# been idle for long. Yu et al. (2022, §3) name both: *early-finished* and *late-joining* requests.
#
# ## 3 · A new decision at every step
#
# Their answer is **iteration-level scheduling** (§3): decide who sits in the batch again before *every* step. Who has
# ended leaves at once; who waits takes the seat for the next step. Others call it **continuous batching**.

# %%
continuous = seat_plan(outputs, seats=8, continuous=True)
wasted = idle_seat_steps(continuous) / (8 * num_steps(continuous))
plot_seats(continuous, title=f"Continuous: the same requests in {num_steps(continuous)} steps, {wasted:.0%} idle")
plt.show()
assert num_steps(continuous) < 0.7 * num_steps(static)

# %% [markdown]
# What is still idle here is only the end, when nobody is left to take a seat. With requests that keep coming there is
# no such end.
#
# ### No prefill and no decode
#
# The picture leaves out a difficulty: a request that joins has a whole prompt to compute, while the others need one
# token each. The scheduler gets rid of this difference with two numbers. Every request has
#
# - `num_tokens`: its prompt and what has been written so far,
# - `num_computed_tokens`: those whose keys and values are stored.
#
# The second **catches up** with the first. In a new request it is behind by the length of the prompt. In one that
# writes it is behind by one: the token that was just chosen has not been through the model yet.

# %%
show_source(Request.num_uncomputed_tokens.fget)

# %% [markdown]
# Whenever a part of a step reaches the end of a request's tokens, there are logits for the next one:

# %%
from minillm.engine.scheduler import Scheduled

show_source(Scheduled.samples.fget)

# %% [markdown]
# So a step is a list of parts (request, first token, how many). Its size is limited by a **budget** of tokens
# (`max_num_batched_tokens`) and by the number of seats (`max_num_seqs`). Requests that run come first, then those that
# wait:

# %%
show_source(Scheduler.schedule)

# %% [markdown]
# Among the running ones, those that need a single token are first. They are what somebody is watching appear on a
# screen, and they cost little of the budget. What is left goes to prompts that have been begun.

# %%
show_source(Scheduler._schedule_running)

# %% [markdown]
# Then the queue, first come, first served, as long as there are seats, budget and blocks. (`_found_blocks` looks for
# blocks that another request has filled with the same tokens. Notebook 12 is about that; until section 6 we switch it
# off.)

# %%
show_source(Scheduler._schedule_waiting)

# %% [markdown]
# If the first in the queue does not fit, nobody behind it is tried, even if it would. Why? A large request could
# otherwise be overtaken for as long as small ones come. Exercise 4 shows what that is like.
#
# The rest is bookkeeping. When the model has computed a step, `Scheduler.computed` moves each `num_computed_tokens` on
# by what its part had; the sampler's token makes `num_tokens` one larger; and who has ended is taken out.
#
# ### Eight prompts, three seats
#
# Now with the real engine. `trace=True` makes it keep a record of every step. Every request is told how much to write,
# so that we can compare.

# %%
tokenizer = minillm.get_tokenizer("tiny")
text = [token for number in range(12) for token in tokenizer(tell(random.Random(number)).text).input_ids]


def cut(lengths):
    """Prompts of these lengths, all different: pieces of stories."""
    return [text[100 * number + 20 :][:length] for number, length in enumerate(lengths)]


def writing(outputs):
    """Parameters that make each request write exactly so many tokens."""
    return [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in outputs]


def engine(**sizes):
    return LLM("tiny", dtype="float32", device="cpu", trace=True, **sizes)


# %%
prompt_lengths, output_lengths = [6, 40, 9, 14, 5, 24, 8, 11], [12, 6, 20, 4, 15, 8, 3, 10]
prompts, params = cut(prompt_lengths), writing(output_lengths)
sizes = {"max_num_seqs": 3, "max_num_batched_tokens": 64, "enable_prefix_caching": False}
llm = engine(**sizes)
together = llm.generate(prompts, params, use_tqdm=False)
trace = Trace(list(llm.trace.steps))
plot_timeline(trace, title=f"Three seats: whoever ends is followed at the next step ({len(trace.steps)} steps)")
plt.show()

# %% [markdown]
# Each row is a request, each bar a step. A blue bar is a prompt (the number says how many tokens), a green one a
# decode. Look down a column: steps 6, 10, 12 and 20 compute a prompt *and* the other requests' next tokens, in one
# pass. The number of steps is what the plan of the seats says, since here every prompt fits into the step's budget
# whole.

# %%
plan = seat_plan(output_lengths, seats=3, continuous=True)
assert len(trace.steps) == num_steps(plan)
mixed = [n for n, step in enumerate(trace.steps) if len({part.count == 1 for part in step.parts}) == 2]
print("steps with a prompt and decodes:", mixed)

# %% [markdown]
# What would a static scheduler do? It is ours with one rule changed: nobody joins while somebody runs.


# %%
class StaticScheduler(Scheduler):
    """Requests join only when all of the batch before have ended."""

    def _schedule_waiting(self, step):
        if not self.running:
            super()._schedule_waiting(step)


# %%
static_llm = engine(**sizes)
ours = static_llm.engine.scheduler
static_llm.engine.scheduler = StaticScheduler(ours.config, ours.pool)
apart = static_llm.generate(prompts, params, use_tqdm=False)
plot_timeline(static_llm.trace, title=f"Static batches of three: {len(static_llm.trace.steps)} steps")
plt.show()
assert len(static_llm.trace.steps) == num_steps(seat_plan(output_lengths, seats=3, continuous=False))

# %% [markdown]
# Same requests, same tokens, other steps. And are the tokens really the same, whoever else sits in the batch? Here is
# every request once more, alone:

# %%
alone = [llm.generate([prompt], [one], use_tqdm=False)[0] for prompt, one in zip(prompts, params, strict=True)]
for number in range(len(prompts)):
    expected = alone[number].outputs[0].token_ids
    assert together[number].outputs[0].token_ids == apart[number].outputs[0].token_ids == expected
print("the same tokens: together, in static batches, alone")

# %% [markdown]
# (To be exact: a product of another shape rounds otherwise, so logits differ in their last digits, and where two tokens
# are equally likely up to those digits, the choice may differ. In float32 with this model no such case occurs here.)
#
# ## 4 · A mixed step, as the model gets it
#
# A prompt of 14 tokens and two single tokens in one pass: how does one put that into a tensor? A padded batch, as in
# notebook 06, would be a rectangle as wide as its widest row. Most of the model does not need one. Norms, projections
# and the feed-forward network work on each token alone and do not ask whose it is; only attention must know (Yu et al.
# 2022 call this *selective batching*). So the engine puts all tokens of a step into **one flat row**.
#
# `LLM` steps the engine in a loop. We step it by hand: two short requests first, and a longer one when they are
# writing. Blocks have 4 tokens, so that there are some to see.

# %%
small = engine(max_num_seqs=4, max_num_batched_tokens=16, block_size=4, enable_prefix_caching=False)
a, b, c = cut([6, 3, 20])
small.engine.add_request("a", a, writing([10])[0])
small.engine.add_request("b", b, writing([10])[0])
for _ in range(3):
    small.engine.step()
small.engine.add_request("c", c, writing([10])[0])
outputs_so_far = small.engine.step()

# %%
step = small.trace.steps[-1]
counts = {part.name: part.count for part in step.parts}
plot_flat_batch(counts, title="One step: two decodes and the first 14 tokens of a prompt")
plt.show()
assert counts == {"a": 1, "b": 1, "c": 14}

# %% [markdown]
# `ModelRunner._fill_inputs` describes this row to the key/value store. Its tensors still hold what they were filled
# with for this step:

# %%
runner = small.engine.runner
batch = runner.kv._batch
total = sum(counts.values())
for name, tensor in (
    ("tokens", runner.tokens[:total]),
    ("positions", runner.positions[:total]),
    ("slot_mapping", batch.slot_mapping),
    ("query_starts", batch.query_starts),
    ("seq_lens", batch.seq_lens),
):
    print(f"{name:13s}", tensor.tolist())
print("block_tables ", batch.block_tables.tolist())

# %% [markdown]
# Read it column by column. The first token is `a`'s: it stands at position 8, the ninth token of `a`, and goes into the
# slot that `a`'s block table says. `b`'s is at position 5. Then come positions 0 to 13 of `c`. `query_starts` says
# where in the row each request begins, and `seq_lens` how many keys each has when this step's are stored. Rows of the
# block table that are shorter are filled up with anything; `seq_lens` says where to stop.
#
# All this can be worked out from the trace:

# %%
positions = [position for part in step.parts for position in range(part.start, part.start + part.count)]
slots = [
    part.blocks[position // 4] * 4 + position % 4
    for part in step.parts
    for position in range(part.start, part.start + part.count)
]
assert runner.positions[:total].tolist() == positions
assert batch.slot_mapping.tolist() == slots
assert batch.query_starts.tolist() == [0, 1, 2, 16]
assert batch.seq_lens.tolist() == [part.start + part.count for part in step.parts]

# %% [markdown]
# The code that makes it is about as long as this check:

# %%
from minillm.engine.runner import ModelRunner

show_source(ModelRunner._fill_inputs)

# %% [markdown]
# Attention over this description is `paged_attention` (notebook 09, and on a GPU the kernels of notebook 10). After the
# last layer, logits are computed only for the last token of a part, and only where it `samples`: for `a` and `b`, and
# not for `c`, whose prompt is not finished. A vocabulary's logits for 14 tokens that nobody asks for would be wasted
# work.

# %%
print({part.name: part.samples for part in step.parts})
while small.engine.has_unfinished_requests:
    small.engine.step()

# %% [markdown]
# ## 5 · Chunked prefill
#
# `c` did not get its whole prompt computed, since the budget was used up. What is the budget good for, if it makes a
# prompt wait? Suppose three users read answers as they appear, and a fourth sends a prompt of 2,000 tokens. That is a
# long step, if the prompt is computed whole.
#
# `tiny` on a laptop is no good measure for it. We take the **simulator**: the real scheduler and the real block pool,
# with a runner that computes nothing and only moves a clock. What a step takes is a fixed part (reading the weights), a
# part for each token that is computed, and a small part for each stored token that is read:

# %%
show_source(CostModel)

# %% [markdown]
# A budget so large that the prompt fits whole:

# %%
readers = [Arrival(0.0, 200, 14), Arrival(0.0, 210, 14), Arrival(0.0, 220, 14)]
newcomer = Arrival(0.03, 2000, 6)  # seconds, prompt tokens, output tokens
memory = {"num_blocks": 64, "block_size": 64}
whole = simulate([*readers, newcomer], max_num_batched_tokens=4096, **memory)
plot_timeline(whole.trace, x="time", title="Whole prompts: one long step, and three answers stand still")
plt.show()

# %% [markdown]
# The horizontal axis is time now. The step with 2,000 tokens gives each of the others its next token, too, but it gives
# it late. Agrawal et al. (2024) call this a *generation stall*. Their remedy (§4) is to compute a prompt in **chunks**,
# with as many tokens a step as the budget leaves beside the decodes:

# %%
chunked = simulate([*readers, newcomer], max_num_batched_tokens=256, **memory)
plot_timeline(chunked.trace, x="time", title="Chunks: no step is long, and answers go on")
plt.show()

# %% [markdown]
# No new code was needed for this: `_schedule_waiting` takes `min(what is uncomputed, what is left of the budget)`, and
# a request whose prompt is not finished yet is a running one that needs more than one token.
#
# ### What it costs
#
# A larger case: eight users read, and a prompt of 8,000 tokens comes after half a second. Each dot is a token; its
# height is how long its reader waited for it.

# %%
readers = [Arrival(0.0, 200 + 10 * number, 150) for number in range(8)]
newcomer = Arrival(0.5, 8000, 20)


def with_budget(tokens):
    sizes = {"num_blocks": 256, "block_size": 64, "max_num_seqs": 16}
    return simulate([*readers, newcomer], **sizes, max_num_batched_tokens=tokens)


pair = {f"budget {tokens:,}": with_budget(tokens).trace for tokens in (8192, 512)}
plot_token_gaps(pair, newcomer="8", title="One long stall, or a stretch of slower tokens")
plt.show()

# %% [markdown]
# The longest wait between two tokens of a reader, and the newcomer's time to its first token, for many budgets:


# %%
def longest_gap(result):
    """The longest wait of a reader between two tokens, in ms."""
    times = token_times(result.trace)
    return max(1000 * (after - before) for name in map(str, range(8)) for before, after in pairwise(times[name]))


def first_token(result, number):
    """From a request's arrival to its first token, in ms."""
    metrics = result.metrics[number]
    return 1000 * (metrics.first_token_time - metrics.arrival_time)


# %%
budgets = [2**power for power in range(4, 14)]
results = [with_budget(tokens) for tokens in budgets]
gaps, firsts = [longest_gap(result) for result in results], [first_token(result, 8) for result in results]
curves = {"readers: longest wait between two tokens": gaps, "newcomer: time to its first token": firsts}
labels = {"xlabel": "max_num_batched_tokens", "ylabel": "ms", "scale": "log"}
plot_lines(budgets, curves, **labels, title="The budget trades the readers' waits against the newcomer's")
plt.show()

# %%
for tokens in (16, 512, 8192):
    at = budgets.index(tokens)
    print(f"budget {tokens:5,}: {gaps[at]:6.1f} ms between tokens, first token after {firsts[at]:7,.1f} ms")
assert gaps == sorted(gaps)
assert firsts == sorted(firsts, reverse=True)
assert gaps[-1] > 10 * gaps[budgets.index(512)]
assert firsts[budgets.index(512)] < 1.5 * firsts[-1]

# %% [markdown]
# A small budget makes many steps, and each pays the fixed part for reading the weights: that is why the newcomer's
# curve rises steeply on the left. On the right it is flat, since there the arithmetic of 8,000 tokens is what takes the
# time, and it does not matter how it is cut. In between lies a broad region in which both are good. Where it is depends
# on the machine. Agrawal et al. choose the budget from measurements, for a given limit on the time between tokens.
#
# (Chunks do cost something more: each chunk reads the keys and values of all chunks before it. In the cost model this
# is the last term, and it is small.)
#
# ## 6 · When memory runs out
#
# The scheduler lets a request in when there are blocks for the tokens of *this* step. It does not ask what the answer
# will need later, since nobody knows. That is how blocks fill the memory so well (notebook 08). But it means that
# requests that all run may need more blocks than there are. Then somebody must give way.

# %%
show_source(Scheduler._make_room)

# %%
show_source(Scheduler._preempt)

# %% [markdown]
# The **youngest** running request gives back all its blocks and goes to the *front* of the queue, and
# `num_computed_tokens` becomes 0. That is the whole mechanism. When there is room again it is scheduled like any other:
# the number catches up with `num_tokens` once more, this time over prompt *and* what has been written. Nothing that a
# user has seen is lost. Kwon et al. (2023, §4.5) call this **recomputation** (the alternative there is *swapping*,
# which copies the blocks to the CPU's memory and back).
#
# Five requests, a pool of 14 blocks of 8 tokens:

# %%
prompt_lengths, output_lengths = [27, 21, 35, 20, 23], [14, 8, 19, 18, 27]
prompts, params = cut(prompt_lengths), writing(output_lengths)
sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 8}
tight = engine(**sizes, num_gpu_blocks_override=14, enable_prefix_caching=False)
pressed = tight.generate(prompts, params, use_tqdm=False)
plot_timeline(tight.trace, title="A pool too small: the youngest loses its blocks, and computes again later")
plt.show()

# %% [markdown]
# The trace says who lost its blocks and when. Did the answers suffer? We ask an engine with blocks in plenty:

# %%
lost = {number: step.preempted for number, step in enumerate(tight.trace.steps) if step.preempted}
print("step → who lost its blocks:", lost)
roomy = engine(**sizes)
for ours, theirs in zip(pressed, roomy.generate(prompts, params, use_tqdm=False), strict=True):
    assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
assert len(lost) == 3
assert not any(step.preempted for step in roomy.trace.steps)
print("the same tokens as with plenty of blocks")

# %% [markdown]
# It costs time only. How much? A token is computed again when a part begins before the point that its request had
# reached already:


# %%
def computed_again(trace):
    """Tokens that were computed, lost and computed a second time."""
    reached, again = {}, 0
    for step in trace.steps:
        for part in step.parts:
            end = part.start + part.count
            again += max(0, min(end, reached.get(part.name, 0)) - part.start)
            reached[part.name] = max(end, reached.get(part.name, 0))
    return again


# %%
needed = sum(prompt_lengths) + sum(output_lengths) - len(prompts)  # a last token is given out, never computed
computed = sum(part.count for step in tight.trace.steps for part in step.parts)
assert computed == needed + computed_again(tight.trace)
print(f"{needed} tokens are needed, {computed_again(tight.trace)} were computed twice")

# %% [markdown]
# ### Much of it may still be there
#
# A free block keeps its content until it is given out again ([notebook 08](08_paged_blocks.ipynb), section 7). With
# prefix caching on (the default) a preempted request that comes back soon finds its own blocks:

# %%
finding = engine(**sizes, num_gpu_blocks_override=14)
found = finding.generate(prompts, params, use_tqdm=False)
plot_timeline(finding.trace, title="With prefix caching: who comes back finds its blocks")
plt.show()
assert [one.outputs[0].token_ids for one in found] == [one.outputs[0].token_ids for one in pressed]

# %%
again = computed_again(finding.trace)
print(f"computed twice: {computed_again(tight.trace)} tokens without prefix caching, {again} with it")
assert sum(one.metrics.num_preemptions for one in found) == sum(one.metrics.num_preemptions for one in pressed)
assert again < computed_again(tight.trace) / 2

# %% [markdown]
# This was a lucky case: nobody else needed those blocks in between.
#
# ### Why the youngest, and why it always ends
#
# Order the running requests by when they were admitted. Only the last one is ever preempted, so **the oldest never
# is**. It makes progress in every step, since a budget must be at least the number of seats and so leaves a token for
# everybody. Its answer has a limit (`max_tokens`); so it ends and gives its blocks back. Then another one is the
# oldest, and so on. Preempting the oldest instead would tend to throw away the most work, and two large requests could
# take each other's blocks forever.
#
# There is one gap in this argument. The oldest must fit when it is *alone*. That can be checked when it comes, and it
# is:

# %%
try:
    tight.generate([text[:60]], SamplingParams(max_tokens=60), use_tqdm=False)
except InvalidRequestError as error:
    print("InvalidRequestError:", error)

# %% [markdown]
# Such a request is refused at once, with what to change. Otherwise it would take every block, preempt itself, come
# back, and so on without end.

# %%
show_source(Scheduler.add)

# %% [markdown]
# ## 7 · Throughput and latency under load
#
# Back to static against continuous, now with requests that come over time. The first 150 requests of the trace, with
# the times between them stretched or shortened, on 32 seats. `serve` is the loop of `simulate` for a scheduler that we
# bring, so both run on the same cost model.
#
# We are kind to the static one. It takes whoever is waiting when a batch ends, instead of waiting until all seats are
# taken; it computes no padding and no rows that have ended; and it hands out tokens as they are written. The one
# difference is who may join when.


# %%
def load(scheduler_class, budget, arrivals):
    """Mean seconds to the first token, and tokens a second over all."""
    pool = BlockPool(256, 512, enable_prefix_caching=False)
    scheduler = scheduler_class(SchedulerConfig(32, budget, max_model_len=16_384), pool)
    result = serve(arrivals, scheduler, CostModel())
    assert not any(metrics.num_preemptions for metrics in result.metrics)
    first = [metrics.first_token_time - metrics.arrival_time for metrics in result.metrics]
    return sum(first) / len(first), result.tokens_per_second


# %%
traffic = load_trace(limit=150)
rates, static_load, continuous_load = [], [], []
for faster in (0.5, 1, 1.5, 2, 4, 6):
    arrivals = [one._replace(time=one.time / faster) for one in traffic]
    rates.append(len(arrivals) / arrivals[-1].time)
    static_load.append(load(StaticScheduler, 400_000, arrivals))  # a batch's prompts in one step
    continuous_load.append(load(Scheduler, 2048, arrivals))

# %%
curves = {"static": [wait for wait, _ in static_load], "continuous": [wait for wait, _ in continuous_load]}
labels = {"xlabel": "requests a second", "ylabel": "mean time to first token (s)"}
plot_lines(rates, curves, **labels, title="At a moderate load, who comes hardly waits with continuous batching")
plt.show()

# %%
curves = {"static": [speed for _, speed in static_load], "continuous": [speed for _, speed in continuous_load]}
labels = {"xlabel": "requests a second", "ylabel": "tokens a second"}
plot_lines(rates, curves, **labels, title="Under load, the seats that idle are tokens that are not written")
plt.show()

# %%
for rate, (wait, speed), (our_wait, our_speed) in zip(rates, static_load, continuous_load, strict=True):
    print(f"{rate:5.1f} requests/s: static {wait:5.2f} s, {speed:5,.0f} tokens/s; ", end="")
    print(f"continuous {our_wait:5.2f} s, {our_speed:5,.0f} tokens/s")
assert all(ours[0] < theirs[0] / 2 for ours, theirs in zip(continuous_load, static_load, strict=True))
assert all(wait < 0.1 for wait, _ in continuous_load[:2])
assert continuous_load[-1][1] > 1.2 * static_load[-1][1]

# %% [markdown]
# At low rates both write as many tokens as are asked for; there the difference is the wait. At high rates the server is
# the limit, and continuous batching gets more tokens out of the same machine. Yu et al. report a far larger factor
# (36.9 times the throughput of FasterTransformer for GPT-3 175B at the same latency, abstract). They compare two
# engines, of which one returns a batch's answers together; we compare one rule, and were kind.
#
# Look at the right end of the first figure, too. When more comes than can be served, the queue grows for as long as
# that lasts, and no scheduler helps. The mean over 150 requests then says as much about the number of requests as about
# the server.
#
# ## 8 · Your own engine in a timeline
#
# A trace is for looking at. `save` writes it in the format that Chrome defined and many viewers read:

# %%
show_source(Trace.save)

# %%
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "trace.json"
    tight.trace.save(file)
    events = json.loads(file.read_text())["traceEvents"]
kinds = {event["ph"]: event["name"] for event in reversed(events)}
print(len(events), "events; the first of each phase:", kinds)
bars = [event for event in events if event["ph"] == "X"]
assert len(bars) == sum(len(step.parts) for step in tight.trace.steps)

# %% [markdown]
# Save it to a file of your own (`llm.trace.save("trace.json")`), open https://ui.perfetto.dev or `chrome://tracing` and
# drop the file there; it stays in your browser. Each request is a row. A click on a bar shows how many tokens it had,
# where they began, and the blocks. Beside the rows are three curves: requests that wait, requests that run, blocks
# held. Time is real there, so a long step is a long bar. What to look for first: decodes that take long (a prompt
# shares their step), and a curve of blocks that stays at its top (preemption is near).
#
# ## 9 · Step by step
#
# Everything together: chunks, a full pool, a preemption, a queue. Six prompts, four seats, a budget of 16 tokens, 14
# blocks of 8 tokens. This is what the scheduler had decided in step 2:

# %%
sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 8, "num_gpu_blocks_override": 14}
stories = [tokenizer(tell(random.Random(number)).text).input_ids for number in range(6)]
prompts = [story[:length] for story, length in zip(stories, [20, 5, 30, 9, 14, 6], strict=True)]
params = writing([18, 30, 12, 20, 6, 10])
watched = engine(**sizes)
watched.generate(prompts, params, use_tqdm=False)
plot_schedule(watched.trace, 2, watched.engine.scheduler.config)
plt.show()

# %% [markdown]
# At the top are the queues: requests 0 to 2 run, one seat is free, and three wait. Why does request 3 not take the free
# seat? The bar below tells: the budget is used up to the last token. Then the pool, block by block, with the name of
# who holds it. At the bottom the whole timeline, with this step framed.
#
# With a running kernel, move the slider. Predict before you move:
#
# 1. Request 2 has 30 prompt tokens. Into how many chunks are they cut, and why are these not equally long?
# 2. In step 13 somebody loses blocks. Who needs one there, and why is it not the same request?
# 3. In step 14 a seat and 13 tokens of the budget are free. Why does request 3 not come back at once?
# 4. Request 4 has a prompt of 14 tokens. In step 16 it computes 6 of them and writes its first token. How can that be?

# %% tags=["nbval-ignore-output"]
explore_schedule(engine(**sizes), prompts, params)

# %% [markdown]
# <details><summary>Answers</summary>
#
# 1. Three: 7, 14 and 9 tokens, in steps 1 to 3. A chunk is what the budget leaves. In step 1 request 0's last 4 and
#    request 1's 5 tokens come first, in step 2 two decodes, and in step 3 there is nothing more to compute.
# 2. Request 1 does: its 16 stored tokens fill two blocks, and the pool has none left. Request 3 is the youngest. Its
#    last block goes to request 1 at once; the other two are free, but a step that preempts lets nobody in.
# 3. Requests 0 and 2 both begin a new block in this step and take the two that were free. So nothing of request 3
#    survives, and its tokens are computed again from the first one on (steps 15 and 16).
# 4. Its first 8 tokens, "Once upon a time, in a small", are also the first 8 of request 3. They fill a block, and it is
#    found by its content: block 8 is held by two requests, and is drawn hatched, with a "+". Notebook 12 is about that.
#
# </details>
#
# The answers, as the trace has them:

# %%
seen = watched.trace.steps
assert [part.count for step in seen for part in step.parts if part.name == "2"][:4] == [7, 14, 9, 1]
assert seen[13].preempted == ("3",)
assert 0 not in seen[12].ref_counts  # no block is free
assert 0 not in seen[14].ref_counts
four = next(part for part in seen[16].parts if part.name == "4")
assert (four.start, four.count, four.samples) == (8, 6, True)
assert seen[16].ref_counts[four.blocks[0]] == 2

# %% [markdown]
# ## What to take along
#
# | | static batching | continuous batching |
# | --- | --- | --- |
# | the batch is decided | once, for all its requests' life | before every step |
# | who has ended | idles until the longest ends | leaves at once |
# | who comes | waits for the next batch | joins at the next step with a seat, budget and blocks |
#
# - A request is a number that catches up with another. Prefill, decode, chunks and recomputation are the same case.
# - A step is one flat row of tokens; only attention needs to know whose they are.
# - `max_num_batched_tokens` limits how long a step takes. Small: running answers flow. Large: prompts are done sooner.
# - When blocks run out, the youngest gives its own back and computes again. Answers do not change; the oldest always
#   goes on; what could never fit is refused when it comes.
# - A trace shows who waited for whom.
#
# ## Sources
#
# - Yu, Jeong, Kim, Kim and Chun 2022, "Orca: A Distributed Serving System for Transformer-Based Generative Models",
#   OSDI.
# - Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP.
# - Agrawal et al. 2024, "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI.
# - Patel et al. 2024, "Splitwise: Efficient Generative LLM Inference Using Phase Splitting", ISCA.
#
# ## Exercises
#
# Replace each `None`; when the answer is right, the cell says so.
#
# **1.** Three requests are there from the beginning, with prompts of 10, 30 and 5 tokens, and write 4, 3 and 6 tokens.
# There are two seats and a budget of 16 tokens. How many steps are there?

# %%
steps = None

if steps is not None:
    two_seats = engine(max_num_seqs=2, max_num_batched_tokens=16, enable_prefix_caching=False)
    two_seats.generate(cut([10, 30, 5]), writing([4, 3, 6]), use_tqdm=False)
    assert steps == len(two_seats.trace.steps), "write down the parts of each step: decodes first, then prompts"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `steps = 10`. Step 0: 10 tokens of the first prompt and 6 of the second. Step 1: one, and 15. Step 2: one, and the
# last 9, which give the second request's first token. Step 3: one each; the first has written 4 and leaves. Step 4: the
# second writes its third token and leaves, beside the whole third prompt, which gives a first token. Steps 5 to 9: the
# other five.
#
# </details>
#
# **2.** Suppose a static server knew all lengths beforehand, and put requests of similar length together. Compute the
# share of idle seat-steps. (`seat_plan`, `idle_seat_steps` and `num_steps` are of use.)


# %%
def idle_when_sorted(outputs, seats):
    """Share of idle seat-steps in static batches of similar lengths."""
    return None


share = idle_when_sorted(outputs, 8)
if share is not None:
    assert idle_when_sorted([1, 9, 1, 9], 2) == 0, "the two short ones belong together"
    ordered = sorted(outputs)
    rest = sum(max(ordered[at : at + 8]) - length for at in range(0, 32, 8) for length in ordered[at : at + 8])
    assert abs(share - rest / (rest + sum(outputs))) < 1e-9, "idle seat-steps over all seat-steps"
    print(f"right: {share:.0%}")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def idle_when_sorted(outputs, seats):
#     plan = seat_plan(sorted(outputs), seats, continuous=False)
#     return idle_seat_steps(plan) / (seats * num_steps(plan))
# ```
# Much better than in the order of arrival. But nobody knows the lengths beforehand, and requests would have to wait
# until enough of their like have come.
#
# </details>
#
# **3.** The eight readers of section 5 shall never wait more than 20 ms between two tokens. Find the largest budget
# that keeps this promise, to within 20 tokens. Start from the cost model: what does a step with so many tokens take?

# %%
budget = None

if budget is not None:
    assert longest_gap(with_budget(budget)) <= 20, "too large: somebody waits longer"
    assert longest_gap(with_budget(budget + 20)) > 20, "a larger one keeps the promise, too"
    print(f"right: the newcomer has its first token after {first_token(with_budget(budget), 8):.0f} ms")

# %% [markdown]
# <details><summary>Solution</summary>
#
# A step takes 5.3 ms + 0.04 ms for each token + 0.000044 ms for each stored token that is read. At the end of the long
# prompt these are about 8,000, and some 300 for each of the eight: 0.5 ms. `budget = int((20 - 5.3 - 0.5) / 0.04)` is
# 355.
#
# </details>
#
# **4.** *Shortest prompt first* sounds sensible: many are served soon. Write `shortest_first`, and see what becomes of
# one long prompt among many short ones, on a single seat.


# %%
def shortest_first(waiting):
    """The requests that wait, in the order in which they are to be tried."""
    return None


class ShortestFirst(Scheduler):
    def schedule(self):
        self.waiting = deque(shortest_first(list(self.waiting)))
        return super().schedule()


def waits(scheduler_class):
    """Seconds to the first token: forty short prompts, one every 0.1 s, and number 1, a long one."""
    pool = BlockPool(512, 64, enable_prefix_caching=False)
    arrivals = [Arrival(0.01, 4000, 20), *(Arrival(0.1 * number, 100, 20) for number in range(40))]
    result = serve(arrivals, scheduler_class(SchedulerConfig(1, 2048, 16_384), pool), CostModel())
    return [metrics.first_token_time - metrics.arrival_time for metrics in result.metrics]


# %%
if shortest_first([]) is not None:
    fair, greedy = waits(Scheduler), waits(ShortestFirst)
    assert sum(greedy) < sum(fair), "on average it should be quicker"
    assert max(greedy) == greedy[1] > 4, "and the long one should be last"
    print(
        f"right: mean {sum(fair) / 41:.2f} → {sum(greedy) / 41:.2f} s, the long one {fair[1]:.2f} → {greedy[1]:.2f} s"
    )

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def shortest_first(waiting):
#     return sorted(waiting, key=lambda request: len(request.prompt_token_ids))
# ```
# The mean falls, and the long prompt is overtaken by every short one that comes. It **starves**: it is served when no
# more of them come. First come, first served has a worse mean, and a bound: whoever is first in the queue stays first.
#
# </details>
#
# **5.** How many blocks must the pool of section 6 have at least, so that none of the five requests is preempted? Try
# to say it before you search.

# %%
enough = None

if enough is not None:
    lengths, counts = [27, 21, 35, 20, 23], [14, 8, 19, 18, 27]
    lost = {}
    for blocks in (enough, enough - 1):
        one = engine(**sizes | {"max_num_batched_tokens": 64, "num_gpu_blocks_override": blocks})
        one.generate(cut(lengths), writing(counts), use_tqdm=False)
        lost[blocks] = any(step.preempted for step in one.trace.steps)
    assert not lost[enough], "somebody still loses blocks"
    assert lost[enough - 1], "fewer are enough"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `enough = 19`. It is the largest number of blocks that are held in any step when there are plenty:
# `max(sum(count > 0 for count in step.ref_counts) for step in roomy.trace.steps)`. All five at their full length would
# take 28, but they are never all there at once, and not all of them at their full length.
#
# </details>
#
# ---
# **Back:** [10_triton_kernels](10_triton_kernels.ipynb) · **Next:** [12_sharing](12_sharing.ipynb): how much memory and
# work is saved when sequences that begin alike hold the same blocks.
