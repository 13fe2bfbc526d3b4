"""Figures of tokens and their probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minillm.viz.style import BLUE


def plot_next_token(
    logits: Float[Tensor, "vocab"], tokenizer: PreTrainedTokenizerBase, *, count: int = 10, title: str = ""
) -> Figure:
    """Bars of the `count` likeliest next tokens."""
    best = logits.float().softmax(dim=-1).topk(count)
    names: Sequence[str] = [repr(tokenizer.decode([token])) for token in best.indices.tolist()]
    figure, axes = plt.subplots(figsize=(7, 0.3 * count + 0.8))
    bars = axes.barh(names, best.values.tolist(), color=BLUE)
    axes.bar_label(bars, fmt="{:.1%}", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="probability of being the next token", title=title, xlim=(0, float(best.values[0]) * 1.15))
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure
