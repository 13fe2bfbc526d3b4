"""Attention of some queries over some of their keys, and how such partial results become one: assignment 5's subject.

Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", §3; Dao et al. 2022, "FlashAttention", §3.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Partial(NamedTuple):
    """Attention of some queries over the keys that they have seen so far.

    Attributes:
        largest: of the scores so far; −∞ before the first.
        total: the sum of exp(score − largest).
        weighted: the sum of exp(score − largest) · value; divided by `total` at the very end.
    """

    largest: Float[Tensor, "rows"]
    total: Float[Tensor, "rows"]
    weighted: Float[Tensor, "rows head_dim"]


def nothing(rows: int, head_dim: int) -> Partial:
    """Before the first key."""
    return Partial(torch.full((rows,), -torch.inf), torch.zeros(rows), torch.zeros(rows, head_dim))


def add_block(
    done: Partial,
    queries: Float[Tensor, "rows head_dim"],
    keys: Float[Tensor, "tokens head_dim"],
    values: Float[Tensor, "tokens head_dim"],
) -> Partial:
    """`done`, and one more block; the queries are scaled already."""
    scores = queries @ keys.T
    largest = scores.amax(dim=1)
    weights = (scores - largest[:, None]).exp()
    return merge(done, Partial(largest, weights.sum(dim=1), weights @ values))


def merge(a: Partial, b: Partial) -> Partial:
    """The state over the keys of both; either may have seen none."""
    largest = torch.maximum(a.largest, b.largest)
    finite = largest.masked_fill(largest == -torch.inf, 0)  # −∞ − −∞ is no number
    ours, theirs = (a.largest - finite).exp(), (b.largest - finite).exp()
    weighted = a.weighted * ours[:, None] + b.weighted * theirs[:, None]
    return Partial(largest, a.total * ours + b.total * theirs, weighted)
