"""The pool of blocks: who holds which, which are free, and which full ones may be met again.

A block is a number that stands for `block_size` token slots in every layer's key/value tensors. The pool keeps no
tensors: it is the page allocator of Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving
with PagedAttention", §4.2. Every operation takes the same time however many blocks there are.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from minillm.errors import CacheFullError, ConfigError

ROOT = b""
"""The hash of what stands before the first block: nothing."""


def block_hash(parent: bytes, tokens: Sequence[int], extra: bytes = b"") -> bytes:
    """What a full block holds, and everything before it: keys depend on all earlier tokens, so the hash is chained.

    Args:
        parent: hash of the block before, or `ROOT`.
        extra: whatever else changes the keys of these tokens.
    """
    digest = blake2b(parent, digest_size=16, key=extra)
    digest.update(array("q", tokens).tobytes())
    return digest.digest()


class BlockPool:
    """Blocks 0 … num_blocks - 1, each free, or held by one or more tables.

    A free block keeps its content until it is given out again: where its hash is known, a later request with the same
    beginning takes it back (`find`). Free blocks are given out in the order in which they became free, so that what was
    used least recently goes first.

    Args:
        num_blocks: size of the pool.
        block_size: tokens of a block.
        enable_prefix_caching: whether full blocks can be found again.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(f"a pool needs at least one block of one token, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.ref_counts = [0] * num_blocks
        self.hashes: list[bytes | None] = [None] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._by_hash: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds; what they keep is given up when they are needed."""
        return len(self._free)

    @property
    def free_blocks(self) -> tuple[int, ...]:
        """The free blocks, the next to be given out first."""
        return tuple(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def require(self, count: int) -> None:
        """Raise CacheFullError unless so many blocks are free."""
        if count > self.num_free:
            raise CacheFullError(f"{count} blocks are needed, {self.num_free} of {self.num_blocks} are free")

    def allocate(self) -> int:
        """Hold the block that has been free for longest; what it kept is forgotten.

        Raises:
            CacheFullError: every block is held.
        """
        self.require(1)
        block, _ = self._free.popitem(last=False)
        self.forget(block)
        self.ref_counts[block] = 1
        return block

    def touch(self, block: int) -> None:
        """Hold a block once more, be it free or held already."""
        if self.ref_counts[block] == 0:
            del self._free[block]
        self.ref_counts[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Hold these blocks once less each; those that nobody holds any more are free, in the order given."""
        for block in blocks:
            assert self.ref_counts[block] > 0, f"block {block} is freed and nobody holds it"
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self._free[block] = None

    def remember(self, block: int, content: bytes) -> None:
        """Let a full block be found by the hash of its content; the first of equal blocks stays the one that is."""
        if self.enable_prefix_caching and content not in self._by_hash:
            self.forget(block)
            self.hashes[block] = content
            self._by_hash[content] = block

    def find(self, content: bytes) -> int | None:
        """The block, free or held, that has this content."""
        return self._by_hash.get(content)

    def forget_all(self) -> None:
        """Let no block be found any more."""
        for block in list(self._by_hash.values()):
            self.forget(block)

    def forget(self, block: int) -> None:
        """Let this block be found no more."""
        content = self.hashes[block]
        if content is not None:
            del self._by_hash[content]
            self.hashes[block] = None
