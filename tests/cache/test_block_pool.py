"""The pool and its tables under thousands of random operations: nothing is lost, nothing is shared by mistake."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minillm.cache.block_pool import ROOT, BlockPool, block_hash
from minillm.cache.block_table import BlockTable
from minillm.errors import CacheFullError, ConfigError

SIZE = 4


class Sequence:
    """A table, and the tokens that it should hold."""

    def __init__(self, table: BlockTable, tokens: list[int]) -> None:
        self.table, self.tokens = table, tokens


class PoolMachine(RuleBasedStateMachine):
    """Sequences that begin, grow, fork, shrink and end; `memory` is what the blocks would hold."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, SIZE)
        self.memory: dict[int, list[int | None]] = {block: [None] * SIZE for block in range(12)}
        self.sequences: list[Sequence] = []

    def write(self, sequence: Sequence, tokens: list[int]) -> None:
        start = sequence.table.num_tokens
        copies = sequence.table.append(len(tokens))
        held = {copy.target: list(self.memory[copy.source]) for copy in copies}
        self.memory |= held
        for slot, token in zip(sequence.table.slots(start, start + len(tokens)), tokens, strict=True):
            assert self.pool.ref_counts[slot // SIZE] == 1, "what others hold is written"
            self.memory[slot // SIZE][slot % SIZE] = token
        sequence.tokens += tokens
        parent = ROOT
        for number in range(len(sequence.tokens) // SIZE):
            content = sequence.tokens[number * SIZE : (number + 1) * SIZE]
            parent = block_hash(parent, content)
            self.pool.remember(sequence.table.blocks[number], parent)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def begin(self, tokens: list[int]) -> None:
        sequence = Sequence(BlockTable(self.pool), [])
        parent, found = ROOT, []
        for start in range(0, len(tokens) - SIZE + 1, SIZE):
            parent = block_hash(parent, tokens[start : start + SIZE])
            block = self.pool.find(parent)
            if block is None:
                break
            found.append(block)
        sequence.table.adopt(found)
        sequence.tokens = tokens[: len(found) * SIZE]
        rest = tokens[len(found) * SIZE :]
        if sequence.table.blocks_for(len(rest)) > self.pool.num_free:
            before = list(sequence.table.blocks)
            with pytest.raises(CacheFullError):
                sequence.table.append(len(rest))
            assert sequence.table.blocks == before
            sequence.table.free()
            return
        self.write(sequence, rest)
        self.sequences.append(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def grow(self, data: st.DataObject, tokens: list[int]) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        if sequence.table.blocks_for(len(tokens)) <= self.pool.num_free:
            self.write(sequence, tokens)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(self.sequences))
        self.sequences.append(Sequence(parent.table.fork(), list(parent.tokens)))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def shrink(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        keep = data.draw(st.integers(0, len(sequence.tokens)))
        sequence.table.truncate(keep)
        del sequence.tokens[keep:]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        self.sequences.remove(sequence)
        sequence.table.free()

    @invariant()
    def every_hold_is_counted(self) -> None:
        held = Counter(block for sequence in self.sequences for block in sequence.table.blocks)
        assert [held[block] for block in range(self.pool.num_blocks)] == self.pool.ref_counts
        assert sorted(self.pool.free_blocks) == [block for block in range(12) if not held[block]]

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for sequence in self.sequences:
            read = [self.memory[slot // SIZE][slot % SIZE] for slot in sequence.table.slots(0, len(sequence.tokens))]
            assert read == sequence.tokens

    @invariant()
    def what_is_found_is_what_was_asked_for(self) -> None:
        for sequence in self.sequences:
            parent = ROOT
            for start in range(0, len(sequence.tokens) - SIZE + 1, SIZE):
                parent = block_hash(parent, sequence.tokens[start : start + SIZE])
                block = self.pool.find(parent)
                assert block is None or self.memory[block] == sequence.tokens[start : start + SIZE]

    def teardown(self) -> None:
        for sequence in self.sequences:
            sequence.table.free()
        assert self.pool.num_free == self.pool.num_blocks


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_least_recently_used_goes_first_and_the_tail_before_the_beginning():
    pool = BlockPool(4, SIZE)
    old, new = BlockTable(pool), BlockTable(pool)
    old.append(2 * SIZE)
    new.append(2 * SIZE)
    first, tail = old.blocks
    old.free()
    assert pool.free_blocks == (tail, first)
    newer = list(new.blocks)
    new.free()
    assert [pool.allocate() for _ in range(4)] == [tail, first, *reversed(newer)]


def test_a_block_given_out_again_is_found_no_more():
    pool = BlockPool(1, SIZE)
    block = pool.allocate()
    pool.remember(block, b"content")
    pool.free([block])
    assert pool.find(b"content") == block
    pool.allocate()
    assert pool.find(b"content") is None


def test_hashes_depend_on_everything_before_and_beside():
    tokens = [1, 2, 3, 4]
    assert block_hash(ROOT, tokens) == block_hash(ROOT, tokens)
    others = [block_hash(b"x", tokens), block_hash(ROOT, [1, 2, 3]), block_hash(ROOT, tokens, b"adapter")]
    assert len({block_hash(ROOT, tokens), *others}) == 4


def test_without_prefix_caching_nothing_is_found():
    pool = BlockPool(2, SIZE, enable_prefix_caching=False)
    pool.remember(pool.allocate(), b"content")
    assert pool.find(b"content") is None


@pytest.mark.parametrize(("blocks", "size"), [(0, 4), (4, 0)])
def test_an_empty_pool_is_refused(blocks, size):
    with pytest.raises(ConfigError):
        BlockPool(blocks, size)
