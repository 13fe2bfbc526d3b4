"""What tests share: tiny random models of transformers' own classes, and what "equal" means."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from torch import Tensor, nn

SHARED = Path(__file__).resolve().parents[2] / "shared"
"""Real weights and tokenizers beside the checkout, where they are; tests that need them skip where they are not."""

NEAR_TIE = 1e-4


def randomise(model: nn.Module, seed: int = 0, std: float = 0.15) -> None:
    """Random weights in which nothing is left at its neutral value: norms are not 1, biases are not 0.

    The scale is raised until choices are not near-ties: the median gap between the two best logits is ≥ 0.1.
    """
    for scale in (std, 2 * std, 4 * std):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim > 1:
                    parameter.copy_(noise * scale)
                elif "norm" in name or ".ln_" in name:
                    is_weight = name.endswith("weight") and "Gemma" not in type(model).__name__
                    parameter.copy_(0.2 * noise + (1.0 if is_weight else 0.0))
                else:
                    parameter.copy_(0.1 * noise)
        tokens = torch.randint(0, model.config.vocab_size, (4, 16), generator=generator)
        with torch.inference_mode():
            best = model(tokens).logits.topk(2).values
        if (best[..., 0] - best[..., 1]).median() >= 0.1:
            return
    raise AssertionError("no scale makes this model decide")


@torch.inference_mode()
def reference_logits(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """transformers' logits of a padded batch, padding cut off again: ``[len(row), vocab]`` a row."""
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logits = model(tokens, attention_mask=mask, use_cache=False).logits
    return [logits[index, : len(row)] for index, row in enumerate(rows)]


@torch.inference_mode()
def reference_greedy(model: nn.Module, prompt: Sequence[int], count: int) -> tuple[list[int], list[float]]:
    """transformers' greedy continuation and, for each step, the gap between its two best logits."""
    out = model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    best = torch.cat(out.logits).float().topk(2).values
    return out.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


@dataclass
class TokenComparison:
    """How many tokens were compared, and at how many near-ties of the reference the two parted."""

    equal: int = 0
    near_ties: int = 0

    def add(self, ours: Sequence[int], reference: Sequence[int], gaps: Sequence[float]) -> None:
        """Token for token; they may part only where the reference's own gap is below 1e-4."""
        assert len(ours) == len(reference)
        for step, (our, theirs) in enumerate(zip(ours, reference, strict=True)):
            if our != theirs:
                assert gaps[step] < NEAR_TIE, f"step {step}: {our} != {theirs}, the reference's gap is {gaps[step]:.2g}"
                self.near_ties += 1
                return
            self.equal += 1

    def __str__(self) -> str:
        return f"{self.equal} tokens equal, {self.near_ties} near-ties"


def answers(url: str) -> bool:
    """Whether a server answers there, and well."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, trust_env=False).is_success
    return False
