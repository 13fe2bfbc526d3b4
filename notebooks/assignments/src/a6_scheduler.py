# %% [markdown]
# # Assignment 6 · A scheduler
#
# Before every step of the model somebody decides which tokens of which requests it computes. In this assignment you
# write the one who decides: running answers go on, long prompts are computed in pieces, those who wait are let in when
# there is room, and when memory runs out the youngest gives its blocks back. Then the engine runs on your scheduler,
# and you are measured by how many users it keeps content.
#
# **By the end of this assignment you will have**
#
# - refused a request that could never be served, before it does harm;
# - divided a budget of tokens among decodes and pieces of prompts;
# - taken memory away without losing an answer;
# - admitted requests by seats, tokens and blocks;
# - reached the goodput of the engine's own scheduler, on traffic that you have not seen.
#
# **You need** notebook 11 (continuous batching), and of notebook 08 what a block table is. No GPU.
# **Time**: about 90 minutes. **Points**: 100.
#
# | task | you write | points |
# | --- | --- | --- |
# | 1 | `Refusing`: `add` | 10 |
# | 2 | `Continuing`: `_schedule_running` | 20 |
# | 3 | `Preempting`: `_preempt`, `_make_room` | 20 |
# | 4 | `Admitting`: `_schedule_waiting` | 15 |
# | 5 | `MyScheduler`: `schedule`; all of it in the engine, and under load | 35 |
#
# Each of tasks 1 to 4 is a small class that replaces some methods of the package's `Scheduler`, and is checked with
# the package's other methods. So a mistake in one task costs nothing in the next one. In task 5 all your pieces run
# together. While your piece is checked, the package's answer to the same task is closed. (The methods' names begin
# with an underscore because nobody but the scheduler calls them.)

# %% tags=["locked:setup"]
import matplotlib.pyplot as plt
import torch

from minillm import LLM
from minillm.course.scheduling import goodput, on_clock, traffic
from minillm.engine.request import Request, Status
from minillm.engine.scheduler import Schedule, Scheduler
from minillm.errors import InvalidRequestError
from minillm.viz import plot_timeline, show_source

torch.set_num_threads(1)
sizes = {"block_size": 8, "max_model_len": 200, "max_num_seqs": 4, "max_num_batched_tokens": 16}
llm = LLM("tiny", dtype="float32", device="cpu", attention_backend="reference", enforce_eager=True, **sizes)
tokenizer = llm.get_tokenizer()

# %% [markdown]
# ## What there is
#
# | of the scheduler | what it is |
# | --- | --- |
# | `self.config` | `max_num_seqs` (seats), `max_num_batched_tokens` (the budget of a step) |
# | `self.pool` | the block pool: `num_free`, `num_blocks`, `blocks_for(num_tokens)` |
# | `self.waiting` | a `deque` of requests, the first in front |
# | `self.running` | a list of requests, from the oldest to the youngest |
#
# | of a request | what it is |
# | --- | --- |
# | `num_tokens` | its prompt and what has been written so far |
# | `num_computed_tokens` | those whose keys and values are stored |
# | `num_uncomputed_tokens` | the difference: 1 for one that writes (a *decode*), more where the prompt is unfinished |
# | `status` | `Status.WAITING` or `Status.RUNNING` |
# | `table` | its block table: `blocks_for(count)`: new blocks for `count` more tokens; `free()`: give all back |
# | `prompt_token_ids`, `max_tokens` | its prompt, and how many tokens may be written |
#
# | of a `Schedule` (a step that is being made) | what it is |
# | --- | --- |
# | `budget` | tokens that may still be given out |
# | `scheduled` | a list of parts; each has `request`, `start`, `count` |
# | `preempted` | requests whose memory was taken in this step |
#
# One method is given. `self._take(request, count, step)` puts the request's next `count` tokens into the step: it makes
# slots for them, adds the part to `step.scheduled` and lowers `step.budget`.

# %% tags=["locked:take"]
show_source(Scheduler._take)

# %% [markdown]
# ## Task 1 · Refuse what can never be (10 points)
#
# Source: notebook 11, section 6.
#
# `add(request)` puts a request at the end of `self.waiting`. But a request that needs more blocks than the pool
# **has**, free or not, would wait forever, or preempt itself forever. It is refused with an `InvalidRequestError`
# whose message says what is wrong, and the queue stays as it was.
#
# How many tokens must be stored for it, at most? Its prompt and its answer, but for the answer's last token: that is
# given out, and never goes through the model.
#
# **By hand.** Blocks of 4 tokens. A prompt of 6 tokens with `max_tokens=3` stores 8 tokens at most: two blocks. With
# `max_tokens=4` it needs three.


# %% tags=["solution:my_refusing"]
class Refusing(Scheduler):
    """A scheduler that takes only what it can serve."""

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue; InvalidRequestError for one that could never be held."""
        ### BEGIN SOLUTION
        stored = len(request.prompt_token_ids) + request.max_tokens - 1
        needed = self.pool.blocks_for(stored)
        if needed > self.pool.num_blocks:
            raise InvalidRequestError(f"{needed} blocks are needed, and there are {self.pool.num_blocks}")
        self.waiting.append(request)
        ### END SOLUTION


# %% tags=["tests:refusing:10"]
import random
import secrets

from minillm.course.scheduling import check_refusals

check_refusals(Refusing, [(6, 3, 2), (6, 4, 2), (30, 30, 2)])  # prompt tokens, max_tokens, blocks
### BEGIN HIDDEN TESTS
rng = random.Random(secrets.randbits(32))
cases = []
for _ in range(100):
    prompt, answer = rng.randrange(1, 40), rng.randrange(1, 40)
    needed = -(-(prompt + answer - 1) // 4)
    cases.append((prompt, answer, max(1, needed + rng.choice((-1, 0, 1)))))
check_refusals(Refusing, cases)
### END HIDDEN TESTS

# %% [markdown]
# ## Task 2 · Those who run (20 points)
#
# Sources: Yu et al. 2022, "Orca", §3 (a new decision at every step); Agrawal et al. 2024, "Sarathi-Serve", §4 (prompts
# in pieces, beside the decodes).
#
# `_schedule_running(step)` gives the running requests their tokens, **those that need a single token first**: somebody
# is reading them, and they cost little. Then the others, whose prompts are not finished; each gets as many tokens as it
# needs and the budget has left. Within both groups the older ones come first.
#
# Before you take tokens, ask for blocks: `self._make_room(request, count, step)` is `True` when there is room. It may
# preempt requests on the way (task 3; here it is the package's), even the one that asks: then it is `False`, and that
# request gets nothing. So look at each request's `status` before it is its turn; one that was preempted is not running.
#
# **By hand.** A budget of 16; `a` has 3 of its 30 tokens computed, `b` 8 of 9, `c` 0 of 5. First `b` gets 1 token, then
# `a` 15 of the 27 that it needs. The budget is used up, so `c` gets none.
#
# <details><summary>Hints</summary>
#
# Make a list of the requests that you will go through *before* you begin: preemption changes `self.running`. A request
# for which no token is left must not get a part with 0 tokens.
#
# </details>


# %% tags=["solution:my_continuing"]
class Continuing(Scheduler):
    """A scheduler whose running requests go on."""

    def _schedule_running(self, step: Schedule) -> None:
        """Give tokens to the running requests: decodes first, then prompts, as far as the budget goes."""
        ### BEGIN SOLUTION
        decodes = [request for request in self.running if request.num_uncomputed_tokens == 1]
        prompts = [request for request in self.running if request.num_uncomputed_tokens > 1]
        for request in decodes + prompts:
            count = min(request.num_uncomputed_tokens, step.budget)
            if count == 0 or request.status is not Status.RUNNING:
                continue
            if self._make_room(request, count, step):
                self._take(request, count, step)
        ### END SOLUTION


# %% [markdown]
# **Pieces of prompts**, as large as the budget:

# %% tags=["tests:chunks:10"]
import secrets

from minillm.course.scheduling import Scene, compare, random_scenes

scenes = [Scene(running=((20, 0),)), Scene(running=((9, 3), (30, 3))), *random_scenes(1, decodes=False, free=100)]
hint = "A request gets what it needs, and never more than step.budget."


def decide(scheduler, step):
    return scheduler._schedule_running(step)


compare(Continuing, scenes, decide, ["_schedule_running"], hint=hint)
### BEGIN HIDDEN TESTS
seed = secrets.randbits(32)
scenes = random_scenes(seed, decodes=False, free=100)
compare(Continuing, scenes, decide, ["_schedule_running"], hint=hint, told=f" (seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# **Decodes first**, and what happens when somebody is preempted meanwhile. In these scenes the budget is large.

# %% tags=["tests:decodes_first:10"]
import secrets

from minillm.course.scheduling import Scene, compare, random_scenes

scenes = [Scene(running=((30, 3), (9, 8), (5, 0)), budget=100), *random_scenes(2, budget=500)]
hint = "Those with num_uncomputed_tokens == 1 come first; one that is not RUNNING any more gets nothing."


def decide(scheduler, step):
    return scheduler._schedule_running(step)


compare(Continuing, scenes, decide, ["_schedule_running"], hint=hint)
### BEGIN HIDDEN TESTS
seed = secrets.randbits(32)
compare(Continuing, random_scenes(seed, budget=500), decide, ["_schedule_running"], hint=hint, told=f" (seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# ## Task 3 · Take memory away (20 points)
#
# Source: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", §4.5
# (recomputation).
#
# `_preempt(request, step)` takes a running request out:
#
# - its part of this step, if it has one already, is taken out of `step.scheduled`, and its tokens go back to
#   `step.budget`;
# - it leaves `self.running`, its blocks are given back, nothing of it is computed any more, and its status is
#   `WAITING`;
# - it goes to the **front** of `self.waiting`, since it came before all others there;
# - it is added to `step.preempted`, and `request.metrics.num_preemptions` is one more.
#
# `_make_room(request, count, step)` preempts the **youngest** running request, as long as there are fewer free blocks
# than `count` more tokens of `request` need. It returns `True` when there is room. If the youngest is `request` itself,
# it is preempted, too, and the answer is `False`.
#
# **By hand.** Blocks of 4 tokens, none free. `a` has 8 of 9 tokens computed, `b` 4 of 5, `c` 9 of 10, and `c` has its
# token in this step already. `a` needs a block. The youngest is `c`: it gives three blocks back, its part is taken out,
# and `a` gets one of the blocks. Had `c` asked, it would have lost its own.


# %% tags=["solution:my_preempting"]
class Preempting(Scheduler):
    """A scheduler that takes memory from the youngest when it runs out."""

    def _preempt(self, request: Request, step: Schedule) -> None:
        """Take a running request's memory; it waits, in front of all others."""
        ### BEGIN SOLUTION
        for part in list(step.scheduled):
            if part.request is request:
                step.scheduled.remove(part)
                step.budget += part.count
        self.running.remove(request)
        request.table.free()
        request.num_computed_tokens = 0
        request.status = Status.WAITING
        request.metrics.num_preemptions += 1
        self.waiting.appendleft(request)
        step.preempted.append(request)
        ### END SOLUTION

    def _make_room(self, request: Request, count: int, step: Schedule) -> bool:
        """Preempt the youngest until there is room for `count` more tokens; False if that was `request` itself."""
        ### BEGIN SOLUTION
        while request.table.blocks_for(count) > self.pool.num_free:
            youngest = self.running[-1]
            self._preempt(youngest, step)
            if youngest is request:
                return False
        return True
        ### END SOLUTION


# %% tags=["tests:preempting:10"]
import secrets

from minillm.course.scheduling import Scene, compare, random_scenes


def decide(scheduler, step):
    """The youngest has its part already, and loses it."""
    youngest = scheduler.running[-1]
    scheduler._take(youngest, min(youngest.num_uncomputed_tokens, step.budget), step)
    before = youngest.metrics.num_preemptions
    scheduler._preempt(youngest, step)
    return youngest.metrics.num_preemptions - before


scenes = [Scene(running=((9, 8), (5, 4), (10, 9)), waiting=(7,)), *random_scenes(3, free=100)]
compare(Preempting, scenes, decide, ["_preempt"])
### BEGIN HIDDEN TESTS
seed = secrets.randbits(32)
compare(Preempting, random_scenes(seed, free=100), decide, ["_preempt"], told=f" (seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# For this check the package's `_preempt` stands in for yours.

# %% tags=["tests:making_room:10"]
import secrets

from minillm.course.scheduling import Scene, compare, random_scenes
from minillm.engine.scheduler import Scheduler


class Room(Preempting):
    _preempt = Scheduler._preempt


def oldest(scheduler, step):
    return scheduler._make_room(scheduler.running[0], scheduler.running[0].num_uncomputed_tokens, step)


def middle(scheduler, step):
    request = scheduler.running[len(scheduler.running) // 2]
    return scheduler._make_room(request, request.num_uncomputed_tokens, step)


# The oldest can always be served: it could run alone.
scenes = [Scene(running=((9, 8), (5, 4), (10, 9)), free=0), *random_scenes(4, free=10)]
hint = "Who is the youngest? And what if it is the one that asks?"
compare(Room, scenes, oldest, ["_make_room"], hint=hint)
compare(Room, [Scene(running=((9, 8), (9, 8)), free=0), *random_scenes(5)], middle, ["_make_room"], hint=hint)
### BEGIN HIDDEN TESTS
seed = secrets.randbits(32)
compare(Room, random_scenes(seed, free=10), oldest, ["_make_room"], hint=hint, told=f" (seed {seed})")
compare(Room, random_scenes(seed, free=3), middle, ["_make_room"], hint=hint, told=f" (seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# ## Task 4 · Those who wait (15 points)
#
# Source: Kwon et al. 2023, §4.5 (first come, first served); notebook 11, section 3.
#
# `_schedule_waiting(step)` lets requests in, in the order of the queue, as long as three things are there: a **seat**
# (`max_num_seqs`), a token of the **budget**, and **blocks** for the tokens that are computed in *this* step. A prompt
# that is longer than what is left of the budget gets its first piece now, and goes on as a running request in the next
# step. Who is let in leaves `self.waiting`, is the youngest in `self.running`, and has the status `RUNNING`.
#
# If the first in the queue does not fit, nobody behind it is tried. Nobody is preempted for the sake of one who waits.
#
# (In this assignment no blocks are shared, so a request that is let in has nothing computed yet: neither a new one nor
# one that was preempted. The package's scheduler also looks for blocks that are known from others.)
#
# **By hand.** Blocks of 4 tokens, 3 free; a budget of 16; two seats, none taken; `a` (9 tokens), `b` (2) and `c` (1)
# wait. `a` gets 9 tokens and 3 blocks. `b` needs a block, and there is none: it waits, and so does `c`.


# %% tags=["solution:my_admitting"]
class Admitting(Scheduler):
    """A scheduler that lets requests in, first come, first served."""

    def _schedule_waiting(self, step: Schedule) -> None:
        """Let requests in while there are seats, budget and blocks."""
        ### BEGIN SOLUTION
        while self.waiting and step.budget and len(self.running) < self.config.max_num_seqs:
            request = self.waiting[0]
            count = min(request.num_tokens, step.budget)
            if self.pool.blocks_for(count) > self.pool.num_free:
                return
            self.waiting.popleft()
            self.running.append(request)
            request.status = Status.RUNNING
            self._take(request, count, step)
        ### END SOLUTION


# %% tags=["tests:admitting:15"]
import secrets

from minillm.course.scheduling import Scene, compare, random_scenes


def decide(scheduler, step):
    return scheduler._schedule_waiting(step)


scenes = [
    Scene(waiting=(9, 2, 1), free=3, seats=2),
    Scene(waiting=(9, 2, 1), seats=2),
    Scene(waiting=(9, 20, 1), budget=16),
    Scene(running=((9, 8), (9, 8)), waiting=(3,), seats=2),
    *random_scenes(6),
]
hint = "Seats, budget and blocks: all three must be there, and nobody is overtaken."
compare(Admitting, scenes, decide, ["_schedule_waiting"], hint=hint)
### BEGIN HIDDEN TESTS
seed = secrets.randbits(32)
compare(Admitting, random_scenes(seed, 200), decide, ["_schedule_waiting"], hint=hint, told=f" (seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# ## Task 5 · The whole (35 points)
#
# `schedule()` makes a step: a `Schedule` with the whole budget, first for those who run, then for those who wait. One
# more rule: **in a step that has preempted somebody nobody is let in**. The blocks that have just become free would go
# to the one who has just lost them, or to a newcomer, and in the next step the same would happen again. (The operating
# systems' word for it is *thrashing*.)
#
# A class may inherit from several, so your pieces go together like this. You may change more than `schedule`: in this
# task your scheduler is not compared with the package's decision by decision. It must keep these rules, which are
# checked at every step:
#
# - no more tokens than the budget, no more requests than seats, slots for each token, and no empty step;
# - a request that needs one token gets it, and the oldest request always gets something: so nobody starves;
# - only the youngest are preempted; who waits holds no blocks; nobody is overtaken; nobody is lost.


# %% tags=["solution:my_whole"]
class MyScheduler(Refusing, Continuing, Preempting, Admitting):
    """Continuous batching with chunked prefill and preemption."""

    def schedule(self) -> Schedule:
        """The next step."""
        ### BEGIN SOLUTION
        step = Schedule(self.config.max_num_batched_tokens)
        self._schedule_running(step)
        if not step.preempted:
            self._schedule_waiting(step)
        return step
        ### END SOLUTION


# %% [markdown]
# ### In the engine
#
# The engine that you know, with your scheduler, four seats and a pool that is too small for four. The tokens must be
# those that the package's scheduler gives with plenty of blocks.

# %% tags=["tests:engine:15"]
import random
import secrets

from minillm import SamplingParams
from minillm.course.scheduling import compare_in_engine

texts = [
    "Mia had a red kite. One day",
    "Once upon a time, in a small house near the farm, there lived a clever boy called Leo. One day Leo went to the "
    "market with his friend, and there he saw a white cup.",
    "There was a kind girl",
]
requests = [
    (tokenizer(text).input_ids, SamplingParams(temperature=0, max_tokens=22, ignore_eos=True)) for text in texts
]
got = compare_in_engine(llm.engine, MyScheduler, requests, num_blocks=9)
print(texts[0] + got[0].outputs[0].text)
print([one.metrics.num_preemptions for one in got], "times each was preempted")
### BEGIN HIDDEN TESTS
seed = secrets.randbits(32)
rng = random.Random(seed)
requests = [
    (
        [rng.randrange(300, 900) for _ in range(rng.randrange(2, 40))],
        SamplingParams(temperature=0, max_tokens=rng.randrange(5, 20), ignore_eos=True),
    )
    for _ in range(6)
]
compare_in_engine(llm.engine, MyScheduler, requests, num_blocks=9, told=f" (seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# ### Under load
#
# How good is a scheduler? Tokens a second are not what users feel. After Zhong et al. 2024 ("DistServe", §1), vLLM's
# benchmark counts **goodput**: requests a second for which a promise was kept. Our promise has two parts: the first
# token after one second at most, and never more than 40 ms between two tokens. The traffic comes in bursts:

# %% tags=["locked:traffic"]
show_source(traffic)

# %% [markdown]
# It runs on the simulator of notebook 11: the real engine, with your scheduler, and a clock that a cost model moves.
# There are 24 seats, a budget of 200 tokens, and 320 blocks of 16 tokens. This is what the package's scheduler does
# with the first 20 requests:

# %% tags=["locked:reference"]
few = on_clock(Scheduler, traffic(seed=1, count=20))
plot_timeline(
    few.trace, x="time", title=f"The package's scheduler: {goodput(few):.1f} requests a second keep the promise"
)
plt.show()

# %% [markdown]
# Your goodput on fresh traffic, as a share of the package's: half of it gives 8 points, 80 % another 6, 95 % the last
# 6.

# %% tags=["tests:goodput_50:8"]
import secrets

from minillm.course.scheduling import check_goodput

check_goodput(MyScheduler, seed=1, share=0.5)
### BEGIN HIDDEN TESTS
check_goodput(MyScheduler, seed=secrets.randbits(32), share=0.5)
### END HIDDEN TESTS

# %% tags=["tests:goodput_80:6"]
import secrets

from minillm.course.scheduling import check_goodput

# Judged on fresh traffic when you have handed in. The share on one example of it is printed above.
### BEGIN HIDDEN TESTS
check_goodput(MyScheduler, seed=secrets.randbits(32), share=0.8)
### END HIDDEN TESTS

# %% tags=["tests:goodput_95:6"]
import secrets

from minillm.course.scheduling import check_goodput

# Judged on fresh traffic when you have handed in. The share on one example of it is printed above.
### BEGIN HIDDEN TESTS
check_goodput(MyScheduler, seed=secrets.randbits(32), share=0.95)
### END HIDDEN TESTS

# %% [markdown]
# ## What to hand in
#
# This notebook, with its name unchanged, after *Restart kernel and run all*. Cells with checks are put back to what
# they were before they are run, so do not write into them.
#
# **To go further** (no points)
#
# 1. Leave out the rule against thrashing. On which seeds of `traffic` does the goodput fall, and what do those have in
#    common? (`simulation.metrics` counts each request's preemptions.)
# 2. Let a request in only when a tenth of the pool stays free. On some traffic this beats the package. On which?
# 3. Give prompts no pieces: a prompt that is longer than the budget waits for a step of its own. Which half of the
#    promise is broken then, and for whom?
