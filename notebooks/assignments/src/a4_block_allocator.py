# %% [markdown]
# # Assignment 4 · A block allocator
#
# Keys and values live in blocks. In this assignment you write the bookkeeping: the pool that gives blocks out, the
# table that says which block holds which tokens, the sharing of blocks between sequences, and the names by which a
# block is found again. Then the engine runs on your allocator.
#
# **By the end of this assignment you will have**
#
# - written a pool with reference counts whose operations take the same time however large it is;
# - given blocks names that change with everything that stands before them;
# - written a block table that grows, shrinks, forks, and copies before it writes;
# - let the engine write stories on your own allocator.
#
# **You need** notebook 08 (blocks, block tables, forks and names of blocks). No GPU.
# **Time**: about 100 minutes. **Points**: 100.
#
# | task | you write | points |
# | --- | --- | --- |
# | 1 | `Counting`: `allocate`, `touch`, `free` | 25 |
# | 2 | `content_hash`, and `Finding`: `remember`, `find`, `forget` | 25 |
# | 3 | `Growing`: `grow`, `slots`, `truncate` | 20 |
# | 4 | `Sharing`: `fork`, `own_last_block` | 15 |
# | 5 | nothing more: your pieces in the engine | 15 |
#
# Each task is a small class that replaces some methods of the package's `BlockPool` or `BlockTable`. The package does
# the rest, so a mistake in one task costs nothing in the next one. Only in task 5 all your pieces run together. While
# your piece is checked, the package's answer to the same task is closed.
#
# **How you are judged.** An allocator is right if no sequence of operations breaks it. So the checks do many random
# operations on yours, and on a model of it made of plain lists. When the two differ, you are told the shortest sequence
# of operations that shows it. Such checks are called *property tests*.

# %% tags=["locked:setup"]
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import torch

from minillm import LLM
from minillm.cache.block_pool import BlockPool
from minillm.cache.block_table import BlockTable, Copy

torch.set_num_threads(1)
sizes = {"block_size": 8, "num_gpu_blocks_override": 64, "max_model_len": 200, "max_num_seqs": 8}
llm = LLM("tiny", dtype="float32", device="cpu", attention_backend="reference", enforce_eager=True, **sizes)
tokenizer = llm.get_tokenizer()

# %% [markdown]
# ## Task 1 · Who holds what (25 points)
#
# Source: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", §4.2 and
# §4.4.
#
# A pool has the blocks 0 … `num_blocks − 1`. Each is held by one or more tables, or it is free. `BlockPool.__init__`
# has made these fields for you:
#
# | field | what it is |
# | --- | --- |
# | `self.ref_counts` | a list: how many hold each block |
# | `self._free` | an `OrderedDict` whose keys are the free blocks, the one that has been free for longest in front |
#
# Write three methods.
#
# - `allocate()` takes the block **that has been free for longest** and returns it, with a count of 1. What it kept is
#   gone: call `self.forget(block)`. If no block is free, call `self.require(1)`, which raises `CacheFullError`.
# - `touch(block)` holds a block once more. The block may be held already, or it may be free: then it is a block of a
#   prefix that was met again, and is free no longer.
# - `free(blocks)` lets go of each of these blocks **once**. Who has no holder left goes to the **end** of the queue, in
#   the order given. A block that nobody holds cannot be given back: raise a `ValueError`, and leave the pool as it was.
#
# Every step must take the same time however many blocks there are. So you cannot search a list for a block. (This is
# checked too: not by a clock, but by counting the entries that you look at.)
#
# **By hand.** A pool of four blocks; the queue is 0 1 2 3.
#
# | | returns | counts | queue |
# | --- | --- | --- | --- |
# | `allocate()` | 0 | 1 0 0 0 | 1 2 3 |
# | `allocate()` | 1 | 1 1 0 0 | 2 3 |
# | `touch(0)` | | 2 1 0 0 | 2 3 |
# | `free([0, 1])` | | 1 0 0 0 | 2 3 1 |
# | `touch(1)` | | 1 1 0 0 | 2 3 |
#
# <details><summary>Hints</summary>
#
# `OrderedDict.popitem(last=False)` takes the entry in front, and returns a key and a value. `del d[key]` takes one out
# of the middle. `d[key] = None` puts one at the end.
#
# </details>


# %% tags=["solution:my_counting"]
class Counting(BlockPool):
    """A pool that knows how many hold each block."""

    def allocate(self) -> int:
        """Hold the block that has been free for longest, and return it; CacheFullError where none is free."""
        ### BEGIN SOLUTION
        self.require(1)
        block, _ = self._free.popitem(last=False)
        self.forget(block)
        self.ref_counts[block] = 1
        return block
        ### END SOLUTION

    def touch(self, block: int) -> None:
        """Hold a block once more, be it held or free."""
        ### BEGIN SOLUTION
        if self.ref_counts[block] == 0:
            del self._free[block]
        self.ref_counts[block] += 1
        ### END SOLUTION

    def free(self, blocks: Iterable[int]) -> None:
        """Let go of each block once; ValueError for one that nobody holds."""
        ### BEGIN SOLUTION
        for block in blocks:
            if self.ref_counts[block] == 0:
                raise ValueError(f"block {block} is given back, and nobody holds it")
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self._free[block] = None
        ### END SOLUTION


# %% [markdown]
# **Nothing is lost.** Every block is held or free, never both. None is given to a second holder. Every hold is counted.
# (The order in which you give blocks out is the next cell's matter.)

# %% tags=["tests:counting_holds:10"]
import secrets

from minillm.course.allocator import judge_pool
from minillm.course.checks import check_equal, without

answers = ["minillm.cache.block_pool:BlockPool." + name for name in ("allocate", "touch", "free")]
with without(*answers):
    pool = Counting(4, 4)
    first, second = pool.allocate(), pool.allocate()
    pool.touch(first)
    check_equal(sorted(pool.ref_counts), [0, 0, 1, 2], "ref_counts, sorted,", hint="Two blocks, one of them touched.")
    pool.free([first, second])
    check_equal(sum(pool.ref_counts), 1, "the sum of ref_counts", hint="Each block is let go once, not altogether.")
    check_equal(pool.num_free, 3, "num_free", hint="Who has no holder left goes back into _free.")
    judge_pool(Counting, seed=1)
### BEGIN HIDDEN TESTS
with without(*answers):
    judge_pool(Counting, seed=secrets.randbits(32), rounds=120)
### END HIDDEN TESTS

# %% [markdown]
# **Which block is next.** The one that has been free for longest; and what it kept is forgotten.

# %% tags=["tests:counting_order:5"]
import secrets

from minillm.course.allocator import judge_pool
from minillm.course.checks import check_equal, without

answers = ["minillm.cache.block_pool:BlockPool." + name for name in ("allocate", "touch", "free")]
kinds = ("allocate", "allocate", "free", "free", "touch", "meet", "remember", "remember")
with without(*answers):
    pool = Counting(4, 4)
    check_equal([pool.allocate(), pool.allocate()], [0, 1], "the first two blocks")
    pool.touch(0)
    pool.free([0, 1])
    check_equal(pool.free_blocks, (2, 3, 1), "free_blocks", hint="A block that becomes free goes to the end.")
    judge_pool(Counting, seed=2, kinds=kinds, ordered=True)
### BEGIN HIDDEN TESTS
with without(*answers):
    judge_pool(Counting, seed=secrets.randbits(32), kinds=kinds, ordered=True, rounds=120)
### END HIDDEN TESTS

# %% [markdown]
# **Given back twice.** A program that gives a block back twice has a mistake, and the sooner it is told, the better. If
# nobody tells it, the same block is given to two sequences later, and one reads what the other wrote.

# %% tags=["tests:counting_twice:5"]
import secrets

from minillm.course.allocator import judge_pool
from minillm.course.checks import without

answers = ["minillm.cache.block_pool:BlockPool." + name for name in ("allocate", "touch", "free")]
kinds = ("allocate", "allocate", "free", "free twice", "touch")
with without(*answers):
    judge_pool(Counting, seed=3, kinds=kinds)
### BEGIN HIDDEN TESTS
with without(*answers):
    judge_pool(Counting, seed=secrets.randbits(32), kinds=kinds, rounds=120)
### END HIDDEN TESTS

# %% [markdown]
# **The same few steps**, in a pool of 2,000 blocks.

# %% tags=["tests:counting_work:5"]
from minillm.course.allocator import check_constant_work
from minillm.course.checks import without

answers = ["minillm.cache.block_pool:BlockPool." + name for name in ("allocate", "touch", "free")]
with without(*answers):
    check_constant_work(Counting)
### BEGIN HIDDEN TESTS
with without(*answers):
    check_constant_work(Counting, num_blocks=20_000)
### END HIDDEN TESTS

# %% [markdown]
# ## Task 2 · A name for a block's content (25 points)
#
# Source: Kwon et al. 2023, §4.4 ("Shared prefix"); notebook 08, section 6.
#
# A full block never changes, so it can be known by its content. The keys in it depend on its own tokens **and on all
# tokens before them**. So the name of a block is made of the name of the block before and of its own tokens:
#
# $$h_0 = \text{hash}(\text{ROOT}, t_0 … t_{b-1}), \qquad h_i = \text{hash}(h_{i-1}, t_{ib} … t_{ib+b-1}).$$
#
# ### 2a · The hash
#
# `content_hash(parent, tokens)` returns `bytes`, 16 of them or more. `parent` is the name of the block before, or
# `ROOT` (no bytes at all) for the first block; `tokens` are whole numbers from 0 to more than 100,000.
#
# Nobody must be able to find two contents with one name, not even on purpose: who finds a block by a wrong name goes on
# writing somebody else's text. So take a hash that was made for this (`hashlib.blake2b` has been imported), and mind
# how you turn the tokens into bytes. `[1, 23]` and `[12, 3]` are different, and so are the parent `b"1"` with `[2, 3]`
# and the parent `b"12"` with `[3]`.
#
# **By hand.** Blocks of 2 tokens; A is `[5, 6, 7, 8]` and B is `[9, 9, 7, 8]`. A's and B's second blocks hold the same
# tokens, and have different names, since their parents differ.
#
# <details><summary>Hints</summary>
#
# `number.to_bytes(8, "little")` always has 8 bytes. `blake2b(digest_size=16)` makes a hash, `.update(more)` feeds it,
# `.digest()` gives its bytes. Parents differ in length (`ROOT` has none): feed the length, too, or put something of
# fixed length in front.
#
# </details>


# %% tags=["solution:my_content_hash"]
def content_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full block: of its tokens, and of all that stands before them."""
    ### BEGIN SOLUTION
    digest = blake2b(digest_size=16)
    digest.update(len(parent).to_bytes(8, "little") + parent)
    for token in tokens:
        digest.update(int(token).to_bytes(8, "little"))
    return digest.digest()
    ### END SOLUTION


# %% tags=["tests:content_hash:10"]
import secrets

from minillm.course.allocator import check_hash
from minillm.course.checks import check, without

with without("minillm.cache.block_pool:block_hash"):
    a = content_hash(content_hash(b"", [5, 6]), [7, 8])
    b = content_hash(content_hash(b"", [9, 9]), [7, 8])
    check(a != b, "[5, 6, 7, 8] and [9, 9, 7, 8]: the second blocks have one name. Does it depend on the parent?")
    check_hash(content_hash, seed=1)
### BEGIN HIDDEN TESTS
with without("minillm.cache.block_pool:block_hash"):
    for _ in range(20):
        check_hash(content_hash, seed=secrets.randbits(32))
### END HIDDEN TESTS

# %% [markdown]
# ### 2b · The dictionary
#
# The pool keeps two fields for the names:
#
# | field | what it is |
# | --- | --- |
# | `self._by_hash` | a dictionary: from a name to the block that has this content |
# | `self.hashes` | a list: the name of each block, or `None` |
#
# - `remember(block, content)`: from now on the block is found by this name. If **another block has this name already**,
#   nothing changes: two requests have computed the same, and one of the two blocks is enough. If the block itself had
#   another name, it has it no longer. Where `self.enable_prefix_caching` is `False`, nothing is remembered.
# - `find(content)`: the block of this name, or `None`. It may be held or free.
# - `forget(block)`: the block is found no more. It may have no name; then nothing is to be done.
#
# A block that becomes free **keeps** its name: that is what makes all free memory a cache. Its name is forgotten when
# it is given out again (`allocate` calls `forget`). Together with task 1's queue, what was used least recently goes
# first.
#
# **By hand.** `remember(3, b"x")`, `remember(4, b"x")`: `find(b"x")` is 3. `remember(3, b"y")`: `find(b"x")` is `None`,
# and `find(b"y")` is 3. `forget(3)`: `find(b"y")` is `None`.


# %% tags=["solution:my_finding"]
class Finding(BlockPool):
    """A pool whose full blocks can be found by their content."""

    def remember(self, block: int, content: bytes) -> None:
        """Let a full block be found by its content, unless another one is found by it already."""
        ### BEGIN SOLUTION
        if self.enable_prefix_caching and content not in self._by_hash:
            self.forget(block)
            self.hashes[block] = content
            self._by_hash[content] = block
        ### END SOLUTION

    def find(self, content: bytes) -> int | None:
        """The block, held or free, that has this content."""
        ### BEGIN SOLUTION
        return self._by_hash.get(content)
        ### END SOLUTION

    def forget(self, block: int) -> None:
        """Let this block be found no more."""
        ### BEGIN SOLUTION
        content = self.hashes[block]
        if content is not None:
            del self._by_hash[content]
            self.hashes[block] = None
        ### END SOLUTION


# %% tags=["tests:finding:15"]
import secrets

from minillm.course.allocator import judge_pool
from minillm.course.checks import check_equal, without

answers = ["minillm.cache.block_pool:BlockPool." + name for name in ("remember", "find", "forget")]
kinds = ("allocate", "allocate", "free", "free", "meet", "remember", "remember", "remember")
with without(*answers):
    pool = Finding(6, 4)
    pool.remember(3, b"x")
    pool.remember(4, b"x")
    check_equal(pool.find(b"x"), 3, 'find(b"x")', hint="The first of two equal blocks stays the one that is found.")
    pool.remember(3, b"y")
    check_equal([pool.find(b"x"), pool.find(b"y")], [None, 3], "what is found", hint="Block 3 has one name at a time.")
    pool.forget(3)
    check_equal(pool.find(b"y"), None, 'find(b"y"), after forget,')
    without_cache = Finding(6, 4, enable_prefix_caching=False)
    without_cache.remember(3, b"x")
    check_equal(without_cache.find(b"x"), None, "what a pool without prefix caching finds")
    judge_pool(Finding, seed=4, kinds=kinds)
### BEGIN HIDDEN TESTS
with without(*answers):
    judge_pool(Finding, seed=secrets.randbits(32), kinds=kinds, ordered=True, rounds=120)
### END HIDDEN TESTS

# %% [markdown]
# ## Task 3 · A table that grows and shrinks (20 points)
#
# Source: Kwon et al. 2023, §4.2 and §4.3.
#
# A `BlockTable` has `self.pool`, `self.blocks` (a list, in the sequence's order) and `self.num_tokens`. Its method
# `append(count)` makes room for `count` more tokens. Here it is put together of two pieces, one of this task and one of
# task 4:


# %% tags=["locked:table"]
class Table(BlockTable):
    """A table whose `append` is made of two pieces."""

    def append(self, count: int) -> list[Copy]:
        """Make slots for `count` more tokens; all of them, or CacheFullError and nothing has changed."""
        self.pool.require(self.blocks_for(count))  # enough free blocks, a copy included? Else it raises
        copies = self.own_last_block() if count else []  # task 4; nothing to do where nobody shares
        self.grow(count)
        return copies


# %% [markdown]
# - `grow(count)` takes as many new blocks from the pool as `count` more tokens need, and counts the tokens. There are
#   enough free blocks: `append` has made sure. `self.pool.blocks_for(n)` says how many blocks hold `n` tokens.
# - `slots(start, end)` returns where the tokens `start` … `end − 1` lie, as a list: block · block_size + place.
# - `truncate(num_tokens)` keeps the first `num_tokens` tokens and gives the blocks behind them back, **the last one
#   first**. A beginning without its end may be met again; an end without its beginning is never found. So the end
#   should be given to others first.
#
# **By hand.** Blocks of 4 tokens, an empty pool of 6. `append(6)`: blocks `[0, 1]`. `append(2)`: still `[0, 1]`, since
# block 1 had two free slots. `append(1)`: `[0, 1, 2]`. `slots(3, 6)` is `[3, 4, 5]`. `truncate(4)`: `[0]`, and the
# queue of free blocks ends with 2, 1.


# %% tags=["solution:my_growing"]
class Growing(Table):
    """A table that grows and shrinks."""

    def grow(self, count: int) -> None:
        """Take the blocks that `count` more tokens need."""
        ### BEGIN SOLUTION
        self.num_tokens += count
        while len(self.blocks) < self.pool.blocks_for(self.num_tokens):
            self.blocks.append(self.pool.allocate())
        ### END SOLUTION

    def slots(self, start: int, end: int) -> list[int]:
        """Where tokens start … end - 1 lie."""
        ### BEGIN SOLUTION
        size = self.pool.block_size
        return [self.blocks[position // size] * size + position % size for position in range(start, end)]
        ### END SOLUTION

    def truncate(self, num_tokens: int) -> None:
        """Keep the first tokens, and give the blocks behind them back, the last one first."""
        ### BEGIN SOLUTION
        keep = self.pool.blocks_for(num_tokens)
        self.pool.free(reversed(self.blocks[keep:]))
        del self.blocks[keep:]
        self.num_tokens = num_tokens
        ### END SOLUTION


# %% [markdown]
# **Growing**, and where each token is:

# %% tags=["tests:growing:10"]
import secrets

from minillm.cache.block_pool import BlockPool
from minillm.course.allocator import complete, judge_tables
from minillm.course.checks import check_equal, without

answers = ["minillm.cache.block_table:BlockTable." + name for name in ("append", "slots")]
answers.append("minillm.course.allocator:Rest.grow")
kinds = ("begin", "append", "append", "append", "slots")
with without(*answers):
    table = complete(Growing)(BlockPool(6, 4))
    for count, blocks in ((6, [0, 1]), (2, [0, 1]), (1, [0, 1, 2])):
        table.append(count)
        check_equal(table.blocks, blocks, f"blocks, after append({count}),", hint="Is the last block full?")
    check_equal(table.num_tokens, 9, "num_tokens")
    check_equal(table.slots(3, 6), [3, 4, 5], "slots(3, 6)")
    judge_tables(Growing, seed=5, kinds=kinds)
### BEGIN HIDDEN TESTS
with without(*answers):
    judge_tables(Growing, seed=secrets.randbits(32), kinds=kinds, rounds=120)
### END HIDDEN TESTS

# %% [markdown]
# **Shrinking** (`free` is `truncate(0)`). For this check the package's `grow` stands in for yours.

# %% tags=["tests:shrinking:10"]
import secrets

from minillm.cache.block_pool import BlockPool
from minillm.course.allocator import complete, judge_tables
from minillm.course.checks import check_equal, without

answers = ["minillm.cache.block_table:BlockTable.truncate"]
kinds = ("begin", "append", "append", "truncate", "truncate", "free")
with without(*answers):
    table = complete(Growing, given=("grow",))(BlockPool(6, 4))
    table.append(9)
    table.truncate(4)
    check_equal((table.blocks, table.num_tokens), ([0], 4), "blocks and num_tokens, after truncate(4),")
    check_equal(table.pool.free_blocks, (3, 4, 5, 2, 1), "free_blocks", hint="The last block is given back first.")
    judge_tables(Growing, seed=6, kinds=kinds, given=("grow",))
### BEGIN HIDDEN TESTS
with without(*answers):
    judge_tables(Growing, seed=secrets.randbits(32), kinds=kinds, given=("grow",), rounds=120)
### END HIDDEN TESTS

# %% [markdown]
# ## Task 4 · Sharing and copy-on-write (15 points)
#
# Source: Kwon et al. 2023, §4.4, figure 8.
#
# - `fork()` returns a second table with the same tokens, in the same blocks: `type(self)(self.pool)`, each block held
#   once more. The two lists must be two lists, since the two sequences go on differently.
# - `own_last_block()` is called before tokens are written. If the next token falls into a block that somebody else
#   holds too, then this table needs a block of its own: take one, let go of the shared one, and return
#   `[Copy(source, target)]`, so that the runner copies what is in it. In all other cases there is nothing to do, and
#   the list is empty. (`self._last_is_shared()` is the question.) Full blocks are never copied: nobody writes into
#   them.
#
# **By hand.** Blocks of 4 tokens; a table of 6 tokens in blocks `[0, 1]` is forked: counts 2 2. The parent appends a
# token: block 1 is half full and shared, so it becomes `[0, 2]` and returns `[Copy(1, 2)]`; counts 2 1 1. The child
# appends a token: nobody shares block 1 any more, so it returns `[]` and stays `[0, 1]`.


# %% tags=["solution:my_sharing"]
class Sharing(Table):
    """A table that shares its blocks with others until it writes."""

    def fork(self) -> "Sharing":
        """A second table with the same tokens, in the same blocks."""
        ### BEGIN SOLUTION
        child = type(self)(self.pool)
        for block in self.blocks:
            self.pool.touch(block)
        child.blocks = list(self.blocks)
        child.num_tokens = self.num_tokens
        return child
        ### END SOLUTION

    def own_last_block(self) -> list[Copy]:
        """If the block that is written next is shared, take one in its place; the copy that must be made."""
        ### BEGIN SOLUTION
        if not self._last_is_shared():
            return []
        shared = self.blocks[-1]
        self.blocks[-1] = self.pool.allocate()
        self.pool.free([shared])
        return [Copy(shared, self.blocks[-1])]
        ### END SOLUTION


# %% [markdown]
# **Forks** that nobody writes to:

# %% tags=["tests:forking:5"]
import secrets

from minillm.course.allocator import judge_tables
from minillm.course.checks import without

answers = ["minillm.cache.block_table:BlockTable.fork", "minillm.course.allocator:Rest.fork"]
kinds = ("begin", "fork", "fork", "truncate", "free")

with without(*answers):
    judge_tables(Sharing, seed=7, kinds=kinds, given=("own_last_block",))
### BEGIN HIDDEN TESTS
with without(*answers):
    judge_tables(Sharing, seed=secrets.randbits(32), kinds=kinds, given=("own_last_block",), rounds=120)
### END HIDDEN TESTS

# %% [markdown]
# **Writing** into what others hold. For this check the package's `fork` stands in for yours.

# %% tags=["tests:copying:10"]
import secrets

from minillm.cache.block_pool import BlockPool
from minillm.course.allocator import complete, judge_tables
from minillm.course.checks import check_equal, without

answers = ["minillm.cache.block_table:BlockTable.append"]
kinds = ("begin", "append", "append", "append", "fork", "fork", "free")
with without(*answers):
    parent = complete(Sharing, given=("fork",))(BlockPool(6, 4))
    parent.append(6)
    child = parent.fork()
    check_equal(parent.append(1), [(1, 2)], "what the parent's append returns")
    check_equal(parent.blocks, [0, 2], "the parent's blocks")
    check_equal(child.append(1), [], "what the child's append returns", hint="Nobody else holds block 1 any more.")
    check_equal(parent.pool.ref_counts, [2, 1, 1, 0, 0, 0], "ref_counts", hint="Was the shared block let go?")
    judge_tables(Sharing, seed=8, kinds=kinds, given=("fork",))
### BEGIN HIDDEN TESTS
with without(*answers):
    judge_tables(Sharing, seed=secrets.randbits(32), kinds=kinds, given=("fork",), rounds=120)
### END HIDDEN TESTS

# %% [markdown]
# ## Task 5 · In the engine (15 points)
#
# Nothing more is to be written. A class may inherit from two, so your pieces go together like this:


# %% tags=["locked:together"]
class MyPool(Counting, Finding):
    """A pool of tasks 1 and 2."""


class MyTable(Sharing, Growing):
    """A table of tasks 3 and 4."""


beginning = "Once upon a time, in a small house near the farm, there lived a clever boy called Leo."
endings = [" He had a red kite.", " One day a strong wind came.", " His friend was a kind girl called Mia."]
prompts = [tokenizer(beginning + ending).input_ids for ending in endings]

# %% [markdown]
# The engine's pool, its tables and the hash are exchanged for yours; the rest of the engine is as ever. Two answers to
# each prompt (`n=2`) fork your tables, and prompts that begin alike find your blocks.

# %% tags=["tests:engine_tokens:10"]
import random
import secrets

from minillm import SamplingParams
from minillm.course.allocator import compare_in_engine
from minillm.course.checks import check

greedy = SamplingParams(temperature=0, max_tokens=40)
requests = [(prompts[0], greedy), *((ids, SamplingParams(n=2, seed=5, max_tokens=8)) for ids in prompts)]
got, expected = compare_in_engine(llm.engine, MyPool(64, 8), MyTable, content_hash, requests)
print(beginning + endings[0] + got[0].outputs[0].text)
found, there = (sum(one.num_cached_tokens for one in outputs) for outputs in (got, expected))
check(found == there, f"{found} prompt tokens were found in memory, and {there} could have been")
### BEGIN HIDDEN TESTS
seed = secrets.randbits(32)
rng = random.Random(seed)
requests = [
    (
        rng.choice(prompts)[: rng.randrange(8, 40)],
        SamplingParams(n=rng.choice((1, 2, 3)), seed=rng.randrange(100), max_tokens=rng.randrange(4, 12)),
    )
    for _ in range(5)
]
compare_in_engine(llm.engine, MyPool(64, 8), MyTable, content_hash, requests, f" (seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# Now a pool that is too small for all of them: the engine takes blocks away from the youngest and gives them again, so
# your free list is used hard.

# %% tags=["tests:engine_pressure:5"]
import random
import secrets

from minillm import SamplingParams
from minillm.course.allocator import compare_in_engine

requests = [(ids, SamplingParams(temperature=0, max_tokens=25, ignore_eos=True)) for ids in prompts]
got, _ = compare_in_engine(llm.engine, MyPool(12, 8), MyTable, content_hash, requests)
print([one.metrics.num_preemptions for one in got], "times each lost its blocks, and the answers are the same")
### BEGIN HIDDEN TESTS
seed = secrets.randbits(32)
rng = random.Random(seed)
requests = [
    (
        [rng.randrange(300, 900) for _ in range(rng.randrange(5, 40))],
        SamplingParams(temperature=0, max_tokens=rng.randrange(10, 20), ignore_eos=True),
    )
    for _ in range(4)
]
compare_in_engine(llm.engine, MyPool(8, 8), MyTable, content_hash, requests, f" (seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# ## What to hand in
#
# This notebook, with its name unchanged, after *Restart kernel and run all*. Cells with checks are put back to what
# they were before they are run, so do not write into them.
#
# **To go further** (no points)
#
# 1. Print `llm.engine.counts` before and after task 5. How many prompt tokens were asked for, how many found?
# 2. Let `truncate` give the *first* block back first. All checks of who reads what still pass. What is worse now? Find
#    a row of requests for which it costs tokens, by `num_cached_tokens`.
# 3. Evict by another rule, e.g. the block that was found least often, and compare it with LRU on prompts of your own.
