"""From token lists to batches: a batch is tensors, and knows its own loss.

Which batch comes at which step is a function of the step alone, so a training run can stop anywhere and go on as if it
had not.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minillm.errors import InvalidRequestError
from minillm.transformer.decoder import Decoder
from minillm.transformer.kv import pad_right
from minillm.transformer.seq2seq import Seq2Seq

IGNORED = -100
"""A target that is no target: padding. (The number that `torch.nn.functional.cross_entropy` leaves out by default.)"""


@dataclass(frozen=True)
class TextBatch:
    """Rows of text: after each token of `tokens`, the token of `targets` comes next."""

    tokens: Int[Tensor, "batch seq"]
    targets: Int[Tensor, "batch seq"]

    @classmethod
    def of(cls, examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> TextBatch:
        """Of (tokens, the same or `IGNORED` where nothing is to be learned) pairs."""
        tokens = pad_right([tokens for tokens, _ in examples])
        targets = pad_right([targets for _, targets in examples], IGNORED)
        return cls(tokens[:, :-1], targets[:, 1:])

    @property
    def num_tokens(self) -> int:
        """Tokens that are predicted."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device) -> TextBatch:
        return TextBatch(self.tokens.to(device), self.targets.to(device))

    def loss(self, model: Decoder, label_smoothing: float = 0.0) -> Float[Tensor, ""]:
        """Mean cross-entropy of the next token, in nats."""
        return cross_entropy(model(self.tokens), self.targets, label_smoothing)


@dataclass(frozen=True)
class PairBatch:
    """Sources and targets of a translation, padded on the right.

    Attributes:
        inputs: the targets, one step late: start token first (Vaswani et al. 2017, §3.1: "shifted right").
        targets: the targets, stop token last; padding is `IGNORED`.
    """

    source: Int[Tensor, "batch source"]
    source_lengths: tuple[int, ...]
    inputs: Int[Tensor, "batch target"]
    targets: Int[Tensor, "batch target"]

    @classmethod
    def of(cls, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], start_id: int, stop_id: int) -> PairBatch:
        """Of token lists, without start and stop tokens."""
        sources = [list(source) for source, _ in pairs]
        return cls(
            pad_right(sources),
            tuple(map(len, sources)),
            pad_right([[start_id, *target] for _, target in pairs]),
            pad_right([[*target, stop_id] for _, target in pairs], IGNORED),
        )

    @property
    def num_tokens(self) -> int:
        """Target tokens that are predicted."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device) -> PairBatch:
        return PairBatch(self.source.to(device), self.source_lengths, self.inputs.to(device), self.targets.to(device))

    def loss(self, model: Seq2Seq, label_smoothing: float = 0.0) -> Float[Tensor, ""]:
        """Mean cross-entropy of the target tokens, in nats."""
        return cross_entropy(model(self.source, self.inputs, self.source_lengths), self.targets, label_smoothing)


def cross_entropy(
    logits: Float[Tensor, "batch seq vocab"], targets: Int[Tensor, "batch seq"], label_smoothing: float
) -> Float[Tensor, ""]:
    """Mean −log probability of the targets, in float32; smoothing spreads a share of each target over all tokens.

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture", §7; Vaswani et al. 2017, §5.4.
    """
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, label_smoothing=label_smoothing
    )


class LengthBatches:
    """Which examples go into which step: ones of like length together, so that little is padding (Vaswani §5.1).

    Each epoch shuffles the examples, sorts them by length (ties stay shuffled), cuts that into batches of at most
    `max_tokens`, padding counted, and shuffles the batches.

    Raises:
        InvalidRequestError: no examples, or one that is longer than `max_tokens` by itself.
    """

    def __init__(self, lengths: Sequence[int], max_tokens: int, seed: int) -> None:
        if not lengths or max(lengths) > max_tokens:
            raise InvalidRequestError(
                f"the longest example has {max(lengths, default=0)} tokens, a batch at most {max_tokens}: raise "
                "max_tokens, or leave long examples out"
            )
        self.lengths = lengths
        self.max_tokens = max_tokens
        self.seed = seed
        self._cuts = cut_by_length(sorted(lengths), max_tokens)
        self._epoch = -1
        self._batches: list[list[int]] = []

    def __len__(self) -> int:
        """Steps in an epoch."""
        return len(self._cuts)

    def __call__(self, step: int) -> list[int]:
        """The indices of the examples of one step."""
        epoch, place = divmod(step, len(self))
        if epoch != self._epoch:
            rng = random.Random(f"{self.seed}/{epoch}")
            order = rng.sample(range(len(self.lengths)), len(self.lengths))
            order.sort(key=self.lengths.__getitem__)
            self._batches = [order[cut] for cut in rng.sample(self._cuts, len(self._cuts))]
            self._epoch = epoch
        return self._batches[place]


def cut_by_length(ascending: Sequence[int], max_tokens: int) -> list[slice]:
    """Stretches of ascending lengths whose count times the longest is at most `max_tokens`."""
    cuts, start = [], 0
    for end, length in enumerate(ascending):
        if length * (end + 1 - start) > max_tokens:
            cuts.append(slice(start, end))
            start = end
    return [*cuts, slice(start, len(ascending))]
