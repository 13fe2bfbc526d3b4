"""A model on real cards: what weights, keys and values take there, how many tokens fit; drawn, and to explore."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from minillm.errors import InvalidRequestError
from minillm.transformer.decoder import Decoder
from minillm.transformer.linear import GROUP
from minillm.viz.explorer import Explorer, choice, number_slider, slider
from minillm.viz.memory import EXPLORED_TOKENS, published_model
from minillm.viz.style import BLUE, GREEN, GREY, LIGHT, ORANGE, RED

CARDS: Mapping[str, float] = {"24 GB": 24e9, "40 GB": 40e9, "80 GB": 80e9}
"""Sizes of cards that are common, in bytes."""
WEIGHTS = ("bfloat16", "int8", "int4")
STEP_BYTES = 1e9
"""What a largest step and the driver take, about; the engine measures it when it starts."""
HALF = torch.bfloat16
EXPLORED_CARDS = (1, 2, 4, 8)


def weight_bytes(model: Decoder, weights: str = "bfloat16") -> int:
    """Bytes of a model's parameters. int8 and int4 are of linear layers, and bring scales; the rest stays bfloat16.

    Args:
        model: on any device; the meta device will do.
        weights: one of `WEIGHTS`, as `minillm.transformer.linear` stores them.

    Raises:
        InvalidRequestError: for another name.
    """
    if weights not in WEIGHTS:
        raise InvalidRequestError(f"weights {weights!r} are not one of {', '.join(WEIGHTS)}")
    half = HALF.itemsize
    plain = half * sum(parameter.numel() for parameter in model.parameters())
    if weights == "bfloat16":
        return plain
    for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
        scales = layer.out_features if weights == "int8" else 2 * layer.weight.numel() // GROUP
        bits = 8 if weights == "int8" else 4
        plain += layer.weight.numel() * bits // 8 + half * (scales - layer.weight.numel())
    return plain


@dataclass(frozen=True)
class Deployment:
    """A model on one card, or cut into equal parts over several, and what it does with each card's memory.

    Attributes:
        model: shapes suffice.
        card: bytes of each card.
        weights: one of `WEIGHTS`.
        utilization: share of the card that the engine may use in all (`gpu_memory_utilization`).
        cards: over so many a layer's heads and matrices are shared out (`tensor_parallel_size`). A key/value head is
            not cut: where there are fewer than cards, some cards hold the same one.
        step: bytes of each card that a largest step takes.

    Raises:
        InvalidRequestError: heads that cannot be shared out so, or a share that is none.
    """

    model: Decoder
    card: float
    weights: str = "bfloat16"
    utilization: float = 0.9
    cards: int = 1
    step: float = STEP_BYTES

    def __post_init__(self) -> None:
        config = self.model.config
        if not 0 < self.utilization <= 1:
            raise InvalidRequestError(f"utilization is a share above 0 and at most 1, not {self.utilization}")
        few, many = sorted((self.cards, config.num_kv_heads))
        if few < 1 or many % few or config.num_heads % self.cards:
            raise InvalidRequestError(
                f"{config.num_heads} heads and {config.num_kv_heads} of keys and values cannot be shared out to "
                f"{self.cards} cards: choose a number that divides the heads"
            )

    @property
    def weights_a_card(self) -> float:
        """Bytes; norms are counted as shared out too, though each card has them all."""
        return weight_bytes(self.model, self.weights) / self.cards

    @property
    def kv_heads_a_card(self) -> int:
        return max(1, self.model.config.num_kv_heads // self.cards)

    @property
    def token_bytes(self) -> float:
        """Bytes of one token's keys and values on each card."""
        config = self.model.config
        return config.kv_bytes_per_token(HALF) * self.kv_heads_a_card / config.num_kv_heads

    @property
    def room(self) -> float:
        """Bytes of each card for keys and values; negative where the weights do not fit."""
        return self.card * self.utilization - self.weights_a_card - self.step

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values fit."""
        return max(0, int(self.room / self.token_bytes))


def plot_deployments(deployments: Mapping[str, Deployment], *, context: int = 8192, title: str = "") -> Figure:
    """A bar for one card of each deployment: what its memory is for, and how many texts of `context` tokens fit."""
    figure, axes = plt.subplots(figsize=(10, 0.62 * len(deployments) + 1.5), layout="constrained")
    for row, one in enumerate(deployments.values()):
        _draw_card(axes, row, one, context)
    axes.set_yticks(range(len(deployments)), list(deployments))
    axes.invert_yaxis()
    most = max(max(one.card, one.weights_a_card + one.step) for one in deployments.values()) / 1e9
    axes.set(xlim=(0, 1.5 * most), xlabel="memory of one card (GB)", title=title)
    names = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    order = [name for name in ("weights", "a step", "keys and values", "left to others", "missing") if name in names]
    figure.legend([names[name] for name in order], order, loc="outside lower center", ncols=5, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_card(axes: Axes, row: int, one: Deployment, context: int) -> None:
    """Each part's gid is its name."""
    budget = one.card * one.utilization
    parts = [("weights", one.weights_a_card, BLUE, ""), ("a step", one.step, GREEN, "..")]
    if one.room > 0:
        parts += [("keys and values", one.room, ORANGE, "//"), ("left to others", one.card - budget, LIGHT, "")]
        fit = one.tokens // context
        note = f"{one.tokens:,} tokens: {fit or 'no'} text{'s' * (fit > 1)} of {context:,}"
    else:
        missing = -one.room
        parts = [("weights", max(0.0, budget - one.step), BLUE, ""), parts[1], ("missing", missing, RED, "xx")]
        note = f"{missing / 1e9:.1f} GB are missing"
    left = 0.0
    for name, size, colour, hatch in parts:
        looks: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": name, "gid": name}
        axes.barh([row], [size / 1e9], 0.62, [left / 1e9], **looks)
        left += size
    axes.plot([one.card / 1e9] * 2, [row - 0.4, row + 0.4], color="black", linewidth=1.5)
    axes.text(max(left, one.card) / 1e9, row, f"  {note}", va="center", fontsize=9, color="black")
    if one.room > 0 and one.weights_a_card > 0.1 * one.card:
        box = {"facecolor": "white", "edgecolor": GREY, "pad": 1.5, "linewidth": 0}
        axes.text(one.weights_a_card / 2e9, row, f"{one.weights_a_card / 1e9:.1f}", ha="center", va="center",
                  fontsize=9, bbox=box)  # fmt: skip


def plot_deployment(
    weights: str = "bfloat16",
    utilization: float = 0.9,
    cards: int = 1,
    context: int = 8192,
    *,
    name: str = "GLM-4-9B",
    title: str = "",
) -> Figure:
    """One of the `PUBLISHED` models on each of `CARDS`.

    Args:
        weights, utilization, cards: as in `Deployment`.
        context: tokens of the texts that are counted.
    """
    model = published_model(name)
    sizes = {card: Deployment(model, size, weights, utilization, cards) for card, size in CARDS.items()}
    one = next(iter(sizes.values()))
    times = f"{cards} × " if cards > 1 else ""
    told = f"{one.weights_a_card / 1e9:.1f} GB of weights and {one.token_bytes / 2**10:.0f} KiB a token on each card"
    return plot_deployments(
        {times + card: one for card, one in sizes.items()},
        context=context,
        title=title or f"{name}, weights in {weights}: {told}",
    )


def explore_deployment(
    weights: str = "bfloat16", utilization: float = 0.9, cards: int = 1, context: int = 8192
) -> Explorer:
    """`plot_deployment` with a control for each of its arguments; needs a running kernel to move."""
    controls = (
        choice("weights", WEIGHTS, weights),
        slider("gpu_memory_utilization", utilization, 0.5, 1.0, 0.01),
        choice("cards", EXPLORED_CARDS, cards),
        number_slider("tokens of a text", EXPLORED_TOKENS, context),
    )
    return Explorer(controls, plot_deployment)
