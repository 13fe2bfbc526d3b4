"""How memory was reserved before paging: one stretch a sequence, for as long as it may become.

The three policies are those that Kwon et al. 2023 compare with (§6.1: "Orca (Oracle)", "Orca (Pow2)", "Orca (Max)"), on
a first-fit allocator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minillm.errors import CacheFullError, ConfigError

Policy = Literal["max", "pow2", "exact"]
POLICIES: tuple[Policy, ...] = ("max", "pow2", "exact")


@dataclass
class Stretch:
    """What one sequence has reserved.

    Attributes:
        start: first slot.
        size: slots reserved.
        length: slots that hold a token.
        final: tokens that it will hold at its end.
    """

    start: int
    size: int
    length: int
    final: int


@dataclass(frozen=True)
class Use:
    """What every slot of the memory is for, in slots.

    Attributes:
        tokens: hold a token.
        reserved: will hold one of the same sequence later; nobody else can use them meanwhile.
        internal: reserved and never used ("internal fragmentation").
        external: free and enough for the request that waits, but not in one stretch ("external fragmentation").
        free: the rest.
    """

    tokens: int
    reserved: int
    internal: int
    external: int
    free: int


class ContiguousAllocator:
    """Slots 0 … num_slots - 1, given out in stretches.

    Args:
        policy: "max" reserves the model's whole context, "pow2" the next power of two of the final length, "exact" the
            final length (an oracle: nobody knows it).
        max_model_len: tokens of a sequence at most.
    """

    def __init__(self, num_slots: int, policy: Policy, max_model_len: int) -> None:
        if policy not in POLICIES:
            raise ConfigError(f"policy {policy!r} is not one of {', '.join(POLICIES)}")
        if not 1 <= max_model_len <= num_slots:
            raise ConfigError(f"max_model_len must be between 1 and the {num_slots} slots, not {max_model_len}")
        self.num_slots = num_slots
        self.policy = policy
        self.max_model_len = max_model_len
        self.stretches: dict[str, Stretch] = {}
        self._waiting_size = 0

    def size_for(self, final: int) -> int:
        """Slots that a sequence of this final length is given."""
        if self.policy == "max":
            return self.max_model_len
        if self.policy == "exact":
            return final
        return min(1 << (final - 1).bit_length(), self.max_model_len)

    def allocate(self, name: str, length: int, final: int) -> Stretch:
        """Reserve for a sequence that holds `length` tokens now and will hold `final`.

        Raises:
            CacheFullError: no free stretch is long enough.
        """
        size = self.size_for(final)
        for start, end in self.gaps():
            if end - start >= size:
                self.stretches[name] = Stretch(start, size, length, final)
                self._waiting_size = 0
                return self.stretches[name]
        self._waiting_size = size
        raise CacheFullError(f"no {size} free slots stand together")

    def append(self, name: str, count: int = 1) -> None:
        """The sequence has so many tokens more."""
        self.stretches[name].length += count

    def free(self, name: str) -> None:
        """The sequence has ended."""
        del self.stretches[name]

    def gaps(self) -> list[tuple[int, int]]:
        """Free stretches, from first to last: (start, end)."""
        edges = [0]
        for stretch in sorted(self.stretches.values(), key=lambda stretch: stretch.start):
            edges += [stretch.start, stretch.start + stretch.size]
        edges.append(self.num_slots)
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return [(start, end) for start, end in pairs if end > start]

    def use(self) -> Use:
        """What the memory holds now."""
        held = self.stretches.values()
        tokens = sum(stretch.length for stretch in held)
        reserved = sum(max(stretch.final - stretch.length, 0) for stretch in held)
        internal = sum(stretch.size - max(stretch.final, stretch.length) for stretch in held)
        free = self.num_slots - tokens - reserved - internal
        external = free if 0 < self._waiting_size <= free else 0  # together it would be enough
        return Use(tokens, reserved, internal, external, free - external)
