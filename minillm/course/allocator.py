"""What assignment 4 is judged by: a pool and tables of blocks beside models made of lists and dictionaries."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, SupportsIndex
from unittest.mock import patch

import minillm.engine.engine
import minillm.engine.request
from minillm.cache.block_pool import BlockPool
from minillm.cache.block_table import BlockTable, Copy
from minillm.course.checks import CheckError, check, check_equal, without
from minillm.course.operations import Operation, judge
from minillm.course.running import Requests, check_same_tokens, run_engine, scheduled_by
from minillm.engine.engine import Engine
from minillm.engine.outputs import RequestOutput
from minillm.engine.scheduler import Scheduler
from minillm.errors import CacheFullError

SIZE = 4
"""Tokens of a block in all judgements."""

ContentHash = Callable[[bytes, Sequence[int]], bytes]

POOL_METHODS = ("allocate", "touch", "free", "remember", "find", "forget")
TABLE_METHODS = ("append", "slots", "truncate", "fork")
ANSWERS = (
    *(f"minillm.cache.block_pool:BlockPool.{name}" for name in POOL_METHODS),
    *(f"minillm.cache.block_table:BlockTable.{name}" for name in TABLE_METHODS),
    "minillm.cache.block_pool:block_hash",
    "minillm.course.allocator:Rest",
)
"""The package's answers to the assignment, as `without` names them."""

CONTENTS = (b"red", b"green", b"blue")


def judge_pool(
    pool_class: type[BlockPool],
    *,
    seed: int,
    kinds: Sequence[str] = ("allocate", "allocate", "free", "free", "touch", "meet"),
    ordered: bool = False,
    rounds: int = 60,
) -> None:
    """Random operations on pools of five blocks.

    Args:
        kinds: operations: allocate, free (one hold), touch (a held block), meet (touch a free one), remember, and
            free twice (a block that nobody holds). The more often one is named, the more often it comes.
        ordered: whether the free blocks' order is judged too.

    Raises:
        CheckError: they went wrong; the message has the shortest sequence that does.
    """
    judge(lambda: _PoolWorld(pool_class, ordered), lambda rng: _pool_operations(rng, kinds), seed=seed, rounds=rounds)


def judge_tables(
    table_class: type[BlockTable],
    *,
    seed: int,
    kinds: Sequence[str],
    given: Sequence[str] = (),
    rounds: int = 60,
) -> None:
    """Random operations on tables over the package's pool of six blocks, with a memory that shows who reads what.

    Args:
        kinds: operations: begin (with a few tokens), append, fork, truncate, free, slots (judge what the method says).
        given: methods that are taken from the package, and not from this class.

    Raises:
        CheckError: they went wrong; the message has the shortest sequence that does.
    """
    whole = complete(table_class, given)
    judge(lambda: _TableWorld(whole), lambda rng: _table_operations(rng, kinds), seed=seed, rounds=rounds)


def complete(table_class: type[BlockTable], given: Sequence[str] = ()) -> type[BlockTable]:
    """The class with what it lacks, and with what is `given`, from `Rest`."""
    return type(table_class.__name__, (table_class, Rest), {name: vars(Rest)[name] for name in given})


class Rest(BlockTable):
    """The pieces of a table that a student's class does not have."""

    def grow(self, count: int) -> None:
        """As many new blocks as `count` more tokens need."""
        self.num_tokens += count
        self.blocks += [self.pool.allocate() for _ in range(self.pool.blocks_for(self.num_tokens) - len(self.blocks))]

    def own_last_block(self) -> list[Copy]:
        """Nothing is shared where nobody forks."""
        return []

    def fork(self) -> Rest:
        """A second table of the same blocks, of the same class."""
        child = type(self)(self.pool)
        for block in self.blocks:
            self.pool.touch(block)
        child.blocks, child.num_tokens = list(self.blocks), self.num_tokens
        return child


# --- a pool beside lists


class _PoolWorld:
    """A pool, and who holds what. A name stands for a block and is there while it is held by that name."""

    def __init__(self, pool_class: type[BlockPool], ordered: bool) -> None:
        self.lines = [f"pool = {pool_class.__name__}(num_blocks=5, block_size={SIZE})"]
        self.ordered = ordered
        self.pool = pool_class(5, SIZE)
        self.names: dict[str, list[int]] = {}
        self.free = list(range(5))
        self.known: dict[bytes, int] = {}

    def do(self, operation: Operation) -> None:
        kind, name = operation.kind, operation.name
        if kind == "allocate":
            self._allocate(operation.new)
        elif kind == "meet" and self.free:
            block = self.free[operation.argument % len(self.free)]
            self._touch(operation.new, block)
        elif kind == "free twice" and self.free:
            self._free_twice(self.free[operation.argument % len(self.free)])
        elif name in self.names and kind == "touch":
            self._touch(name, self.names[name][0])
        elif name in self.names and kind == "free":
            self._free(name)
        elif name in self.names and kind == "remember":
            self._remember(self.names[name][0], CONTENTS[operation.argument % len(CONTENTS)])
        self._check()

    def _allocate(self, name: str) -> None:
        self.lines.append(f"{name} = pool.allocate()")
        if not self.free:
            _expect(CacheFullError, self.pool.allocate, "every block is held")
            return
        block = self.pool.allocate()
        self.lines[-1] += f"  # {block}"
        check(type(block) is int and 0 <= block < 5, f"allocate returned {block!r}, and should return a block's number")
        holders = [other for other, blocks in self.names.items() if block in blocks]
        check(not holders, f"block {block} is given out, and {', '.join(holders)} holds it already")
        first = self.free[0]
        message = f"block {block} is given out, and block {first} has been free for longer"
        check(not self.ordered or block == first, message)
        self.free.remove(block)
        self.names[name] = [block]
        self.known = {content: where for content, where in self.known.items() if where != block}

    def _touch(self, name: str, block: int) -> None:
        self.lines.append(f"pool.touch({block})  # which is {'free' if block in self.free else 'held'}")
        self.pool.touch(block)
        self.names.setdefault(name, []).append(block)
        if block in self.free:
            self.free.remove(block)

    def _free(self, name: str) -> None:
        block = self.names[name].pop()
        if not self.names[name]:
            del self.names[name]
        self.lines.append(f"pool.free([{block}])")
        self.pool.free([block])
        if not self._held()[block]:
            self.free.append(block)

    def _free_twice(self, block: int) -> None:
        self.lines.append(f"pool.free([{block}])  # which nobody holds")
        _expect(ValueError, lambda: self.pool.free([block]), f"nobody holds block {block}")

    def _remember(self, block: int, content: bytes) -> None:
        self.lines.append(f"pool.remember({block}, {content!r})")
        self.pool.remember(block, content)
        if content not in self.known:
            self.known = {other: where for other, where in self.known.items() if where != block} | {content: block}

    def _held(self) -> Counter[int]:
        return Counter(block for blocks in self.names.values() for block in blocks)

    def _check(self) -> None:
        _check_holders(self.pool, self._held())
        if self.ordered:
            check_equal(self.pool.free_blocks, tuple(self.free), "the order of the free blocks")
        for content in CONTENTS:
            found, expected = self.pool.find(content), self.known.get(content)
            check(found == expected, f"find({content!r}) is {found!r}, and should be {expected!r}")


def _pool_operations(rng: random.Random, kinds: Sequence[str]) -> list[Operation]:
    names = [f"b{number}" for number in range(40)]
    return [
        Operation(rng.choice(kinds), rng.choice(names[max(0, number - 8) : number + 1]), rng.randrange(12), new=name)
        for number, name in enumerate(names)
    ]


def _check_holders(pool: BlockPool, held: Counter[int]) -> None:
    """Every hold is counted, and every block is held or free: none lost, none both."""
    for block, count in enumerate(pool.ref_counts):
        check(count == held[block], f"ref_counts[{block}] is {count!r}, and the block is held {held[block]} times")
    free = Counter(pool.free_blocks)
    for block in range(pool.num_blocks):
        check(bool(held[block]) or block in free, f"block {block} is lost: nobody holds it, and it is not free")
        check(not (held[block] and block in free), f"block {block} is held, and it stands among the free blocks")


def _expect(kind: type[Exception], act: Callable[[], object], why: str) -> None:
    """Raise CheckError unless `act` raises an error of this kind."""
    try:
        act()
    except kind:
        return
    raise CheckError(f"{why}: {kind.__name__} should be raised, and nothing was")


# --- tables beside their tokens


class _TableWorld:
    """Tables, the tokens that each should hold, and a memory of slots that is written as a runner would."""

    def __init__(self, table_class: type[BlockTable]) -> None:
        self.lines = [f"pool = BlockPool(num_blocks=6, block_size={SIZE})"]
        self.table_class = table_class
        self.pool = BlockPool(6, SIZE)
        self.memory: dict[int, int] = {}
        self.tables: dict[str, BlockTable] = {}
        self.tokens: dict[str, list[int]] = {}
        self.next_token = 100

    def do(self, operation: Operation) -> None:
        kind, name, argument = operation.kind, operation.name, operation.argument
        if kind == "begin":
            self.lines.append(f"{operation.new} = {self.table_class.__name__}(pool)")
            self.tables[operation.new], self.tokens[operation.new] = self.table_class(self.pool), []
            self._append(operation.new, argument % 11)
        elif name in self.tables:
            if kind == "append":
                self._append(name, argument % 11)
            elif kind == "fork":
                self._fork(name, operation.new)
            elif kind == "truncate":
                self._truncate(name, argument % (len(self.tokens[name]) + 1))
            elif kind == "free":
                self._free(name)
            elif kind == "slots":
                self._slots(name)
        self._check()

    def _append(self, name: str, count: int) -> None:
        table, tokens = self.tables[name], self.tokens[name]
        self.lines.append(f"{name}.append({count})")
        before = list(table.blocks)
        shared = len(tokens) % SIZE != 0 and self._held()[before[-1]] > 1 and count > 0
        needed = self.pool.blocks_for(len(tokens) + count) - len(before) + shared
        if needed > len(self.pool.free_blocks):
            why = f"{needed} blocks are needed, {len(self.pool.free_blocks)} are free"
            _expect(CacheFullError, lambda: table.append(count), why)
            check_equal(table.blocks, before, f"after the error, {name}.blocks")
            check_equal(table.num_tokens, len(tokens), f"after the error, {name}.num_tokens")
            return
        copies = table.append(count)
        if copies:
            self.lines[-1] += f"  # {copies}"
        self._copy(copies, shared, before[-1] if before else -1)
        new = list(range(self.next_token, self.next_token + count))
        self.next_token += count
        tokens += new
        self._check_size(name)
        for position in range(len(tokens) - count, len(tokens)):
            block = table.blocks[position // SIZE]
            holders = [other for other, one in self.tables.items() if block in one.blocks]
            check(len(holders) == 1, f"{name} writes into block {block}, which {' and '.join(holders)} hold")
            self.memory[block * SIZE + position % SIZE] = tokens[position]

    def _copy(self, copies: object, shared: bool, last: int) -> None:
        """Make the copies that `append` asks for, which are those that are needed."""
        right = isinstance(copies, list) and all(isinstance(copy, Copy) for copy in copies)
        check(right, f"append should return a list of Copy(source, target), not {copies!r}")
        assert isinstance(copies, list), "checked above"
        sources = [copy.source for copy in copies]
        check_equal(sources, [last] if shared else [], "the list of blocks to copy")
        for source, target in copies:
            for place in range(SIZE):
                self.memory[target * SIZE + place] = self.memory.get(source * SIZE + place, -1)

    def _fork(self, name: str, new: str) -> None:
        self.lines.append(f"{new} = {name}.fork()")
        child = self.tables[name].fork()
        kind = type(self.tables[name]).__name__
        check(type(child) is type(self.tables[name]), f"fork returned {child!r}, and should return another {kind}")
        check(
            child.blocks is not self.tables[name].blocks, "parent and child have one list of blocks: give each its own"
        )
        self.tables[new], self.tokens[new] = child, list(self.tokens[name])

    def _truncate(self, name: str, keep: int) -> None:
        self.lines.append(f"{name}.truncate({keep})")
        table = self.tables[name]
        gone, held = table.blocks[self.pool.blocks_for(keep) :], self._held()
        expected = [block for block in reversed(gone) if held[block] == 1]
        table.truncate(keep)
        del self.tokens[name][keep:]
        self._check_size(name)
        if expected:
            freed = list(self.pool.free_blocks)[-len(expected) :]
            check_equal(freed, expected, "the end of the queue of free blocks", hint="The tail is given back first.")

    def _free(self, name: str) -> None:
        self.lines.append(f"{name}.free()")
        self.tables.pop(name).free()
        del self.tokens[name]

    def _slots(self, name: str) -> None:
        start, end = len(self.tokens[name]) // 3, len(self.tokens[name])
        self.lines.append(f"{name}.slots({start}, {end})")
        slots = self.tables[name].slots(start, end)
        check(isinstance(slots, list), f"slots should return a list, not {slots!r}")
        check_equal(slots, [self._slot(name, position) for position in range(start, end)], "the list of slots")

    def _slot(self, name: str, position: int) -> int:
        return self.tables[name].blocks[position // SIZE] * SIZE + position % SIZE

    def _held(self) -> Counter[int]:
        return Counter(block for table in self.tables.values() for block in table.blocks)

    def _check_size(self, name: str) -> None:
        table, tokens = self.tables[name], self.tokens[name]
        check_equal(table.num_tokens, len(tokens), f"{name}.num_tokens")
        blocks = self.pool.blocks_for(len(tokens))
        check(len(table.blocks) == blocks, f"{name} has blocks {table.blocks}: {len(tokens)} tokens need {blocks}")

    def _check(self) -> None:
        _check_holders(self.pool, self._held())
        for name, tokens in self.tokens.items():
            self._check_size(name)
            for position, token in enumerate(tokens):
                slot = self._slot(name, position)
                read = self.memory.get(slot, -1)
                message = f"{name}'s token {position} is in slot {slot}, and somebody else's stands there"
                check(read == token, f"{message}: was a block copied before it was written?")


def _table_operations(rng: random.Random, kinds: Sequence[str]) -> list[Operation]:
    """Two tables begin at once; then anything."""
    names = [f"t{number}" for number in range(30)]
    first = [Operation("begin", new=name) for name in names[:2]]
    return first + [
        Operation(rng.choice(kinds), rng.choice(names[max(0, number - 4) : number]), rng.randrange(100), new=name)
        for number, name in enumerate(names[2:], start=2)
    ]


# --- how much is looked at


class _Queue(OrderedDict[int, None]):
    """Counts the entries that somebody goes through."""

    looks = 0

    def __iter__(self) -> Iterator[int]:
        for block in super().__iter__():
            self.looks += 1
            yield block

    def keys(self) -> Any:
        return iter(self)

    def items(self) -> Any:
        return ((block, None) for block in self)


class _Counts(list[int]):
    """Counts the entries that somebody goes through."""

    looks = 0

    def __iter__(self) -> Iterator[int]:
        for count in super().__iter__():
            self.looks += 1
            yield count

    def __getitem__(self, place: Any) -> Any:
        self.looks += 1
        return super().__getitem__(place)

    def __contains__(self, count: object) -> bool:
        self.looks += len(self)
        return super().__contains__(count)

    def index(self, value: int, start: SupportsIndex = 0, stop: SupportsIndex = 2**62) -> int:
        self.looks += len(self)
        return super().index(value, start, stop)


def check_constant_work(pool_class: type[BlockPool], num_blocks: int = 2000) -> None:
    """Raise CheckError if an operation goes through more than a few blocks of a large pool."""
    pool = pool_class(num_blocks, SIZE)
    queue, counts = _Queue(pool._free), _Counts(pool.ref_counts)
    pool._free, pool.ref_counts = queue, counts
    queue.looks = counts.looks = 0
    blocks = [pool.allocate() for _ in range(num_blocks // 2)]
    acts: list[tuple[str, Callable[[int], object]]] = [
        ("allocate", lambda _: pool.allocate()),
        ("free", lambda block: pool.free([block])),
        ("touch", lambda block: pool.touch(block)),
    ]
    for name, act in acts:
        check(pool._free is queue and pool.ref_counts is counts, "_free and ref_counts are changed, never made anew")
        queue.looks = counts.looks = 0
        for block in blocks[100:200]:
            act(block)
        looks = (queue.looks + counts.looks) // 100
        check(looks <= 10, f"{name} looks at about {looks} of {num_blocks} blocks: it should take the same few steps")


# --- hashes


def check_hash(content_hash: ContentHash, seed: int) -> None:
    """Raise CheckError unless it tells apart what differs: tokens, their order, and what stands before."""
    rng = random.Random(seed)
    parent = bytes(rng.randrange(256) for _ in range(16))
    tokens = [rng.randrange(300, 150_000) for _ in range(SIZE)]
    one = content_hash(parent, tokens)
    check(isinstance(one, bytes), f"the hash should be bytes, not {type(one).__name__}")
    check(len(one) >= 16, f"the hash has {len(one)} bytes; with fewer than 16 somebody could find two equal ones")
    check_equal(content_hash(parent, list(tokens)), one, "the hash of the same content, once more,")
    check_equal(content_hash(parent, tuple(tokens)), one, "the hash of the same tokens as a tuple")
    others: Iterable[tuple[str, bytes, list[int]]] = (
        ("after another parent", parent[:-1] + bytes([parent[-1] ^ 1]), tokens),
        ("after nothing", b"", tokens),
        ("in another order", parent, tokens[1:] + tokens[:1]),
        ("with another last token", parent, [*tokens[:-1], tokens[-1] + 1]),
        ("with 2**32 added to a token", parent, [*tokens[:-1], tokens[-1] + 2**32]),
        ("with 2**61 - 1 added to a token (Python's hash)", parent, [*tokens[:-1], tokens[-1] + 2**61 - 1]),
    )
    for what, other_parent, other_tokens in others:
        same = content_hash(other_parent, other_tokens) == one
        check(not same, f"the same tokens {what} have the same hash (seed {seed})")
    glued = content_hash(parent, [1, 23]) == content_hash(parent, [12, 3])
    check(not glued, "[1, 23] and [12, 3] have the same hash: the digits run together")
    moved = content_hash(b"1", [2, 3]) == content_hash(b"12", [3])
    check(not moved, "a token that moves from the block into its parent leaves the hash the same")


# --- in the engine


def compare_in_engine(
    engine: Engine,
    pool: BlockPool,
    table_class: type[BlockTable],
    content_hash: ContentHash,
    requests: Requests,
    told: str = "",
) -> tuple[list[RequestOutput], list[RequestOutput]]:
    """Answer prompts on the package's allocator, and on this one while the package's is closed.

    Args:
        told: put behind what a CheckError says.

    Returns:
        The outputs on this allocator, and on the package's.

    Raises:
        CheckError: other tokens were written, the engine stopped, or blocks are not given back.
    """
    engine.scheduler.pool.forget_all()  # so that both find what these requests leave, and nothing older
    expected = run_engine(engine, requests)
    with (
        scheduled_by(engine, Scheduler(engine.scheduler.config, pool)),
        patch.object(minillm.engine.engine, "BlockTable", table_class),
        patch.object(minillm.engine.request, "block_hash", content_hash),
        without(*ANSWERS),
    ):
        got = run_engine(engine, requests)
    check_same_tokens(got, expected, told)
    kept = pool.num_blocks - pool.num_free
    check(kept == 0, f"all requests have ended, and {kept} blocks are held by nobody and not free{told}")
    return got, expected
