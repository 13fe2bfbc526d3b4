# %% [markdown]
# # 14 · Serving
#
# An engine is a function that is called. A service is there when nobody calls, answers hundreds at a time, tells each
# of them every token as soon as it is written, and survives those who hang up in the middle of a sentence. This
# notebook puts the engine behind an HTTP server. Then it sends requests, faster and faster, until the server falls
# behind, and explains why it does so just there.
#
# **By the end of this notebook you will be able to**
#
# - say which thread of a server does what, and follow a request from the client's bytes to a step and back;
# - read a stream of server-sent events as it goes over the wire, and use the server with any OpenAI client;
# - tell what `/metrics` says of queues, memory and times, and what a histogram cannot say;
# - measure latency against load in the way that does not flatter, find the knee, and say where it must be;
# - check a measurement with Little's law, and state a service's capacity as goodput;
# - say what a server does when it is overloaded, left, or told to stop.
#
# **You need** notebook [11](11_continuous_batching.ipynb) (continuous batching); of [12](12_sharing.ipynb), what a
# prefix that is found again saves. No GPU.
#
# **New here**: so far one caller had all requests at once. Now clients come and go while the engine runs, and we ask
# how many of them it can serve well.
#
# **Time**: about 75 minutes (it runs in about 50 s on two cores).

# %%
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import matplotlib.pyplot as plt
import numpy as np
import openai
import torch
from prometheus_client.parser import text_string_to_metric_families

from minillm import LLM, SamplingParams
from minillm.bench.serve import Load, measure, poisson
from minillm.engine.params import RequestOutputKind
from minillm.engine.trace import Trace
from minillm.server import app, events
from minillm.server.engine_thread import EngineThread, RequestStream
from minillm.server.metrics import SHORT
from minillm.server.serve import Server, background
from minillm.server.service import ServerConfig
from minillm.viz import (
    explore_queue,
    held_blocks,
    mean_wait,
    numbered,
    plot_gauges,
    plot_held_blocks,
    plot_histogram,
    plot_lines,
    plot_load,
    plot_request_way,
    plot_timeline,
    plot_utilisation,
    show_source,
    starts_in_order,
)

os.environ["NO_PROXY"] = "127.0.0.1"  # our server is on this machine: no proxy would find it
torch.set_num_threads(1)
llm = LLM("tiny", dtype="float32", device="cpu", max_num_seqs=8, num_gpu_blocks_override=256, trace=True)
tokenizer, pool = llm.get_tokenizer(), llm.engine.scheduler.pool

# %% [markdown]
# ## 1 · What a server adds
#
# `llm.generate` takes all prompts at once and comes back when all answers are there. For a script that is right. For a
# service four things are missing:
#
# | a service needs | `LLM.generate` | the server's means |
# | --- | --- | --- |
# | to take a request at any time | is busy until it returns | an **inbox** that is emptied between two steps |
# | to wait for many clients at once | has one caller | an **event loop**: one thread, one coroutine a client |
# | to give each token out at once | gives whole answers | a queue for each client, and **server-sent events** |
# | to stop what nobody wants any more | goes on to the end | `abort` when a connection closes |
#
# The engine itself stays as it is: requests may join and leave at every step (notebook 11). What is new is only who
# calls `step`. Two threads suffice, because the two kinds of work are so different:
#
# - **the engine's thread** computes. It must never wait for a client, since all others would wait with it.
# - **the event loop's thread** waits: for connections, for bytes, for tokens. It must never compute for long, since no
#   client would get a byte meanwhile.
#
# Here is what happens when client B comes while a step of client A is under way:

# %%
plot_request_way()
plt.show()

# %% [markdown]
# B's request is checked and cut into tokens while step 1 runs. It waits in the inbox for less than a step, and then
# joins step 2. When a step is done, its tokens travel up: the engine's thread *asks* the event loop to put each output
# into its client's queue, and begins the next step at once. It does not wait until the bytes have gone.
#
# ## 2 · The engine in a thread of its own
#
# The loop of the picture's lowest lane:

# %%
show_source(EngineThread._work)

# %%
show_source(EngineThread._obey)

# %% [markdown]
# The inbox is a queue of things to do: add this request, abort that one, stop. With nobody to serve, the thread sleeps
# in `get()`, and takes no processor time. While there is work it takes what is there and does not wait.
#
# Nothing here is locked. The engine's data are touched by this thread only, and whatever concerns the streams by the
# event loop only. The two meet in two places that are safe by construction: the inbox, a `queue.SimpleQueue`, and
# `call_soon_threadsafe` (in `_in_loop`), with which any thread may ask an event loop for a call.
#
# The other end, which a client's coroutine holds in its hand:

# %%
show_source(RequestStream)

# %% [markdown]
# `async for` waits for the next output, and while it waits the event loop serves others. An error goes the same way as
# an output: it is put into the queue, and raised where somebody listens.
#
# All this works without HTTP. Two coroutines can be the clients, in an event loop of their own (this notebook's is busy
# with the notebook; hence the thread). `DELTA` asks for what is new since the last output, as a stream wants it. The
# text is the **detokenizer**'s, which holds half a character back until the rest of it has come.


# %%
async def listen(engine, name, text):
    """The pieces of an answer as they come."""
    params = SamplingParams(temperature=0, max_tokens=12, output_kind=RequestOutputKind.DELTA)
    stream = await engine.generate(name, tokenizer(text).input_ids, params)
    return [output.outputs[0].text async for output in stream]


async def two_clients():
    engine = EngineThread(llm.engine, max_requests=8)
    engine.start()
    pieces = await asyncio.gather(listen(engine, "A", "Once upon a time"), listen(engine, "B", "Mia had a red kite."))
    await engine.close()
    return pieces


with ThreadPoolExecutor(1) as other:
    for pieces in other.submit(asyncio.run, two_clients()).result():
        print(pieces)

# %% [markdown]
# Twelve tokens, twelve outputs each, written in common steps. That is the whole online engine. What follows is the way
# from a client's bytes to `engine.generate`, and back.
#
# ## 3 · The door
#
# `minillm serve` listens on a port until it is stopped. `background` starts the same server in a thread of this
# notebook, on whatever port is free. Before we hand it the engine, let `LLM` answer some questions itself, to compare:

# %%
story = "Once upon a time there was a brave girl called"
greedy = {"temperature": 0, "max_tokens": 24}
drawn = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "n": 3, "max_tokens": 24}
by_llm = {}
for name, params in (("greedy", greedy), ("drawn", drawn)):
    (output,) = llm.generate(story, SamplingParams(**params), use_tqdm=False)
    by_llm[name] = [answer.text for answer in output.outputs]

# %%
config = ServerConfig(model="tiny", served_names=["tiny"])
running = contextlib.ExitStack()  # keeps the server open over many cells
server = running.enter_context(background(llm, config))
http = running.enter_context(httpx.Client(base_url=server.url, timeout=60))
routes = http.get("/openapi.json").json()["paths"]
for path in ("/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/health", "/metrics"):
    for method, told in routes[path].items():
        print(f"{method.upper():5s} {path:22s} {told['description'].splitlines()[0]}")

# %% [markdown]
# The paths under `/v1` are OpenAI's, and so are the names of the fields. That is worth more than a better design would
# be: what was written for OpenAI's service talks to this server as it is, as it does to vLLM. Only the address
# changes. (A browser shows the whole description at `/docs`.) OpenAI's own client:

# %%
client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
completion = client.completions.create(model="tiny", prompt=story, **greedy)
print(completion.choices[0].text)
print(completion.usage.prompt_tokens, "+", completion.usage.completion_tokens, "tokens;", end=" ")
print("ended by:", completion.choices[0].finish_reason)

# %% [markdown]
# A chat, with **streaming**. The server writes the conversation down by the chat template, as `LLM.chat` does, and what
# comes is handed on piece by piece:

# %%
messages = [{"role": "user", "content": "Tell me a story about Mia and a red kite."}]
stream = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=60, stream=True)
pieces = [chunk.choices[0].delta.content for chunk in stream]
print(pieces[:8], "…")
print("".join(pieces))

# %% [markdown]
# Is it the same model? The same request gives the same answers at both doors, for three answers with a seed, too. The
# seed belongs to the request, so it does not matter who else is there.

# %%
several = client.completions.create(model="tiny", prompt=story, **drawn)
assert [completion.choices[0].text] == by_llm["greedy"]
assert [choice.text for choice in several.choices] == by_llm["drawn"]
for choice in several.choices:
    print(choice.index, repr(choice.text[:80]))

# %% [markdown]
# And how sure was it? `logprobs` asks for each token's log-probability, and for those of the likeliest others in its
# place:

# %%
asked = {"messages": messages, "temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 3}
chat = client.chat.completions.create(model="tiny", **asked)
for one in chat.choices[0].logprobs.content:
    others = ", ".join(f"{top.token!r} {np.exp(top.logprob):.1%}" for top in one.top_logprobs)
    print(f"{one.token!r:10} {np.exp(one.logprob):6.1%}   of {others}")

# %% [markdown]
# ### What goes over the wire
#
# The client hides it; let us look. We open a connection, and write the request by hand:


# %%
def raw(path, **fields):
    """Everything that a server answers, byte for byte."""
    body = json.dumps(fields)
    head = f"POST {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.config.port)) as line:
        line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        return line.makefile("rb").read().decode()


answer = raw("/v1/completions", prompt="Once upon a", max_tokens=3, temperature=0, stream=True)
always = re.sub(r'(cmpl-)\w+|("created":)\d+|(date: )[^\r]+', r"\1\2\3…", answer)  # what differs each time
print(always)

# %% [markdown]
# An ordinary HTTP response, of a length that nobody knows in advance: it comes in **chunks**, each behind its length
# in hexadecimal. The chunks' content are **server-sent events** (`text/event-stream`; part of the HTML standard): lines
# that begin with `data:`, with an empty line after each event. Each event is a JSON object, and OpenAI ends a stream
# with the word `[DONE]`. This is all of it:

# %%
show_source(events._events)

# %% [markdown]
# Look at the `except`. When the first event goes out, the status line *200 OK* has already gone. Whatever fails from
# then on can be told only inside the stream; a client that looks at the status alone will miss it.
#
# ## 4 · Many at once
#
# Five clients, one every few milliseconds, each on its own connection. The engine keeps a trace, so that we can see
# afterwards who sat in which step:


# %%
starts = ["Once upon a time", "Mia had a red kite.", "One sunny morning Tom", "Long ago", "In a small house"]


def ask(number):
    time.sleep(0.02 * number)
    return client.completions.create(model="tiny", prompt=starts[number], temperature=0, max_tokens=60).choices[0].text


before = len(llm.trace.steps)
with ThreadPoolExecutor(len(starts)) as clients:
    together = list(clients.map(ask, range(len(starts))))
shared = numbered(Trace(llm.trace.steps[before:]))

# %% tags=["nbval-ignore-output"]
most = max(len(step.parts) for step in shared.steps)
plot_timeline(shared, x="time", title=f"Five clients who know nothing of each other; up to {most} tokens a step")
plt.show()

# %% [markdown]
# A row is a client's request; a bar is its share of a step. Each came when it came, joined at the next step, and left
# after its last token. Nobody waited for a batch to fill or to end. And the answers are those that each would have got
# alone:

# %%
tokens = sum(len(step.parts) for step in shared.steps)
assert tokens > len(shared.steps), "some steps were shared"
alone = [
    client.completions.create(model="tiny", prompt=text, temperature=0, max_tokens=60).choices[0].text
    for text in starts
]
assert together == alone
print("five answers, the same together and alone")

# %% [markdown]
# ### Somebody leaves
#
# People close the window in the middle of an answer. Nobody will read what is written from then on, but it would take
# a seat, blocks and a share of each step. Here two clients ask for long answers, and one hangs up after 40 events.

# %%
long = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 300, "temperature": 0, "ignore_eos": True}


def leave(after):
    """Ask for a stream, and close the connection in the middle."""
    with http.stream("POST", "/v1/completions", json=long | {"stream": True}) as answer:
        lines = (line for line in answer.iter_lines() if line)
        return [next(lines) for _ in range(after)]


before = len(llm.trace.steps)
with ThreadPoolExecutor(1) as other:
    stays = other.submit(http.post, "/v1/completions", json=long | {"prompt": "Mia had a red kite.", "max_tokens": 150})
    heard = leave(after=40)
    assert stays.result().json()["usage"]["completion_tokens"] == 150
left = Trace(llm.trace.steps[before:])

# %% tags=["nbval-ignore-output"]
blocks = held_blocks(numbered(left))
plot_held_blocks(numbered(left), title="One client stays; the other hangs up, and its blocks are free at once")
plt.show()

# %%
shares = sorted(sum(count > 0 for count in one) for one in held_blocks(left).values())
assert shares[-1] < 300, "steps in which each of the two held blocks"
assert pool.num_free == pool.num_blocks
print("nobody holds a block any more")

# %% [markdown]
# How does the server know? It cannot see that nobody reads. It learns that the connection is closed: either because
# its own writing fails, or, where it has nothing to write yet, because it listens for this while it works:

# %%
show_source(app.unless_disconnected)

# %% [markdown]
# Whichever way a response ends, `abort` is called for its requests (in `EventStream`, a `finally`). The next `_obey`
# takes them out of the engine. So a leaver costs a step or two, not the 260 tokens that were still to come.
#
# ### What is refused
#
# A request that cannot be answered must be told so in a form that programs can read. OpenAI's errors have a type, the
# field that is to blame, and a code; HTTP's status says whose fault it is, which is what a client's retries go by.

# %%
wrong = {
    "no prompt": {},
    "another model": {"prompt": "Hi", "model": "gpt-5"},
    "too hot": {"prompt": "Hi", "temperature": -1},
    "a field nobody knows": {"prompt": "Hi", "tempreature": 0.5},
    "too long": {"prompt": "Hi", "max_tokens": 600},
}
for name, fields in wrong.items():
    answer = http.post("/v1/completions", json=fields)
    error = answer.json()["error"]
    print(f"{name}: {answer.status_code} {error['type']}, param {error['param']}, code {error['code']}")
    print(f"    {error['message']}")

# %% [markdown]
# Look at the fourth. A server that overlooks what it does not know would answer happily, at a temperature that the
# client did not want, and nobody would ever find the misspelling. The client makes exceptions of the statuses:

# %%
try:
    client.completions.create(model="gpt-5", prompt="Hi")
except openai.NotFoundError as error:
    print(type(error).__name__, error.status_code, error.code)

# %% [markdown]
# ## 5 · What `/metrics` tells
#
# Whoever runs a service wants to know how it is, without asking every client. The convention is Prometheus's: the
# server keeps numbers, and answers `GET /metrics` with all of them as text. A collector asks every few seconds, keeps
# what it reads, and computes rates from differences. There are three kinds:
#
# | kind | example | meaning |
# | --- | --- | --- |
# | **counter** | `minillm:generation_tokens_total` | since the start; it only grows, and its slope is a rate |
# | **gauge** | `minillm:num_requests_waiting` | at this moment |
# | **histogram** | `minillm:time_to_first_token_seconds` | how many values were at most so large, for fixed limits |
#
# The names are vLLM's, with another prefix, so that a dashboard for one is a dashboard for the other.


# %%
def read_metrics(http):
    """(name, upper edge of a bucket if it is one) → value."""
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return {(sample.name.removeprefix("minillm:"), sample.labels.get("le")): sample.value for sample in samples}


now = read_metrics(http)
for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total"):
    print(f"{name:22s} {now[name, None]:g}")
assert now["generation_tokens_total", None] == llm.engine.counts.generation_tokens

# %% [markdown]
# Now let there be something to see: 32 clients come at once, eight of whom find a seat. All bring the same
# instructions. While they are being served, we ask for the metrics as a collector would, only more often.

# %%
instructions = "Once upon a time there was a small village by the sea. " * 6
questions = [instructions + text for text in starts]


def visit(number):
    fields = {"prompt": questions[number % 5], "max_tokens": 48, "ignore_eos": True, "temperature": 0}
    return http.post("/v1/completions", json=fields).json()["usage"]


seen, times, start = [read_metrics(http)], [0.0], time.perf_counter()
with ThreadPoolExecutor(32) as clients:
    visits = [clients.submit(visit, number) for number in range(32)]
    while not all(one.done() for one in visits):
        seen.append(read_metrics(http))
        times.append(time.perf_counter() - start)
        time.sleep(0.02)
after = read_metrics(http)

# %% tags=["nbval-ignore-output"]
names = ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc")
plot_gauges(times, {name: [one[name, None] for one in seen] for name in names}, title="32 clients, 8 seats")
plt.show()

# %%
assert max(one["num_requests_running", None] for one in seen) <= 8
assert max(one["num_requests_waiting", None] for one in seen) > 0
grown = {name: after[name] - value for name, value in seen[0].items()}
hits, queries = grown["prefix_cache_hits_total", None], grown["prefix_cache_queries_total", None]
print(f"{grown['generation_tokens_total', None]:.0f} tokens written for {grown['prompt_tokens_total', None]:.0f} read")
assert hits / queries > 0.5

# %% tags=["nbval-ignore-output"]
print(f"{hits / queries:.0%} of the prompts' tokens were found in memory")

# %% [markdown]
# The queue empties in waves: eight are served, end almost together since their answers are equally long, and the next
# eight come in. More than half of the prompts' tokens are not computed at all; the instructions were there already
# (notebook 12).
#
# What the collector cannot see is what happened between two looks. Gauges are samples. A queue that comes and goes
# within a second, between looks that are 15 seconds apart, has never been. Counters and histograms miss nothing, and
# this is why times are kept in histograms.
#
# ### A histogram of times
#
# Each bucket has a fixed upper edge, and counts the values at or below it. Any number of values takes the same memory,
# and the histograms of ten servers can be added. The price: inside a bucket nobody knows where the values were.
# Prometheus guesses that they lie evenly (its `histogram_quantile`):

# %%
edges = [str(edge) for edge in SHORT] + ["+Inf"]


def buckets(numbers, name="time_to_first_token_seconds"):
    """Upper edge → how many values lie at or below it."""
    return {float(edge): numbers[f"{name}_bucket", edge] for edge in edges}


def quantile(counts, share):
    """The value below which this share lies, as Prometheus guesses it."""
    wanted, below, low = share * counts[float("inf")], 0.0, 0.0
    for edge, count in counts.items():
        if count >= wanted:
            return low + (edge - low) * (wanted - below) / (count - below)
        below, low = count, edge


# %%
counts = buckets(grown)
assert counts[float("inf")] == 32
assert quantile({1.0: 0, 2.0: 10, float("inf"): 10}, 0.5) == 1.5

# %% tags=["nbval-ignore-output"]
marks = {f"p{share:.0%}".rstrip("%"): quantile(counts, share) for share in (0.5, 0.9)}
title = ", ".join(f"{name} = {1000 * value:.0f} ms" for name, value in marks.items())
plot_histogram(counts, marks, unit="seconds", title=f"Time to first token of 32 clients; read off: {title}")
plt.show()

# %% [markdown]
# Those who found a seat at once are at the left, those who had to wait for one, two or three rounds at the right. Their
# mean would be a time that hardly anybody has seen. That is why latencies are told as **percentiles**: *p50* is the
# middle one, *p90* is what nine of ten did not exceed. But mind the width of the buckets. A dashboard shows a p90 to
# the millisecond, and it may have been anything between the edges on its left and right.

# %%
running.close()  # the server stops, and the engine is ours again
assert not llm.engine.has_unfinished_requests

# %% [markdown]
# ## 6 · How much can it take?
#
# ### How to ask
#
# There are two ways to put load on a server, and they measure different things (Schroeder, Wierman and Harchol-Balter
# 2006, "Open versus closed"):
#
# - **closed loop**: a fixed number of clients, each of whom asks again when it has its answer. When the server gets
#   slow, so do the clients: the load goes down just when it hurts. This measures throughput, and hides waiting.
# - **open loop**: requests come when they come, whatever the server does. People are like this. One does not know that
#   another is waiting already.
#
# If nobody knows of anybody else, arrivals are a **Poisson process**: the times between them are drawn from an
# exponential distribution. `poisson` makes such requests, and `measure` sends each at its time, streams its answer and
# notes when each token came. (`minillm bench serve` does the same from a terminal, for any server of this kind.)
#
# ### One seat
#
# We begin with a server that can be understood completely: one seat, requests of equal length, nothing shared. It is
# the oldest queue in the book. Kendall calls it **M/D/1**: arrivals without **m**emory, **d**eterministic service, one
# server.
#
# With a service time of $D$ seconds and $\lambda$ requests a second, the seat is taken for a share $\rho = \lambda D$
# of the time: the **utilisation**. At $\rho < 1$ the server keeps up. Does anybody have to wait, then?

# %%
plot_utilisation(0.8)
plt.show()
starting = {even: plot_utilisation(0.8, even=even).axes[0].get_title() for even in (False, True)}
plt.close("all")
print(*starting.values(), sep="\n")

# %% [markdown]
# They do, although the seat is empty for a fifth of the time. The empty time comes when nobody wants it, and cannot be
# saved for later. If the same number came evenly spaced, nobody would wait at all. Waiting comes from **chance**, and
# Pollaczek and Khinchine knew by 1932 how long it is on average:
#
# $$W_q = \frac{\rho}{2\,(1-\rho)}\; D$$
#
# It is the $1 - \rho$ below the line that makes the knee: from 50 to 80 per cent the wait becomes four times as long,
# from 80 to 95 almost five times again.

# %%
loads = [number / 20 for number in range(20)]
waits = {"mean wait": [mean_wait(load, 1.0) for load in loads]}
labels = {"xlabel": "utilisation", "ylabel": "mean wait, in service times"}
plot_lines(loads, waits, **labels, title="Waiting explodes before the server is full")
plt.show()
print([f"{load:.0%}: {mean_wait(load, 1.0):.1f}" for load in (0.5, 0.8, 0.9, 0.95)])

# %% [markdown]
# With a running kernel, move the sliders. Predict before you move:
#
# 1. Evenly spaced, utilisation 1.0 and then 1.1: what happens?
# 2. At random, utilisation 0.8: how much does the mean wait of 40 requests vary with the seed?
# 3. Utilisation 1.3: what would be the mean wait of 400 requests instead of 40?

# %% tags=["nbval-ignore-output"]
explore_queue()

# %% [markdown]
# <details><summary>Answers</summary>
#
# 1. At 1.0 nobody waits; at 1.1 each waits a little longer than the one before, without end.
# 2. Between about half a service time and more than three. Forty requests say little about a mean: a single burst
#    decides. Whoever measures must send many, and tell the seed.
# 3. About ten times as long. Beyond a utilisation of 1 there is no mean to be measured; whatever figure is reported
#    tells how long the measurement took.
#
# </details>
#
# ### The formula meets the server
#
# Now the real thing, over HTTP. How many requests a second are possible? A closed loop with three requests at a time
# shows it: one is served, and there is always another one that waits.

# %%
SIZE = {"input_len": 32, "output_len": 12, "vocab_size": llm.engine.vocab_size}


def under_load(server, num, rate, **limits):
    """Send requests at random times, `rate` a second."""
    requests = poisson(num, rate, seed=0, **SIZE)
    return measure(Load(base_url=server.url, requests=requests, ignore_eos=True, **limits))


def engine(seats):
    """An engine that has run already: the first steps are slower."""
    made = LLM("tiny", dtype="float32", device="cpu", max_num_seqs=seats, enable_prefix_caching=False)
    made.generate([[5] * 32] * 2 * seats, SamplingParams(max_tokens=16), use_tqdm=False)
    return made


one_seat, eight_seats = engine(1), engine(8)

# %% [markdown]
# Then three rates below it. Beside what was measured stand two predictions: the queue computed with *the same* arrival
# times, and the formula, which speaks of the average over all arrivals that might have been. Both need the service
# time. `/metrics` has it: a histogram's sum over its count is a mean. And a watcher looks every two milliseconds how
# many requests are there; we need this in a moment.


# %%
class Watcher(threading.Thread):
    """Looks again and again how many requests an engine has."""

    def __init__(self, engine):
        super().__init__(daemon=True)
        self.engine, self.seen, self.stopped = engine, [], threading.Event()
        self.start()

    def run(self):
        while not self.stopped.wait(0.002):
            self.seen.append((time.perf_counter(), len(self.engine.unfinished)))

    def mean(self, seconds):
        """Over the last so many seconds, and stop."""
        self.stopped.set()
        return np.mean([count for moment, count in self.seen if moment > time.perf_counter() - seconds])


# %%
def mean_between(before, after, name):
    """The mean of what a histogram has counted in the meantime."""
    return (after[f"{name}_sum", None] - before[f"{name}_sum", None]) / (
        after[f"{name}_count", None] - before[f"{name}_count", None]
    )


single = {}
with background(one_seat, config) as server, httpx.Client(base_url=server.url) as http:
    possible = 20 / under_load(server, 20, float("inf"), max_concurrency=3).duration_s
    for load in (0.5, 0.7, 0.9):
        before, watcher = read_metrics(http), Watcher(one_seat.engine)
        result = under_load(server, 20, load * possible)
        heads, after = watcher.mean(result.duration_s), read_metrics(http)
        single[load] = result, heads, mean_between(before, after, "request_inference_time_seconds")

# %% tags=["nbval-ignore-output"]
print("requests/s   service time   utilisation | mean wait: measured   same arrivals   formula")
for load, (result, _, service) in single.items():
    arrivals = [one.at_s for one in poisson(20, load * possible, seed=0, **SIZE)]
    computed = np.mean(np.subtract(starts_in_order(arrivals, service), arrivals))
    measured = result.ttft_s.mean() - result.ttft_s.min()  # the quickest waited for nobody
    used = load * possible * service
    formula = mean_wait(used, service) if used < 1 else np.inf
    print(f"{load * possible:10.1f} {1000 * service:11.1f} ms {used:13.0%} |", end="")
    print(f" {1000 * measured:16.1f} ms {1000 * computed:12.1f} ms {1000 * formula:6.1f} ms")

# %%
assert all(result.num_failed == 0 for result, *_ in single.values())
assert all(result.output_tokens == 20 * 12 for result, *_ in single.values())

# %% [markdown]
# Compare *measured* with *same arrivals*: two lines of arithmetic tell how long a real server lets people wait. What
# differs is the world: a service time that is not quite constant, a client that shares its processor with the server,
# whatever else your computer does. Then compare *same arrivals* with *formula*: that is chance again. These were twenty
# arrivals of all that might have been.
#
# ### Little's law
#
# There is one law of queues that needs no assumption at all: neither random arrivals nor one seat nor fairness. Let $L$
# be the mean number of requests that are there, $\lambda$ how many come a second, and $W$ how long each stays on
# average. Then (Little 1961)
#
# $$L = \lambda\, W.$$
#
# Here is why. Add up the time that the requests spend in the system: once request by request, $n$ requests of $W$ each;
# once moment by moment, $T$ seconds with $L$ of them each. It is the same area, the orange one in the figure of "One
# seat": $n W = T L$, and $n/T$ is $\lambda$. So a watcher who only counts heads, and clients who only look at their
# clocks, must agree:

# %% tags=["nbval-ignore-output"]
for load, (result, heads, _) in single.items():
    rate = len(result.e2e_s) / result.duration_s
    print(f"{load:.0%}: {heads:.2f} heads counted; {rate:.1f}/s × {1000 * result.e2e_s.mean():.1f} ms", end="")
    print(f" = {rate * result.e2e_s.mean():.2f}")

# %%
result, heads, _ = single[0.9]
by_clocks = result.e2e_s.sum() / result.duration_s
assert 0.3 < heads / by_clocks < 1.5

# %% [markdown]
# The law is used in both directions. A dashboard shows how many requests are there and how many come; their quotient is
# the mean latency, without one clock at a client. Or: a service promises a latency and expects a rate; their product is
# how many requests will be in memory at a time, and that, times the tokens of each, is the room in tokens that the KV
# cache needs.
#
# ### Eight seats
#
# An engine with seats is no M/D/1. Requests that are served together share the weights' way through the processor, so
# a step for eight takes less than eight steps for one; and whoever comes joins the others instead of waiting for them.
# The shape stays. At the capacity of the seats the queue begins to grow, and what the seats are worth is how far to
# the right that is. Where is it? We ask for more and more, two seconds long each time, until the server has to go on
# for another second to be done. The most that it answers a second in any of these runs is its capacity.


# %%
def until_it_falls_behind(server, rate, seconds=2):
    """Rate → what was measured, at higher and higher rates."""
    results, is_behind = {}, False
    while not is_behind:
        results[rate] = under_load(server, max(2, round(seconds * rate)), rate)
        is_behind = results[rate].duration_s > 1.5 * seconds
        rate *= 1.4
    return results


with background(eight_seats, config) as server:
    unloaded = under_load(server, 5, 2.0)
    results = until_it_falls_behind(server, 0.7 * possible)
capacity = max(len(result.e2e_s) / result.duration_s for result in results.values())

# %% tags=["nbval-ignore-output"]
panels = {}
for name, label in (("ttft", "time to first token (ms)"), ("tpot", "time per output token (ms)")):
    panels[label] = {
        f"p{which}": [1000 * result.percentile(name, which) for result in results.values()] for which in (50, 90)
    }
title = f"Eight seats: up to {capacity:.0f} requests a second, where one seat takes {possible:.0f}"
plot_load(list(results), panels, capacity=capacity, title=title)
plt.show()

# %%
hardest = results[max(results)]
assert hardest.percentile("ttft", 90) > 2 * unloaded.percentile("ttft", 50)
assert all(result.num_failed == 0 for result in results.values())

# %% [markdown]
# Read the two panels together.
#
# - **Time per output token** climbs with the load, because more requests share each step, and a step with more tokens
#   takes longer. Then it hardly climbs any more: more than eight are never in a step. The seats are a promise to those
#   who sit.
# - **Time to first token** is short as long as there is mostly a free seat, and then it leaves the chart. Whoever finds
#   no seat waits in the queue, and all that waiting is in the first token.
# - **The percentiles come apart first.** The middle client still feels nothing where one in ten waits noticeably. A
#   service that looks at its mean learns of its trouble last.
# - **In the grey**, the figures are no property of the server. More comes than can be answered, the queue grows for as
#   long as that lasts, and sending twice as many requests would double the latency. No setting helps there: only
#   refusing some (section 7), or a second server.
#
# How would the same server look in a closed loop? It would never get into the grey. Eight clients who ask again and
# again keep its seats full, at the best throughput and without a queue. Benchmarks that report throughput at a fixed
# concurrency do just this. It is a fair number for a batch job, and it says nothing about a service.
#
# ### Goodput
#
# So how much can it take? Throughput is the wrong answer, since it is best in the grey, where nobody is content. Zhong
# et al. (2024, "DistServe", §1) ask first what the users were promised: a **service level objective**, here one for the
# first token and one for the pace afterwards. **Goodput** is the highest rate at which a share of, say, 90 % of the
# requests get *both*. We promise a first token within five times, and a pace within three times, of what they take on
# an empty server:

# %%
promise = {"ttft": 5 * unloaded.percentile("ttft", 50), "tpot": 3 * unloaded.percentile("tpot", 50)}


def attainment(result):
    """The share of requests for which both promises were kept."""
    return float(np.mean((result.ttft_s <= promise["ttft"]) & (result.tpot_s <= promise["tpot"])))


kept = {rate: attainment(result) for rate, result in results.items()}
goodput = max((rate for rate, share in kept.items() if share >= 0.9), default=0.0)
assert attainment(hardest) < attainment(unloaded)

# %% tags=["nbval-ignore-output"]
labels = {"xlabel": "requests a second", "ylabel": "share with both promises kept"}
title = f"Goodput: {goodput:.0f} requests a second, {goodput / capacity:.0%} of the capacity"
plot_lines(list(kept), {"attainment": list(kept.values())}, **labels, levels={"90 %": 0.9}, title=title)
plt.show()

# %% [markdown]
# What is between goodput and capacity is not wasted by bad programming. It is what chance costs: capacity that has to
# be there at the bad moments and idles at the good ones. A looser promise moves the goodput to the right; so does
# anything that makes a step shorter.
#
# Which of the two promises breaks? Here the first token, as the queue is at fault. With long prompts it may be the
# pace: a long prompt's step makes all others wait (notebook 11, section 5). Chunked prefill limits the harm. DistServe
# removes it, by prefilling on some GPUs and decoding on others, each with a number of devices that fits its promise.
# (`minillm bench serve --goodput` reports another number under the same name, as vLLM's benchmark does: the requests a
# second, at *one* rate, for which the promises were kept.)
#
# ## 7 · When it is too much
#
# ### A queue with an end
#
# In the grey, every accepted request makes all later ones wait longer, until clients give up, and the server works for
# people who have left. A bounded queue is kinder: whoever comes when it is full is told so at once, and when to come
# again. Here is a server at which at most two answers may be waited for:

# %%
busy = long | {"n": 2, "stream": True}
with (
    background(llm, replace(config, max_requests=2)) as small,
    httpx.Client(base_url=small.url, timeout=60) as http,
    http.stream("POST", "/v1/completions", json=busy) as answer,
):
    lines = answer.iter_lines()
    next(lines)  # it is being answered
    refused = http.post("/v1/completions", json=long)
print(refused.status_code, "Retry-After:", refused.headers["retry-after"])
print(refused.json()["error"])

# %% [markdown]
# *429 Too Many Requests* is understood by load balancers, which try another server, and by clients. OpenAI's waits and
# tries again, twice unless told otherwise. We have told it otherwise (`max_retries=0`), so that nothing is hidden.
#
# ### Told to stop
#
# A new version is to be rolled out; a machine is to be taken away. The operating system sends SIGTERM. To stop at once
# would break every answer that is under way. So the server **drains**: it takes nothing new, answers `/health` with 503
# so that no load balancer sends more, ends what it has begun, and exits with status 0. If that takes too long
# (`--drain-seconds`), the rest is told and stopped. A second signal ends everything at once.

# %%
show_source(Server.handle_exit)

# %%
with (
    background(llm, config, drain_seconds=60) as server,
    httpx.Client(base_url=server.url, timeout=60) as http,
    http.stream("POST", "/v1/completions", json=long | {"stream": True}) as answer,
):
    lines = (line for line in answer.iter_lines() if line)
    next(lines)
    server.handle_exit(signal.SIGTERM, None)  # what the signal would call
    refused, health = http.post("/v1/completions", json=long), http.get("/health")
    rest = list(lines)

# %%
print("is_draining:", server.service.is_draining)
print("a new request:", refused.status_code, refused.json()["error"]["message"])
print("/health:", health.status_code)
(last,) = json.loads(rest[-2].removeprefix("data: "))["choices"]
print(f"the stream that was under way: {len(rest)} more events; ended by {last['finish_reason']}, then {rest[-1]!r}")
assert server.exit_status == 0

# %% [markdown]
# | what happens | what the server does |
# | --- | --- |
# | a client leaves | its requests are aborted before the next step |
# | one request fails | it alone gets an error; the engine is as it was |
# | too many requests | 429 with `Retry-After`; memory stays bounded |
# | SIGTERM | 503 for new ones, running ones end, exit status 0 |
# | the engine itself fails | all who wait get a 500, `/health` a 503, and the exit status is 1 |
#
# ## 8 · From a terminal
#
# All that this notebook did in one process is meant for several:
#
# ```bash
# minillm serve tiny                                   # the server, on port 8000
# curl http://localhost:8000/v1/models
# minillm chat --url http://localhost:8000             # a conversation with it
# minillm bench serve --base-url http://localhost:8000 --request-rate 20 --num-prompts 200
# ```
#
# In a browser, http://localhost:8000/ is a page to chat with the model, which shows the queue and the blocks live while
# it writes. Open it while the last command runs.
#
# ## What to take along
#
# - Two threads: one computes and never waits for clients, one waits and never computes for long. They meet in an inbox
#   and in `call_soon_threadsafe`, without locks.
# - A stream is HTTP chunks of `data:` lines. After the first one, errors can be told only inside it.
# - The same request gives the same tokens as from `LLM`. Whoever leaves is aborted within a step or two.
# - Counters and histograms miss nothing, gauges do. A quantile from buckets is a guess within a bucket.
# - Load a service in an open loop. The wait grows like $\rho/(1-\rho)$, and is felt by the p99 first. Beyond capacity
#   nothing that is measured is a property of the server.
# - $L = \lambda W$ always. Goodput, not throughput, is what can be sold.
# - Refuse early, drain politely, fail loudly.
#
# ## Sources
#
# - Zhong et al. 2024, "DistServe: Disaggregating Prefill and Decoding for Goodput-optimized Large Language Model
#   Serving", OSDI: §1
# - Wierman and Harchol-Balter 2003, "Classifying Scheduling Policies with Respect to Unfairness in an M/GI/1"
# - OpenAI's API reference, and "Server-sent events" in the HTML standard
#
# ## Exercises
#
# Replace each `None`; when the answer is right, the cell says so.
#
# **1.** A completion is streamed with `max_tokens=5`, `ignore_eos=True` and `stream_options={"include_usage": True}`.
# How many `data:` lines are there?

# %%
num_lines = None

if num_lines is not None:
    fields = {"prompt": "Mia", "max_tokens": 5, "ignore_eos": True, "temperature": 0, "stream": True}
    with background(llm, config) as server:
        answer = raw("/v1/completions", **fields, stream_options={"include_usage": True})
    assert num_lines == answer.count("data: "), "tokens, and what comes after them"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `num_lines = 7`: five tokens, one event with the usage and no choices, and `[DONE]`. The reason why it ended comes
# with the fifth token.
#
# </details>
#
# **2.** A service expects `rate` requests a second. A prompt has `prompt` tokens, an answer `output`, and a request
# stays `seconds`. It stores its prompt at once, and the answer evenly over its stay. How many tokens must the KV cache
# hold on average?


# %%
def tokens_held(rate, seconds, prompt, output):
    return None


if tokens_held(10, 3, 500, 200) is not None:
    assert tokens_held(1, 1, 100, 0) == 100, "how many are there at a time?"
    assert tokens_held(10, 3, 500, 200) == 18_000
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def tokens_held(rate, seconds, prompt, output):
#     return rate * seconds * (prompt + output / 2)
# ```
# Little's law gives the number of requests; each holds its prompt and, on average, half of its answer. For the bad
# moments there must be more: preemption (notebook 11) is what happens when there is not.
#
# </details>
#
# **3.** Two servers with one seat each. Either every request is sent to one of the two by the toss of a coin, or both
# take from one common queue. Compute the mean wait for both, with `starts_in_order`. Guess the ratio first, at a
# utilisation of 90 %.


# %%
def waits_apart(arrivals, tosses, service):
    """Mean wait when request i goes to server tosses[i], 0 or 1."""
    return None


def waits_in_common(arrivals, service):
    """Mean wait when both servers take from one queue."""
    return None


if waits_apart([0.0], [0], 1.0) is not None:
    rng = np.random.default_rng(0)
    arrivals = np.cumsum(rng.exponential(1 / 1.8, 20_000)).tolist()
    tosses = rng.integers(2, size=20_000).tolist()
    apart, common = waits_apart(arrivals, tosses, 1.0), waits_in_common(arrivals, 1.0)
    assert waits_apart([0.0, 0.1, 0.2], [0, 1, 0], 1.0) == (0.0 + 0.0 + 0.8) / 3
    assert waits_in_common([0.0, 0.1, 0.2], 1.0) == (0.0 + 0.0 + 0.8) / 3
    assert abs(apart / mean_wait(0.9, 1.0) - 1) < 0.2, "each of the two is an M/D/1"
    print(f"right: {apart:.2f} service times apart, {common:.2f} in common")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def waits_apart(arrivals, tosses, service):
#     waits = []
#     for server in (0, 1):
#         own = [arrival for arrival, toss in zip(arrivals, tosses) if toss == server]
#         waits += [start - arrival for start, arrival in zip(starts_in_order(own, service), own)]
#     return sum(waits) / len(waits)
#
# def waits_in_common(arrivals, service):
#     starts = starts_in_order(arrivals, service, seats=2)
#     return sum(start - arrival for start, arrival in zip(starts, arrivals)) / len(arrivals)
# ```
# Less than half. Apart, one server idles while somebody waits at the other. One engine with many seats is one queue
# for all of them. In front of several engines, a load balancer that looks at `num_requests_waiting` does better than a
# coin.
#
# </details>
#
# **4.** Write `patient`: it calls `send()`, and while the answer is a 429 or a 503, sleeps as long as the server says
# and tries again, at most five times in all. `sleep` is given, so that it can be tested without waiting.


# %%
def patient(send, sleep):
    """The first answer that is no refusal, or the fifth answer."""
    return None


if patient(lambda: httpx.Response(200), time.sleep) is not None:
    naps = []
    script = iter(
        [httpx.Response(429, headers={"retry-after": "2"}), httpx.Response(503, headers={"retry-after": "1"})]
    )
    assert patient(lambda: next(script, httpx.Response(200)), naps.append).status_code == 200
    assert naps == [2, 1], "as long as the server says"
    assert patient(lambda: httpx.Response(429, headers={"retry-after": "1"}), naps.append).status_code == 429
    assert naps == [2, 1] + [1] * 4, "five attempts have four pauses between them"
    assert patient(lambda: httpx.Response(400), naps.append).status_code == 400, "trying again would not help"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def patient(send, sleep):
#     for _ in range(4):
#         answer = send()
#         if answer.status_code not in (429, 503):
#             return answer
#         sleep(int(answer.headers["retry-after"]))
#     return send()
# ```
# Real clients add a random share to the pause. Otherwise all who were refused together come back together.
#
# </details>
#
# ---
# **Back:** [13_making_it_fast](13_making_it_fast.ipynb) · **Next:** [15_deploy_glm4](15_deploy_glm4.ipynb): a model of
# nine billion parameters goes into service.
