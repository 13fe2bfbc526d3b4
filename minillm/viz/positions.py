"""Figures of positions: tables, clocks, turned pairs of channels, wavelengths; and the explorer of rotary positions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Arc, Circle
from torch import Tensor

from minillm.transformer.positions import RotaryConfig, RotaryEmbedding, apply_rotary, rotary_frequencies
from minillm.viz.explorer import Explorer, slider
from minillm.viz.style import BLUE, COLOURS, GREY, LINE_STYLES, ORANGE, RED, SKY, arrow, ink

EXPLORED = RotaryConfig(dim=16, interleaved=True)
"""The head that `plot_rotary` draws unless told otherwise: 8 pairs of neighbouring channels."""

LAST_POSITION = 63
QUERY_ANGLE, KEY_ANGLE = math.radians(20), math.radians(80)
"""Where every pair of the drawn query and key points before it is turned."""


def plot_shuffled_outputs(
    before: tuple[Sequence[str], Float[Tensor, "seq hidden"]],
    after: tuple[Sequence[str], Float[Tensor, "seq hidden"]],
    *,
    title: str = "",
) -> Figure:
    """Two sentences of the same words and what a layer made of them, one row of colours a word."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained")
    largest = max(float(outputs.abs().max()) for _, outputs in (before, after))
    for panel, (words, outputs) in zip(axes, (before, after), strict=True):
        image = panel.imshow(outputs.detach(), cmap="PuOr", vmin=-largest, vmax=largest, aspect="auto")
        panel.set_yticks(range(len(words)), words)
        panel.set(xlabel="channel of the output", ylabel="token", title=" ".join(words))
    figure.colorbar(image, ax=axes, label="value")
    figure.suptitle(title)
    return figure


def plot_position_table(table: Float[Tensor, "seq dim"], *, title: str = "", label: str = "value") -> Figure:
    """A heat map with one row a position and one column a channel."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    largest = float(table.abs().max())
    image = axes.imshow(table.detach(), cmap="PuOr", vmin=-largest, vmax=largest, aspect="auto", interpolation="none")
    axes.set(xlabel="channel", ylabel="position (tokens)", title=title)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def plot_clocks(positions: Sequence[int], dim: int, *, title: str = "") -> Figure:
    """Each position as a row of clocks, one a pair of channels; pair i's hand stands at position · frequency i."""
    frequencies, _ = rotary_frequencies(RotaryConfig(dim))
    rows, columns = len(positions), len(frequencies)
    size = (1.25 * columns + 0.8, 1.3 * rows + 0.9)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for row, position in enumerate(positions):
        for pair, frequency in enumerate(frequencies.tolist()):
            panel, angle = axes[row, pair], position * frequency
            _draw_circle(panel)
            _draw_arrow(panel, angle, COLOURS[row % len(COLOURS)])
            if row == 0:
                panel.set_title(f"pair {pair}\nonce round in\n{2 * math.pi / frequency:,.0f} tokens", fontsize=9)
        axes[row, 0].text(-1.35, 0, f"position {position}", rotation=90, ha="center", va="center", fontsize=9)
    figure.suptitle(title)
    return figure


def plot_products(
    distances: Int[Tensor, "distances"], curves: Mapping[str, Float[Tensor, "distances"]], *, title: str = ""
) -> Figure:
    """Dot products against the distance of the two positions, one line a label."""
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for number, (label, values) in enumerate(curves.items()):
        style = LINE_STYLES[number % len(LINE_STYLES)]
        axes.plot(distances, values.detach(), style, color=COLOURS[number % len(COLOURS)], label=label)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(xlabel="distance of the two positions (tokens)", ylabel="dot product", title=title)
    if len(curves) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_score_maps(maps: Mapping[str, Float[Tensor, "queries keys"]], *, title: str = "") -> Figure:
    """Square maps of dot products, one a title; where only the distance counts, a map is striped along its diagonal."""
    figure, axes = plt.subplots(1, len(maps), figsize=(4.6 * len(maps), 4.2), squeeze=False)
    figure.subplots_adjust(left=0.08, right=0.93, bottom=0.13, top=0.84, wspace=0.32)
    for panel, (name, values) in zip(axes[0], maps.items(), strict=True):
        image = panel.imshow(values.detach(), cmap="viridis", interpolation="none")
        panel.set(title=name, xlabel="position (tokens)")
        bar = figure.colorbar(image, ax=panel, fraction=0.046, pad=0.04)
    axes[0, 0].set_ylabel("position (tokens)")
    bar.set_label("dot product")
    figure.suptitle(title)
    return figure


def plot_wavelengths(
    configs: Mapping[str, RotaryConfig], *, context: int | None = None, relative: bool = False, title: str = ""
) -> Figure:
    """How many tokens each pair of channels needs for one turn.

    Args:
        context: drawn as a horizontal line: pairs above it never come round within so many tokens.
        relative: divide by the first configuration's wavelengths, to see what a scaling does to each pair.
    """
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    first = wavelengths(next(iter(configs.values())))
    for number, (label, config) in enumerate(configs.items()):
        values = wavelengths(config) / first if relative else wavelengths(config)
        style, colour = LINE_STYLES[number % len(LINE_STYLES)], COLOURS[number % len(COLOURS)]
        axes.plot(range(len(values)), values, style, color=colour, linewidth=2, label=label)
    if context is not None and not relative:
        axes.axhline(context, color=GREY, linestyle=":", label=f"context: {context:,} tokens")
    axes.set(xlabel="pair of channels", title=title)
    axes.set_ylabel("wavelength (times the unscaled one)" if relative else "wavelength (tokens for one turn)")
    if not relative:
        axes.set_yscale("log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def wavelengths(config: RotaryConfig) -> Float[Tensor, "half"]:
    """Tokens that each pair of channels needs for one turn: 2π over its angle a token."""
    frequencies, _ = rotary_frequencies(config)
    return 2 * math.pi / frequencies


def pair_products(
    config: RotaryConfig,
    q: Float[Tensor, "head_dim"],
    k: Float[Tensor, "head_dim"],
    query_positions: Int[Tensor, "tokens"],
    key_positions: Int[Tensor, "tokens"],
) -> Float[Tensor, "tokens half"]:
    """What each pair of channels adds to the dot product of q and k, turned for their positions."""
    rope = RotaryEmbedding(config)
    turned = [
        _as_pairs(apply_rotary(x.expand(len(at), 1, -1), rope(at, x.dtype))[:, 0, : config.dim], config)
        for x, at in ((q, query_positions), (k, key_positions))
    ]
    return (turned[0] * turned[1]).sum(dim=-1)


def plot_rotary(
    query_position: int = 12, key_position: int = 5, pair: int = 2, *, config: RotaryConfig = EXPLORED
) -> Figure:
    """One pair of channels of a query and a key, turned for their positions, and their dot product.

    Left, the pair as arrows: thin before it is turned, thick after. Right, the pair's dot product for every distance,
    with the current one marked.
    """
    query, key = (_unit_pairs(angle, config) for angle in (QUERY_ANGLE, KEY_ANGLE))
    frequency = float(rotary_frequencies(config)[0][pair])
    figure, (circle, curve) = plt.subplots(
        1, 2, figsize=(10, 4.2), width_ratios=(1, 1.35), gridspec_kw={"wspace": 0.25}
    )
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.2, top=0.84)
    _draw_turns(circle, query_position, key_position, frequency)

    distances = torch.arange(-LAST_POSITION, LAST_POSITION + 1)
    at_zero = torch.full_like(distances, LAST_POSITION)
    products = pair_products(config, query, key, at_zero + distances, at_zero)[:, pair]
    here = torch.tensor([query_position]), torch.tensor([key_position])
    now = float(pair_products(config, query, key, *here)[0, pair])
    distance = query_position - key_position
    curve.plot(distances, products, color=SKY, linewidth=1.5, marker=".", markersize=4)
    curve.plot([distance], [now], "o", color=RED, markersize=10)
    curve.axhline(0, color=GREY, linewidth=0.8)
    curve.axvline(distance, color=RED, linewidth=0.8, linestyle=":")
    curve.set(xlabel="distance: query position − key position (tokens)", ylabel="dot product of the two pairs")
    curve.set(ylim=(-1.2, 1.2), title=f"distance {distance}: product {now:+.2f}, wherever the two stand")
    curve.spines[["top", "right"]].set_visible(False)
    return figure


def explore_rotary(
    query_position: int = 12, key_position: int = 5, pair: int = 2, *, config: RotaryConfig = EXPLORED
) -> Explorer:
    """`plot_rotary` with a slider for each of its numbers; needs a running kernel to move."""
    controls = (
        slider("query position", query_position, 0, LAST_POSITION),
        slider("key position", key_position, 0, LAST_POSITION),
        slider("pair of channels", pair, 0, config.dim // 2 - 1),
    )
    return Explorer(controls, partial(plot_rotary, config=config))


def _as_pairs(x: Float[Tensor, "tokens dim"], config: RotaryConfig) -> Float[Tensor, "tokens half 2"]:
    return x.unflatten(-1, (-1, 2)) if config.interleaved else torch.stack(x.chunk(2, dim=-1), dim=-1)


def _unit_pairs(angle: float, config: RotaryConfig) -> Float[Tensor, "dim"]:
    """A head whose pairs all have length 1 and point to `angle`."""
    a, b = math.cos(angle), math.sin(angle)
    half = config.dim // 2
    return torch.tensor([a, b] * half if config.interleaved else [a] * half + [b] * half)


def _draw_circle(axes: Axes) -> None:
    axes.add_patch(Circle((0, 0), 1, fill=False, color=GREY, alpha=0.5))
    axes.set(xlim=(-1.12, 1.12), ylim=(-1.12, 1.12), aspect="equal")
    axes.set_axis_off()


def _draw_arrow(axes: Axes, angle: float, colour: str, *, width: float = 2.5, alpha: float = 1.0) -> None:
    arrow(axes, (0, 0), (math.cos(angle), math.sin(angle)), colour, width=width, alpha=alpha)


def _draw_turns(axes: Axes, query_position: int, key_position: int, frequency: float) -> None:
    """The two arrows before and after their turn, and the arcs between."""
    _draw_circle(axes)
    axes.set(xlim=(-1.7, 1.7), ylim=(-1.4, 1.4))
    once = f"once round in {2 * math.pi / frequency:,.1f} tokens"
    axes.set_title(f"each token turns the pair by {frequency:.3g} rad\n{once}")
    between = math.cos(QUERY_ANGLE - KEY_ANGLE + (query_position - key_position) * frequency)
    drawn = (
        ("q", query_position, QUERY_ANGLE, BLUE, 0.62, 1.15),
        ("k", key_position, KEY_ANGLE, ORANGE, 0.42, 1.34 if between > math.cos(0.2) else 1.15),
    )
    for name, position, start, colour, radius, label in drawn:
        turn = position * frequency
        end = start + turn
        _draw_arrow(axes, start, colour, width=1.2, alpha=0.45)
        _draw_arrow(axes, end, colour)
        sweep = min(math.degrees(turn), 360.0)
        first = math.degrees(start)
        axes.add_patch(Arc((0, 0), 2 * radius, 2 * radius, theta1=first, theta2=first + sweep, color=colour, lw=1.5))
        where = label * math.cos(end), label * math.sin(end)
        axes.text(*where, name, color=ink(colour), weight="bold", ha="center", va="center")
    lines = ((-0.06, BLUE, "query", query_position), (-0.14, ORANGE, "key", key_position))
    for height, colour, name, position in lines:
        turn = position * frequency
        text = f"{name} at {position}: turned by {position} × {frequency:.3g} = {turn:.3g} rad"
        text += f" ({turn / (2 * math.pi):.2f} turns)"
        axes.text(0.5, height, text, transform=axes.transAxes, color=ink(colour), ha="center", fontsize=9)
