"""From logits to a token: temperature, top-k, top-p and min-p as pure functions, and the draw.

Sources: top-k: Fan et al. 2018, "Hierarchical Neural Story Generation", §5.4; top-p: Holtzman et al. 2019, "The Curious
Case of Neural Text Degeneration", §3.1; min-p: Nguyen et al. 2024, "Turning Up the Heat", §3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minillm.errors import InvalidRequestError

MASKED = float("-inf")


def apply_temperature(logits: Float[Tensor, "*batch vocab"], temperature: float) -> Float[Tensor, "*batch vocab"]:
    """Divide by the temperature (above 0): below 1 sharpens the distribution, above 1 flattens it."""
    return logits / temperature


def keep_top_k(logits: Float[Tensor, "*batch vocab"], k: int) -> Float[Tensor, "*batch vocab"]:
    """Keep the k largest logits (and what ties with the last of them); the others become −inf."""
    smallest_kept = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, MASKED)


def keep_top_p(logits: Float[Tensor, "*batch vocab"], p: float) -> Float[Tensor, "*batch vocab"]:
    """Keep the fewest tokens whose probabilities sum to p or more; at least the likeliest."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    sum_before = probabilities.cumsum(dim=-1) - probabilities
    dropped = sum_before >= p
    dropped[..., 0] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), MASKED)


def keep_min_p(logits: Float[Tensor, "*batch vocab"], p: float) -> Float[Tensor, "*batch vocab"]:
    """Keep tokens at least p times as likely as the likeliest."""
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(p), MASKED)


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. The defaults sample from the model's own distribution.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
        min_p: 0 keeps all.
        seed: of the draws; None draws differently each time.

    Raises:
        InvalidRequestError: when a value is outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InvalidRequestError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if self.top_k < 0:
            raise InvalidRequestError(f"top_k must be 0 (all) or a positive number, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InvalidRequestError(f"top_p must be in (0, 1], not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise InvalidRequestError(f"min_p must be in [0, 1], not {self.min_p}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise InvalidRequestError(f"seed must be a number of 64 bits, not {self.seed}")

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A source of draws that starts at the seed."""
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

    def transform(self, logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """The logits to draw from, in vLLM's order: temperature, min-p, top-k, top-p."""
        logits = logits.float() - logits.amax(dim=-1, keepdim=True)  # so that no temperature is too small
        logits = apply_temperature(logits, self.temperature)
        if self.min_p > 0:
            logits = keep_min_p(logits, self.min_p)
        if self.top_k > 0:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        return logits

    def choose(self, logits: Float[Tensor, "batch vocab"], generator: torch.Generator) -> Int[Tensor, "batch"]:
        """The next token of each row: the likeliest at temperature 0, else a draw."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        probabilities = self.transform(logits).softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


GREEDY = Sampling(temperature=0)
