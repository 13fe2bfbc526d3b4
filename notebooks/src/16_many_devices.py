# %% [markdown]
# # 16 · Many devices
#
# A model may be too large for one device, or too slow on it, or asked by too many people at once. Then there are two
# things that several devices can do. They can **share** one model, each with a part of every matrix: this is *tensor
# parallelism*. Or each can hold a whole **copy** (a *replica*), and the requests are dealt out. This notebook cuts a
# model by hand, runs it in two processes, counts what they send each other, and asks which of the two to choose.
#
# **By the end of this notebook you will be able to**
#
# - cut the matrices of a Transformer so that two devices need only two sums a layer, and say why;
# - say what happens to heads, to key/value heads and to the vocabulary;
# - draw an all-reduce on a ring, and compute how many bytes each device sends for a token;
# - run a model in two processes and show that they write what one writes;
# - decide whether to shard or to replicate, from a link's latency and bandwidth and from the load.
#
# **You need** notebooks [03](03_attention.ipynb) (heads), [11](11_continuous_batching.ipynb) (the engine and the
# simulator) and [15](15_deploy_glm4.ipynb) (what fits on a card). No GPU: two processes stand for two devices.
#
# **New here**: until now one process held all weights. Now each holds a part, and no part is a model.
#
# **Time**: about 60 minutes (it runs in about 25 s on two cores).

# %%
import os
import signal
from dataclasses import asdict

import matplotlib.pyplot as plt
import torch

import minillm
from minillm import LLM, SamplingParams
from minillm.errors import MinillmError
from minillm.simulate.parallel import NETWORK, NVLINK, PCIE, Link, Service, Sums, sharded_cost, simulate_replicas
from minillm.simulate.simulator import CostModel, simulate
from minillm.simulate.trace import load_trace
from minillm.transformer.blocks import ResidualNorm
from minillm.transformer.kv import NoCache, PaddedBatch
from minillm.transformer.parallel import VocabParallelEmbedding, cut_of, shard_config
from minillm.viz import (
    explore_sharding,
    plot_rank_heads,
    plot_ring,
    plot_shard_or_replicate,
    plot_sharded_step,
    plot_split,
    ring_sends,
    show_source,
    step_parts,
)

# %% [markdown]
# ## 1 · Two matrices, by hand
#
# Most of a Transformer is pairs of matrices. In the feed-forward network the first makes many hidden numbers, a
# function is applied to each of them, and the second brings them back. A small pair, with numbers that can be checked
# in the head:

# %%
x = torch.tensor([[1.0, 2, 0], [0, 1, 1]])  # [tokens, hidden]
first = torch.tensor([[1.0, -2, 0, 1], [2, 1, -1, 0], [0, 1, 3, -1]])  # [hidden, units]
second = torch.tensor([[1.0, 0], [2, 1], [0, -1], [1, 1]])  # [units, out]
whole = (x @ first).relu() @ second
plot_split(x, first, second, size=2)
plt.show()

# %% [markdown]
# Each process of a group is called a **rank**. Follow rank 0 from left to right. It has all of `x`, and the first two
# *columns* of the first matrix. So it gets the first two columns of the product, and they are final: nothing of the
# other columns is in them. It applies relu to them, without asking anybody. Then it needs the *rows* of the second
# matrix that these two columns meet, and no others.
#
# What comes out has the right shape, but it is only a part of each sum. The parts of both ranks added up are the
# output:

# %%
parts = []
for rank in range(2):
    own = slice(2 * rank, 2 * rank + 2)
    parts.append((x @ first[:, own]).relu() @ second[own])
assert torch.equal(parts[0] + parts[1], whole)
print("part of rank 0:", parts[0].tolist(), "· of rank 1:", parts[1].tolist(), "· sum:", whole.tolist())

# %% [markdown]
# So a pair cut **first by columns, then by rows** needs one sum, at its end (Shoeybi et al. 2019, §3). The other way
# round, the first matrix would be cut by rows. Then the product itself would be a sum of parts, and relu of a sum is
# not the sum of relus:

# %%
by_rows = [x[:, :2] @ first[:2], x[:, 2:] @ first[2:]]
assert torch.equal(by_rows[0] + by_rows[1], x @ first)
print("relu of the sum: ", (by_rows[0] + by_rows[1]).relu().tolist())
print("sum of the relus:", (by_rows[0].relu() + by_rows[1].relu()).tolist())
assert not torch.equal(by_rows[0].relu() + by_rows[1].relu(), (x @ first).relu())

# %% [markdown]
# It would take a sum before relu as well: twice as much talk. With columns both times, the second matrix would need all
# hidden numbers on every rank, and there are more of these than of outputs.
#
# ## 2 · A real layer
#
# Now `tiny`. The package says what a rank keeps of each matrix. A weight is stored as `[out, in]`, so what was “columns
# of the first” is *rows* of the stored one:

# %%
show_source(cut_of)

# %%
model = minillm.load_model("tiny", dtype="float32", device="cpu")
config = model.config
for module in ("attention.qkv", "attention.out", "feed_forward.gate_up", "feed_forward.down"):
    rows, columns = cut_of(module, "", config, rank=1, size=2)
    print(f"{module:20s} {tuple(model.layers[0].get_submodule(module).weight.shape)!s:12s} {rows=} {columns=}")

# %% [markdown]
# `qkv` holds the rows of q, of k and of v one behind the other, so a rank keeps a piece of each; likewise gate and up.
# The feed-forward network of the first layer, by hand, with these pieces:


# %%
def kept(module, rank, size=2):
    """What a rank keeps of a matrix of the first layer."""
    weight = model.layers[0].get_submodule(module).weight
    rows, columns = cut_of(module, "", config, rank, size)
    if rows is not None:
        weight = weight[[row for part in rows for row in part]]
    return weight if columns is None else weight[:, [column for part in columns for column in part]]


def feed_forward(x, rank):
    """A rank's part of the output."""
    gate, up = (x @ kept("feed_forward.gate_up", rank).T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ kept("feed_forward.down", rank).T


# %%
x = torch.randn(10, config.hidden_size, generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    parts = [feed_forward(x, rank) for rank in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], model.layers[0].feed_forward(x))
print("the parts of two ranks add up to the whole layer's output")

# %% [markdown]
# ### Attention by heads
#
# Attention is a pair as well: q, k and v come first, the output projection second. What lies between is no function of
# single numbers, but it does not mix *heads* (notebook 03). So the cut goes between heads: a rank computes some heads
# from beginning to end, and its columns of the output projection are those which these heads meet.
#
# We let the loader cut. It asks its rank who it is, so we make a rank that is alone, and gets back whatever it puts
# into a sum:


# %%
class Alone:
    """One rank's place, without the others."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def all_reduce(self, x):
        return x

    def all_gather(self, x):
        return x


shards = [minillm.load_model("tiny", dtype="float32", device="cpu", ranks=Alone(rank, 2)) for rank in range(2)]
print(f"whole: {config.num_heads} heads, {config.num_kv_heads} key/value heads")
print(f"each:  {shards[0].config.num_heads} heads, {shards[0].config.num_kv_heads} key/value head")
assert all(torch.equal(shards[rank].layers[0].attention.qkv.weight, kept("attention.qkv", rank)) for rank in (0, 1))


# %%
def attention(decoder):
    """The first layer's, of a whole model or of a rank's part, on x (positions left out)."""
    store = NoCache(decoder.config.attention_specs)
    store.begin(PaddedBatch.full(1, len(x)))
    return decoder.layers[0].attention(x[None], None, store)


with torch.inference_mode():
    torch.testing.assert_close(attention(shards[0]) + attention(shards[1]), attention(model))
print("and so do the heads of two ranks")

# %% [markdown]
# Note what a rank does *not* have: the keys and values of the other ranks' heads. The KV cache is cut as well, without
# anybody having done anything for it. That is as important as the weights (notebook 15).
#
# Both sums are in one line of the package. Every sublayer's output goes through it, before it is added to the residual
# stream:

# %%
show_source(ResidualNorm.finish)

# %% [markdown]
# ### More ranks than key/value heads
#
# With grouped heads (notebook 03) there are few key/value heads, and one cannot be cut: each of its query heads needs
# all of it. Where there are more ranks than key/value heads, several ranks keep the **same** one. Eight heads in two
# groups:

# %%
plot_rank_heads(8, 2, sizes=(1, 2, 4), title="A colour is a group: query heads beside the key/value head they look at")
plt.show()

# %% [markdown]
# From two ranks to four, the query heads of a rank are halved, but its part of the KV cache stays. And some numbers do
# not go at all. `tiny` has 6 heads and 512 feed-forward units; three ranks could share the heads, but not two
# key/value heads among three. The error says what can be:

# %%
try:
    shard_config(config, 3)
except MinillmError as error:
    print(error)

# %% [markdown]
# ## 3 · The vocabulary
#
# The embedding table is large: in small models it is a good part of all weights. It is cut by rows, that is, by tokens.
# A rank looks up the tokens that are its own, and says zero for all others. The sum over the ranks is the embedding:

# %%
show_source(VocabParallelEmbedding.forward)

# %%
tokens = torch.tensor([5, 700, 800, 1500])  # of 1,536; each rank holds 768
with torch.inference_mode():
    looked_up = [shard.embedding(tokens) for shard in shards]
    assert torch.equal(looked_up[0] + looked_up[1], model.embedding(tokens))
for rank, found in enumerate(looked_up):
    print(f"rank {rank}: zeros for tokens", tokens[(found == 0).all(dim=-1)].tolist())

# %% [markdown]
# At the other end, the head gives each rank the scores of *its* tokens. Nothing is to be added there; the parts are put
# behind each other (an *all-gather*). It is done only for the rows that choose a token.

# %%
with torch.inference_mode():
    scores = torch.cat([shard.logits(x) for shard in shards], dim=-1)
    torch.testing.assert_close(scores, model.logits(x))
print("scores of each rank", list(shards[0].logits(x).shape), "→", list(scores.shape))

# %% [markdown]
# ### Memory a rank
#
# Everything that is large has been cut; only the norms' vectors are on every rank:


# %%
def megabytes(decoder):
    return sum(parameter.nbytes for parameter in decoder.parameters()) / 2**20


norms = sum(parameter.nbytes for parameter in model.parameters() if parameter.ndim == 1) / 2**20
print(f"whole {megabytes(model):.2f} MiB, each rank {megabytes(shards[0]):.2f} MiB, of which norms {norms:.2f}")
assert abs(megabytes(shards[0]) - (megabytes(model) + norms) / 2) < 1e-6
token = [decoder.config.kv_bytes_per_token(torch.float32) for decoder in (model, shards[0])]
print(f"keys and values of a token: {token[0]:,} bytes, on each rank {token[1]:,}")

# %% [markdown]
# ## 4 · The sum
#
# Each rank has a tensor, and afterwards each shall have the sum of all: an **all-reduce**. The plain way is to send all
# to rank 0, which adds up and sends the sum back. Then everything goes through rank 0, and with twice as many ranks it
# takes twice as long.
#
# On a **ring**, all links are busy all the time. The tensor is cut into as many chunks as there are ranks. In each step
# every rank sends one chunk to its neighbour:

# %%
show_source(ring_sends)

# %%
plot_ring(4, 48 * 2**10)
plt.show()

# %% [markdown]
# Read the cells: they name the ranks whose numbers are in them. In the first half (blue arrows, **reduce-scatter**), a
# chunk goes round and collects. After three steps every rank has one chunk that is complete (green). In the second half
# (**all-gather**) the complete chunks go round. The last rank's neighbour is rank 0: its arrow comes from above.
#
# It works on tensors, too. All sends of one step happen at once, so we take what is sent before anybody adds:


# %%
def ring_all_reduce(tensors):
    """The sum, on every rank, and how many bytes each has sent."""
    held = [list(tensor.clone().chunk(len(tensors))) for tensor in tensors]
    sent = [0] * len(tensors)
    for step in ring_sends(len(tensors)):
        messages = [held[send.source][send.chunk] for send in step]
        for send, message in zip(step, messages, strict=True):
            own = held[send.target][send.chunk]
            held[send.target][send.chunk] = own + message if send.adds else message
            sent[send.source] += message.nbytes
    return [torch.cat(chunks) for chunks in held], sent


# %%
numbers = [torch.arange(12.0) * 10**rank for rank in range(4)]
results, sent = ring_all_reduce(numbers)
assert all(torch.equal(result, sum(numbers)) for result in results)
print("each of", numbers[0].nbytes, "bytes; sent by each rank:", sent)
assert sent == [2 * 3 * 48 // 4] * 4

# %% [markdown]
# With $N$ ranks and a tensor of $n$ bytes there are $2(N-1)$ steps, and in each a rank sends $n/N$ bytes:
#
# $$
# \text{bytes sent by each rank} = 2\,\frac{N-1}{N}\,n
# $$
#
# This is less than $2n$ **for any number of ranks**, and no all-reduce can do with less (Patarasuk and Yuan 2009). What
# does grow is the number of steps: each waits for a message to arrive, however short it is. So for short tensors
# libraries take other ways, with fewer steps and more bytes (Thakur et al. 2005 compare them).
#
# ### Bytes of a token
#
# A layer has two sums, and the embedding has one. Each is of `hidden` numbers of $b$ bytes for every token:
#
# $$
# n_\text{token} = (2 L + 1) \cdot \text{hidden} \cdot b
# $$


# %%
def bytes_a_token(config, itemsize):
    """What a rank puts into all-reduces for each token computed."""
    return (2 * config.num_layers + 1) * config.hidden_size * itemsize


print(f"tiny in float32: {bytes_a_token(config, 4):,} bytes a token")
print(f"8 billion parameters in bfloat16 (32 layers of 4,096): {Sums().count * Sums().token_bytes:,} bytes a token")

# %% [markdown]
# ## 5 · Two processes
#
# Now it is done in earnest. `tensor_parallel_size=2` starts a second process. Each loads its part and has its own part
# of the KV cache. Rank 0 alone schedules and samples; before each step it tells the other one what the step computes.
# The sums go through `torch.distributed`: here by gloo between CPUs, on GPUs by NCCL.
#
# First what one process writes:

# %%
prompts = ["Once upon a time", "One sunny morning", "There was once a", "In a small house near the garden"]
params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
sizes = {"dtype": "float32", "device": "cpu", "max_model_len": 128}
with LLM("tiny", **sizes) as llm:
    alone = llm.generate(prompts, params, use_tqdm=False)

# %% [markdown]
# And two (starting them takes a few seconds):

# %%
llm = LLM("tiny", tensor_parallel_size=2, **sizes)
traffic = llm.engine.runner.leader.traffic
before = asdict(traffic)
together = llm.generate(prompts, params, use_tqdm=False)
counted = {name: number - before[name] for name, number in asdict(traffic).items()}
assert [one.outputs[0].token_ids for one in together] == [one.outputs[0].token_ids for one in alone]
for output in together:
    print(repr(output.prompt + output.outputs[0].text))

# %% [markdown]
# The same tokens. (The last digits of scores may differ: a sum of two parts is rounded otherwise than one long sum. So
# we compare tokens at temperature 0, in float32.)
#
# `traffic` has counted what rank 0 put in. Does the formula agree? Every token of a prompt is computed once, and every
# token of an answer but the last, which nothing follows:

# %%
for name, number in counted.items():
    print(f"{name:18s} {number:9,}")
computed = sum(len(one.prompt_token_ids) + len(one.outputs[0].token_ids) - 1 for one in together)
assert counted["all_reduce_bytes"] == computed * bytes_a_token(config, 4)
assert counted["all_reduces"] == llm.engine.counts.num_steps * (2 * config.num_layers + 1)
chosen = sum(len(one.outputs[0].token_ids) for one in together)
assert counted["all_gather_bytes"] == chosen * config.vocab_size // 2 * 4
print(f"\n{computed} tokens computed × {bytes_a_token(config, 4):,} bytes: to the byte")

# %% [markdown]
# The broadcasts are rank 0's word to the other: tokens, positions, block tables. They are small, and they do not grow
# with the model.
#
# ### A rank that dies
#
# Half a model is no model. When one rank dies (its card fails, the machine's memory is full), the others cannot answer
# anything, and waiting for it would be waiting for ever. So every request ends with an error that says what happened,
# and a server ends its process with status 1, so that it is started again (notebook 15). We kill rank 1:

# %%
os.kill(llm.engine.runner.leader.crew.pids[0], signal.SIGKILL)
try:
    llm.generate(prompts, params, use_tqdm=False)
except MinillmError as error:
    print(f"{type(error).__name__}: {error}")
llm.close()

# %% [markdown]
# On two cores of one machine there was nothing to win: both processes share what one had. Now to machines where there
# is.
#
# ## 6 · Shard or replicate?
#
# Take four GPUs and a model of 8 billion parameters, which fits on each. One model cut in four, or four copies?
#
# The simulator of notebook 11 knows what a step costs on one device: reading the weights, computing tokens, reading
# keys and values. Cut in $N$, each of these is divided by $N$, and the sums come on top. On a ring, each waits
# $2(N-1)$ times for a message (latency), and sends $2\frac{N-1}{N}$ of its bytes (bandwidth):

# %%
show_source(sharded_cost)

# %%
for name, link in (("NVLink", NVLINK), ("PCIe", PCIE), ("network", NETWORK)):
    waiting, sending = Sums().seconds(1, 4, link)
    print(f"{name:8s} waiting {1e3 * waiting:5.2f} ms a step, bytes {1e6 * sending:6.1f} µs a token")
whole = CostModel()
print(f"one GPU  weights {1e3 * whole.step:5.2f} ms a step, computing {1e6 * whole.token:5.1f} µs a token")

# %% [markdown]
# These are orders of magnitude, and a best case: a perfectly even division, and nothing that overlaps. One step in
# which 32 sequences get a token each:

# %%
plot_sharded_step(ranks=4, gigabytes=450, batch=32)
plt.show()

# %% [markdown]
# With a small batch, a step is mostly reading weights. Copies do not help against this: each of the four reads all of
# them. Cut in four, each GPU reads a quarter. Now a large batch, on a slower link:

# %%
plot_sharded_step(ranks=4, gigabytes=25, batch=512)
plt.show()

# %% [markdown]
# Here the copies win. Weights are read once for many sequences and hardly count; but each token has its bytes to be
# summed, and on a slow link they take longer than the computing.
#
# ### Try it
#
# With a running kernel, move the sliders. Predict first:
#
# 1. One sequence, eight devices, the fastest link: how many times as fast as one device? What is most of the step?
# 2. Four devices and links of 450 GB/s: do copies ever give more tokens a second than the cut model?
# 3. Four devices and links of 25 GB/s: from how many sequences on do the copies give more?

# %% tags=["nbval-ignore-output"]
explore_sharding()

# %% [markdown]
# The same without a running kernel, for the first question:

# %%
plot_sharded_step(ranks=8, gigabytes=900, batch=1)
plt.show()

# %% [markdown]
# <details><summary>Answers</summary>
#
# 1. Hardly twice as fast (1.8 times), and most of its step is waiting for messages: 65 sums of 14 messages each.
# 2. No, up to 512 sequences. But the lead shrinks, from more than twice as many to 1.15 times as many.
# 3. From 128 on.
#
# </details>


# %%
def lead(batch, size, gigabytes):
    """Tokens a second of the cut model, over those of copies."""
    copies = sum(step_parts(-(-batch // size)).values())
    return copies / sum(step_parts(batch, size, Link(NVLINK.latency, 1e9 * gigabytes)).values())


assert 1.8 < sum(step_parts(1).values()) / sum(step_parts(1, 8, Link(NVLINK.latency, 900e9)).values()) < 1.85
assert lead(1, 4, 450) > 2
assert 1.14 < lead(512, 4, 450) < 1.16
assert [lead(batch, 4, 25) > 1 for batch in (32, 64, 128, 256)] == [True, True, False, False]

# %% [markdown]
# ### Real traffic
#
# A step is not a service: requests come at random, with long prompts, and wait for each other. We send 100 requests of
# Azure's trace to four GPUs, faster and faster, in three ways. The memory is that of cards of 40 GB: a copy has room
# for keys and values beside *all* weights, the cut model has the room of four cards beside *one* set of weights.

# %%
requests = load_trace(limit=100)
rate = len(requests) / requests[-1].time
block_bytes = 512 * 128 * 2**10  # 512 tokens of 128 KiB
copy_blocks = int((36e9 - 16e9) / block_bytes)  # nine tenths of a card, less the weights
shard_blocks = int((4 * 36e9 - 16e9) / block_bytes)
print(f"room: four copies {4 * copy_blocks * 512:,} tokens, cut in four {shard_blocks * 512:,} tokens")

# %%
loads = (10, 20, 40, 80)  # requests a second
services = {"cut, NVLink": [], "cut, PCIe": [], "four copies": []}
for load in loads:
    arrivals = [request._replace(time=request.time * rate / load) for request in requests]
    for name, link in (("cut, NVLink", NVLINK), ("cut, PCIe", PCIE)):
        cost = sharded_cost(CostModel(), 4, link)
        ran = simulate(arrivals, num_blocks=shard_blocks, block_size=512, cost=cost)
        services[name].append(Service.of([ran]))
    copies = simulate_replicas(arrivals, 4, num_blocks=copy_blocks, block_size=512)
    services["four copies"].append(Service.of(copies))

# %%
plot_shard_or_replicate(loads, services, title="Four GPUs, 8 billion parameters, Azure's requests")
plt.show()
cut_fast, cut_slow, copies = services.values()
assert all(cut.seconds_per_token < copy.seconds_per_token for cut, copy in zip(cut_fast, copies, strict=True))
assert cut_slow[0].seconds_per_token < copies[0].seconds_per_token
assert cut_slow[-1].seconds_per_token > 2 * copies[-1].seconds_per_token

# %% [markdown]
# On the left, what a user feels: the time from the request to the end of the answer, for each of its tokens. On the
# right, what all get together. (The trace is short, so that the right side is not the most that could be reached: the
# last answers run alone.) Read it like this:
#
# - **Little load, or a user who must not wait: shard**, over links that are fast. Nothing else makes *one* answer
#   faster.
# - **Much load, slow links: replicate.** On PCIe, the cut model is the better one for few requests and the worse one
#   for many; the lines cross a little below 20 requests a second. On NVLink the cut model stays ahead here, but it was
#   counted at its best.
# - **The model does not fit: shard** over as few devices as it needs, and replicate that. Notebook 15 found why few:
#   past the number of key/value heads, memory is spent on copies of them.
# - **Across machines: replicate.** A network's latency, 65 sums a step, six messages each: here 12 ms a step for
#   waiting alone, more than twice what one GPU needs to read all weights.
# - Copies fail one by one; a rank takes all others with it.

# %%
waiting, _ = Sums().seconds(1, 4, NETWORK)
assert 0.011 < waiting < 0.012
assert waiting > 2 * CostModel().step

# %% [markdown]
# ## 7 · Replicas, and other cuts
#
# A copy needs nothing from the other copies, so minillm does nothing inside the engine for them. What they do need is
# somebody in front: who starts them and looks whether they live, deals out the requests, sends those with the same
# beginning to the same copy (its blocks are there: notebook 12), and adds copies when the load grows. That is **Ray**'s
# work, for one machine or many; [docs/cluster.md](../docs/cluster.md) shows how to run it.
#
# Two other ways to cut a model should be known by name:
#
# - **Pipeline parallelism** cuts *between* layers: the first device has the first layers, and passes their output on
#   (Huang et al. 2019, "GPipe"). A token has few bytes to send, one vector for each border, so it works across
#   machines; but one token goes through all devices in turn, and is not faster than on one.
# - **Expert parallelism** is for mixtures of experts, whose feed-forward networks are many, with few of them used for
#   each token (Lepikhin et al. 2021, "GShard"). Whole experts go to different devices, and tokens are sent to theirs.
#
# vLLM has all of them: its arguments are `tensor_parallel_size`, `pipeline_parallel_size` and
# `enable_expert_parallel`. minillm has the first.
# [docs/from_minillm_to_vllm.md](../docs/from_minillm_to_vllm.md) tells where to find the others.
#
# ## What to take along
#
# - Columns, then rows: a pair of matrices needs one sum. A layer has two pairs.
# - Heads, key/value heads, units and vocabulary are cut; norms are not. The KV cache is cut with the heads, until there
#   are more ranks than key/value heads.
# - An all-reduce sends less than twice its tensor from each rank, for any number of ranks, but in more steps.
# - Sharding makes one answer faster and pays with sums; copies pay with memory, and wait for nobody.
#
# ## Sources
#
# - Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in MPICH", IJHPCA.
# - Patarasuk and Yuan 2009, "Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations", JPDC.
# - Shoeybi et al. 2019, "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism".
# - Huang et al. 2019, "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", NeurIPS.
# - Lepikhin et al. 2021, "GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding", ICLR.
# - Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP: §4.6 is
#   tensor parallelism in vLLM, §6.1 the latency of section 6.
# - Patel et al. 2024, "Splitwise: Efficient Generative LLM Inference Using Phase Splitting", ISCA: the trace.
#
# ## Exercises
#
# Replace each `None`; when the answer is right, the cell says so.
#
# **1.** Which ranks hold key/value head `head`, when there are `size` ranks? Either number divides the other.


# %%
def holders(head, num_kv_heads, size):
    return None


if holders(0, 2, 4) is not None:
    assert holders(1, 2, 4) == [2, 3], "each rank's query heads lie in one group"
    for heads, size in ((2, 1), (2, 2), (2, 8), (8, 4), (1, 3)):
        group = 8 * 3 // heads  # 24 query heads
        for head in range(heads):
            asks = {query * size // 24 for query in range(head * group, (head + 1) * group)}
            assert holders(head, heads, size) == sorted(asks), f"{heads} key/value heads, {size} ranks, head {head}"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def holders(head, num_kv_heads, size):
#     if num_kv_heads >= size:
#         return [head * size // num_kv_heads]
#     return list(range(head * size // num_kv_heads, (head + 1) * size // num_kv_heads))
# ```
#
# </details>
#
# **2.** The head could also choose without an all-gather, at temperature 0: each rank finds its best token, and only
# the best of each are compared. Write the comparison. `scores` has each rank's scores `[rows, vocab / size]`.


# %%
def best_tokens(scores):
    """The best token of each row, of the whole vocabulary."""
    return None


if best_tokens([torch.zeros(1, 2)] * 2) is not None:
    with torch.inference_mode():
        own, all_scores = [shard.logits(x) for shard in shards], model.logits(x)
    assert torch.equal(best_tokens(own), all_scores.argmax(dim=-1)), "a rank counts its tokens from 0"
    print(f"right: {2 * 8} bytes a row from each rank, instead of {own[0][0].nbytes:,}")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def best_tokens(scores):
#     best = [part.max(dim=-1) for part in scores]
#     rank = torch.stack([one.values for one in best]).argmax(dim=0)
#     token = torch.stack([one.indices for one in best]).gather(0, rank[None])[0]
#     return token + rank * scores[0].shape[-1]
# ```
#
# </details>
#
# **3.** How many sequences must a step have, so that the bytes of the sums take longer than waiting for their messages?
# For `size` devices and any link.


# %%
def break_even(size, link):
    """Tokens of a step at which both take the same time."""
    return None


if break_even(2, NVLINK) is not None:
    for size, link in ((2, NVLINK), (4, PCIE), (8, NETWORK)):
        waiting, sending = Sums().seconds(1, size, link)
        assert abs(sending * break_even(size, link) / waiting - 1) < 1e-6, "the number of steps is in both"
    print(f"right: 4 devices, NVLink {break_even(4, NVLINK):,.0f} tokens, network {break_even(4, NETWORK):,.0f}")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def break_even(size, link):
#     return size * link.latency * link.bandwidth / Sums().token_bytes
# ```
# Latency times bandwidth is what a link holds while it is full: below that, more bytes cost nothing.
#
# </details>
#
# ---
# **Back:** [15_deploy_glm4](15_deploy_glm4.ipynb) · **Next:** this is the end of the course. You have built an engine
# from its first attention head to several processes, and all of it can be read. Where to go on:
# [docs/from_minillm_to_vllm.md](../docs/from_minillm_to_vllm.md) tells where each of its parts is in vLLM, and what
# vLLM has besides; [docs/cluster.md](../docs/cluster.md) runs minillm on many machines.
