"""From logits to a token: temperature, top-k, top-p, min-p and penalties as pure functions, and the draw.

A parameter is one number for all rows, or a column with one for each.

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


def apply_temperature(
    logits: Float[Tensor, "*batch vocab"], temperature: float | Float[Tensor, "*batch 1"]
) -> Float[Tensor, "*batch vocab"]:
    """Divide by the temperature (above 0): below 1 sharpens the distribution, above 1 flattens it."""
    return logits / temperature


def keep_top_k(
    logits: Float[Tensor, "*batch vocab"], k: int | Int[Tensor, "*batch 1"]
) -> Float[Tensor, "*batch vocab"]:
    """Keep the k largest logits (and what ties with the last of them); the others become −inf."""
    ks = torch.as_tensor(k, device=logits.device).clamp(max=logits.shape[-1])
    largest = logits.topk(int(ks.max()), dim=-1).values
    smallest_kept = largest.gather(-1, (ks - 1).expand(*logits.shape[:-1], 1))
    return logits.masked_fill(logits < smallest_kept, MASKED)


def keep_top_p(
    logits: Float[Tensor, "*batch vocab"], p: float | Float[Tensor, "*batch 1"]
) -> Float[Tensor, "*batch vocab"]:
    """Keep the fewest tokens whose probabilities sum to p or more; at least the likeliest.

    These are mostly a few of the vocabulary's tens of thousands: instead of sorting all, rows are tried with some of
    their largest logits, and with more where those do not sum to p.
    """
    vocab_size = logits.shape[-1]
    rows = logits.reshape(-1, vocab_size)
    ps = torch.as_tensor(p, device=logits.device).expand(*logits.shape[:-1], 1).reshape(-1, 1)
    probabilities = rows.softmax(dim=-1)
    kept, todo = torch.full_like(rows, MASKED), torch.arange(len(rows), device=rows.device)
    for count in (128, 4096, vocab_size):
        likeliest, tokens = probabilities[todo].topk(min(count, vocab_size), dim=-1)
        sums = likeliest.cumsum(dim=-1)
        stays = sums - likeliest < ps[todo]
        stays[:, 0] = True
        row = todo[:, None]
        kept[row, tokens] = rows[row, tokens].where(stays, MASKED)
        todo = todo[sums[:, -1] < ps[todo, 0]]
    return kept.view_as(logits)


def keep_min_p(
    logits: Float[Tensor, "*batch vocab"], p: float | Float[Tensor, "*batch 1"]
) -> Float[Tensor, "*batch vocab"]:
    """Keep tokens at least p times as likely as the likeliest."""
    least = logits.amax(dim=-1, keepdim=True) + torch.as_tensor(p, device=logits.device).log()
    return logits.masked_fill(logits < least, MASKED)


def apply_penalties(
    logits: Float[Tensor, "batch vocab"],
    written: Int[Tensor, "batch vocab"],
    prompt: Int[Tensor, "batch vocab"],
    repetition: Float[Tensor, "batch 1"],
    presence: Float[Tensor, "batch 1"],
    frequency: Float[Tensor, "batch 1"],
) -> Float[Tensor, "batch vocab"]:
    """Make what was written already less likely.

    Repetition (Keskar et al. 2019, "CTRL", §4.1) divides the positive logits of tokens seen in prompt or answer and
    multiplies the negative ones. Presence and frequency (OpenAI's) are taken from the logits of tokens in the answer,
    once or as often as each was written.

    Args:
        written: how often each token stands in the answer.
        prompt: how often in the prompt.
    """
    seen = (written > 0) | (prompt > 0)
    logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - frequency * written - presence * (written > 0)


def draw(probabilities: Float[Tensor, "batch vocab"], random: Float[Tensor, "batch"]) -> Int[Tensor, "batch"]:
    """The token in whose share of [0, 1) the row's random number falls, shares being laid end to end."""
    ends = probabilities.double().cumsum(dim=-1)
    chosen = torch.searchsorted(ends, random.double()[:, None] * ends[:, -1:], right=True)[:, 0]
    # Rounding may push the last number to the very end: then the last token that has a share.
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(chosen, last)


def transform(
    logits: Float[Tensor, "*batch vocab"],
    temperature: float | Float[Tensor, "*batch 1"],
    *,
    min_p: float | Float[Tensor, "*batch 1"] | None = None,
    top_k: int | Int[Tensor, "*batch 1"] | None = None,
    top_p: float | Float[Tensor, "*batch 1"] | None = None,
) -> Float[Tensor, "*batch vocab"]:
    """The logits to draw from, in vLLM's order: temperature, min-p, top-k, top-p; what is None keeps all."""
    logits = logits.float() - logits.amax(dim=-1, keepdim=True)  # so that no temperature is too small
    logits = apply_temperature(logits, temperature)
    if min_p is not None:
        logits = keep_min_p(logits, min_p)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return logits


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
        """The logits to draw from."""
        top_p = self.top_p if self.top_p < 1 else None
        return transform(logits, self.temperature, min_p=self.min_p or None, top_k=self.top_k or None, top_p=top_p)

    def choose(self, logits: Float[Tensor, "batch vocab"], generator: torch.Generator) -> Int[Tensor, "batch"]:
        """The next token of each row: the likeliest at temperature 0, else a draw."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        probabilities = self.transform(logits).softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


GREEDY = Sampling(temperature=0)
