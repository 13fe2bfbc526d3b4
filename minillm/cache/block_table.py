"""A sequence's view of the pool: which block holds which of its tokens.

Token i lies in block ``blocks[i // block_size]``, at place ``i % block_size`` (Kwon et al. 2023, §4.2). Sequences that
begin alike may share blocks; whoever writes into a shared one takes a copy first (§4.3, §4.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from minillm.cache.block_pool import BlockPool


class Copy(NamedTuple):
    """A block whose content must be in another one before anything is written there."""

    source: int
    target: int


class BlockTable:
    """The blocks of one sequence, in its order.

    Attributes:
        num_tokens: how many tokens have slots.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.blocks: list[int] = []
        self.num_tokens = 0

    def adopt(self, blocks: Sequence[int]) -> None:
        """Begin with blocks that hold this sequence's first tokens already, all full."""
        assert not self.blocks, "only an empty table can adopt"
        for block in blocks:
            self.pool.touch(block)
        self.blocks = list(blocks)
        self.num_tokens = len(blocks) * self.pool.block_size

    def blocks_for(self, count: int) -> int:
        """How many blocks `append(count)` would take from the pool, a copy of a shared last block included."""
        if not count:
            return 0
        return self.pool.blocks_for(self.num_tokens + count) - len(self.blocks) + self._last_is_shared()

    def append(self, count: int) -> list[Copy]:
        """Make slots for `count` more tokens.

        Returns:
            The copies that must be made before they are written: of a partly filled last block that others hold too.

        Raises:
            CacheFullError: the pool has too few free blocks; nothing has changed then.
        """
        needed = self.blocks_for(count)
        self.pool.require(needed)
        copies = []
        if count and self._last_is_shared():
            shared = self.blocks[-1]
            self.blocks[-1] = self.pool.allocate()
            self.pool.free([shared])
            copies.append(Copy(shared, self.blocks[-1]))
            needed -= 1
        elif count and self.num_tokens % self.pool.block_size:
            self.pool.forget(self.blocks[-1])  # after `truncate` it may be known by what it will hold no more
        self.blocks += [self.pool.allocate() for _ in range(needed)]
        self.num_tokens += count
        return copies

    def fork(self) -> BlockTable:
        """A second sequence with the same tokens so far, in the same blocks."""
        child = BlockTable(self.pool)
        for block in self.blocks:
            self.pool.touch(block)
        child.blocks, child.num_tokens = list(self.blocks), self.num_tokens
        return child

    def truncate(self, num_tokens: int) -> None:
        """Keep the first tokens, and give the blocks behind them back."""
        assert 0 <= num_tokens <= self.num_tokens, f"{num_tokens} of {self.num_tokens} tokens cannot be kept"
        keep = self.pool.blocks_for(num_tokens)
        self.pool.free(reversed(self.blocks[keep:]))  # the tail first: a beginning is worth more than an end
        del self.blocks[keep:]
        self.num_tokens = num_tokens

    def free(self) -> None:
        """Give everything back."""
        self.truncate(0)

    def slots(self, start: int, end: int) -> list[int]:
        """Where the tokens start … end - 1 lie: block × block_size + place."""
        size = self.pool.block_size
        return [self.blocks[position // size] * size + position % size for position in range(start, end)]

    def _last_is_shared(self) -> bool:
        """Whether the next token falls into a block that somebody else holds too."""
        return self.num_tokens % self.pool.block_size != 0 and self.pool.ref_counts[self.blocks[-1]] > 1
