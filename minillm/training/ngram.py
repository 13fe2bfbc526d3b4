"""The baseline that a language model must beat: counting what followed the last few tokens.

Source: interpolation with Witten-Bell smoothing: Witten & Bell 1991, "The Zero-Frequency Problem", method C; as told in
Chen & Goodman 1998, "An Empirical Study of Smoothing Techniques for Language Modeling", §2.5.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from minillm.errors import ConfigError, InvalidRequestError

Context = tuple[int, ...]


class NGram:
    """P(token | the last order − 1 tokens), every order mixed with the shorter ones.

    P(w | c) = (count(c, w) + d(c) · P(w | c without its first token)) / (count(c) + d(c)), where d(c) is how many
    different tokens have followed c; below the shortest context stands 1 / vocab_size.
    """

    def __init__(self, order: int, vocab_size: int) -> None:
        if order < 1 or vocab_size < 1:
            raise ConfigError(f"order and vocab_size must be at least 1, not {order} and {vocab_size}")
        self.order = order
        self.vocab_size = vocab_size
        self.followers: dict[Context, Counter[int]] = defaultdict(Counter)
        self.totals: Counter[Context] = Counter()

    def train(self, documents: Iterable[Sequence[int]]) -> None:
        """Count; may be called again with more."""
        for tokens in documents:
            for at, token in enumerate(tokens):
                for length in range(min(self.order - 1, at) + 1):
                    context = tuple(tokens[at - length : at])
                    self.followers[context][token] += 1
                    self.totals[context] += 1

    def probability(self, context: Sequence[int], token: int) -> float:
        """Of `token` after `context` (of which the last order − 1 tokens are looked at)."""
        longest = min(self.order - 1, len(context))
        p = 1 / self.vocab_size
        for length in range(longest + 1):
            key = tuple(context[len(context) - length :])
            total = self.totals.get(key, 0)
            if not total:
                return p
            followers = self.followers[key]
            p = (followers.get(token, 0) + len(followers) * p) / (total + len(followers))
        return p

    def perplexity(self, documents: Iterable[Sequence[int]]) -> float:
        """exp of the mean −log probability of every token but each document's first.

        Raises:
            InvalidRequestError: no document has two tokens.
        """
        logs = [
            -math.log(self.probability(tokens[max(0, at - self.order + 1) : at], tokens[at]))
            for tokens in documents
            for at in range(1, len(tokens))
        ]
        if not logs:
            raise InvalidRequestError("there is no token to predict: give documents of two tokens or more")
        return math.exp(sum(logs) / len(logs))
