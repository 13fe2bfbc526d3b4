"""The judges of assignment 4: right pieces pass; a planted mistake is told by the shortest sequence that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import pytest

from minillm.cache.block_pool import BlockPool, block_hash
from minillm.cache.block_table import BlockTable, Copy
from minillm.course.allocator import (
    Rest,
    check_constant_work,
    check_hash,
    compare_in_engine,
    judge_pool,
    judge_tables,
)
from minillm.course.checks import CheckError
from minillm.course.operations import Operation, shrink
from minillm.llm import LLM, SamplingParams

POOL_KINDS = ("allocate", "allocate", "free", "free", "touch", "meet", "remember", "remember")
TABLE_KINDS = ("begin", "append", "append", "fork", "truncate", "free", "slots")


class Quiet(BlockPool):
    """The package's pool, whose double free is a ValueError, as the assignment asks for."""

    def free(self, blocks):
        for block in blocks:
            if not self.ref_counts[block]:
                raise ValueError(block)
            super().free([block])


class Whole(BlockTable):
    """The package's table, whose forks are of its own class."""

    fork = Rest.fork


@pytest.mark.parametrize("seed", range(2))
def test_the_package_passes(seed):
    judge_pool(Quiet, seed=seed, kinds=(*POOL_KINDS, "free twice"), ordered=True)
    judge_tables(Whole, seed=seed, kinds=TABLE_KINDS, rounds=30)
    check_hash(block_hash, seed)


def test_the_package_takes_constant_time():
    check_constant_work(BlockPool)


class Forgetful(BlockPool):
    def allocate(self):
        block = super().allocate()
        if block == 3:
            self.ref_counts[block] = 0
        return block


def test_the_sequence_that_is_told_is_as_short_as_can_be():
    with pytest.raises(CheckError) as caught:
        judge_pool(Forgetful, seed=0)
    message = str(caught.value)
    assert message.count("pool.allocate()") == 4  # block 3 is the fourth
    assert "pool.free" not in message
    assert "ref_counts[3] is 0, and the block is held 1 times (seed 0)" in message


class Lifo(BlockPool):
    def free(self, blocks):
        for block in blocks:
            super().free([block])
            if not self.ref_counts[block]:
                self._free.move_to_end(block, last=False)


class Twice(BlockPool):
    def touch(self, block):
        self.ref_counts[block] += 1  # and stays free


class Stale(BlockPool):
    def forget(self, block):
        pass


@pytest.mark.parametrize(
    ("pool_class", "message"),
    [
        (Lifo, "the order of the free blocks"),
        (Twice, "it stands among the free blocks"),
        (Stale, "and should be None"),
    ],
)
def test_a_wrong_pool_is_found(pool_class, message):
    with pytest.raises(CheckError) as caught:
        judge_pool(pool_class, seed=1, kinds=POOL_KINDS, ordered=True)
    assert message in str(caught.value)


def test_order_is_judged_only_where_it_is_asked_for():
    judge_pool(Lifo, seed=1)


class NoCopy(Whole):
    def append(self, count):
        self.pool.require(self.blocks_for(count))
        new = self.pool.blocks_for(self.num_tokens + count) - len(self.blocks)
        self.blocks += [self.pool.allocate() for _ in range(new)]
        self.num_tokens += count
        return []


class UntoldCopy(Whole):
    def append(self, count):
        super().append(count)
        return []


class HalfDone(Whole):
    def append(self, count):
        copies: list[Copy] = []
        for _ in range(count):
            copies += super().append(1)
        return copies


class FrontFirst(Whole):
    def truncate(self, num_tokens):
        keep = self.pool.blocks_for(num_tokens)
        self.pool.free(self.blocks[keep:])
        del self.blocks[keep:]
        self.num_tokens = num_tokens


class OneList(Whole):
    def fork(self):
        child = Rest.fork(self)
        child.blocks = self.blocks
        return child


@pytest.mark.parametrize(
    ("table_class", "message"),
    [
        (NoCopy, "the list of blocks to copy has 0 items, and should have 1"),
        (UntoldCopy, "the list of blocks to copy has 0 items, and should have 1"),
        (HalfDone, "after the error"),
        (FrontFirst, "The tail is given back first."),
        (OneList, "have one list of blocks"),
    ],
)
def test_a_wrong_table_is_found(table_class, message):
    with pytest.raises(CheckError) as caught:
        judge_tables(table_class, seed=1, kinds=TABLE_KINDS)
    assert message in str(caught.value)


def joined(parent: bytes, tokens: Sequence[int]) -> bytes:
    return blake2b(parent + "".join(map(str, tokens)).encode(), digest_size=16).digest()


def no_parent(parent: bytes, tokens: Sequence[int]) -> bytes:
    return block_hash(b"", tokens)


def four_bytes(parent: bytes, tokens: Sequence[int]) -> bytes:
    return block_hash(parent, [token % 2**32 for token in tokens])


def unordered(parent: bytes, tokens: Sequence[int]) -> bytes:
    return block_hash(parent, sorted(tokens))


@pytest.mark.parametrize(
    ("content_hash", "message"),
    [
        (joined, "the digits run together"),
        (no_parent, "after another parent"),
        (four_bytes, "with 2**32 added to a token"),
        (unordered, "in another order"),
        (lambda parent, tokens: hash((parent, *tokens)), "should be bytes, not int"),
        (lambda parent, tokens: block_hash(parent, tokens)[:8], "has 8 bytes"),
    ],
)
def test_a_wrong_hash_is_found(content_hash, message):
    with pytest.raises(CheckError) as caught:
        check_hash(content_hash, seed=0)
    assert message in str(caught.value)


class Fails:
    """Goes wrong at the second "b" after an "a"."""

    def __init__(self):
        self.lines: list[str] = []
        self.seen = ""

    def do(self, operation):
        self.seen += operation.kind
        after = self.seen.partition("a")[2]
        if after.count("b") == 2:
            raise CheckError("wrong")


def test_shrinking_leaves_nothing_that_can_be_left_out():
    operations = [Operation(kind) for kind in "cbcabccbacbc"]
    assert "".join(operation.kind for operation in shrink(Fails, operations)) == "abb"


@pytest.fixture(scope="module")
def engine():
    sizes = {"block_size": 8, "num_gpu_blocks_override": 40, "max_model_len": 100, "max_num_seqs": 8}
    with LLM("tiny", dtype="float32", device="cpu", attention_backend="reference", enforce_eager=True, **sizes) as llm:
        yield llm.engine


class Renamed:
    """The package's answers under other names: copies of their code, which `without` does not close."""

    class Pool(BlockPool):
        pass

    class Table(BlockTable):
        pass


def test_the_packages_own_classes_are_closed_in_the_engine(engine):
    requests = [([5, 6, 7], SamplingParams(temperature=0, max_tokens=3))]
    with pytest.raises(CheckError, match="do not use minillm"):
        compare_in_engine(engine, Renamed.Pool(40, 8), Renamed.Table, block_hash, requests)
    assert not engine.has_unfinished_requests
    engine.add_request("again", [5, 6, 7], SamplingParams(temperature=0, max_tokens=1))
    assert engine.step()[0].finished  # the engine has its own allocator again
