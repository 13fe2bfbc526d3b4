"""Which examples are held out of training: decided by a hash, so on every machine and in every run the same."""

from __future__ import annotations

from hashlib import blake2b


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that looks random and is always the same for the same text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48
