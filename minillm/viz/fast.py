"""What speed is made of: the roofline with what was reached, gains by stage, the parts of a step, rounded weights."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import matplotlib.pyplot as plt
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from minillm.errors import InvalidRequestError
from minillm.viz.memory import Machine
from minillm.viz.style import BLUE, COLOURS, GREY, LIGHT, MARKERS, ORANGE

HATCHES = ("", "///", "...", "xxx", "\\\\\\")


def plot_reached(machine: Machine, reached: Mapping[str, tuple[float, float]], *, title: str = "") -> Figure:
    """A machine's roofline, and what work reached of it; a dotted line leads from each mark up to the roof.

    Args:
        reached: name → (FLOPs a byte, FLOPs a second as measured).
    """
    figure, axes = plt.subplots(figsize=(9.5, 4.6), layout="constrained")
    intensities = [intensity for intensity, _ in reached.values()]
    lowest, highest = min([0.25, *intensities]) / 2, 4 * max([machine.ridge, *intensities])
    corners = [lowest, machine.ridge, highest]
    axes.plot(corners, [machine.attainable(x) for x in corners], color="black", linewidth=2)
    for number, (name, (intensity, flops)) in enumerate(reached.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        roof = machine.attainable(intensity)
        axes.plot([intensity] * 2, [flops, roof], ":", color=colour, zorder=1)
        label = f"{name}: {flops / roof:.1%}"
        axes.plot([intensity], [flops], marker, color=colour, markersize=9, label=label, zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOPs a byte)", ylabel="FLOPs a second")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, title="reached, of the roof above", fontsize=9)
    return figure


def plot_gains(rates: Mapping[str, float], *, limit: float | None = None, xlabel: str, title: str = "") -> Figure:
    """A bar for each stage, on a logarithmic axis, with its rate and how many times the stage before it that is.

    Args:
        rates: stage → what it does a second, in the order in which the stages come.
        limit: what the machine allows; a line.
    """
    figure, axes = plt.subplots(figsize=(9.5, 0.48 * len(rates) + 1.4), layout="constrained")
    values = list(rates.values())
    steps = ["", *(f"  ({after / before:.1f}×)" for before, after in pairwise(values))]
    bars = axes.barh(range(len(values)), values, 0.7, color=BLUE)
    axes.bar_label(bars, [f"{value:,.0f}{step}" for value, step in zip(values, steps, strict=True)], padding=4)
    axes.set_yticks(range(len(values)), list(rates))
    axes.invert_yaxis()
    most = max(values)
    if limit is not None:
        axes.axvline(limit, color=ORANGE, linestyle="--", label=f"the machine's limit: {limit:,.0f}")
        figure.legend(loc="outside lower right", frameon=False)
        most = max(most, limit)
    axes.set(xscale="log", xlabel=xlabel, title=title, xlim=(min(values) / 2, 4 * most))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_parts(parts: Mapping[str, Mapping[str, float]], *, xlabel: str, title: str = "") -> Figure:
    """A bar for each name, made of parts that are the same for all; each part's share is written where there is room.

    Raises:
        InvalidRequestError: the bars have different parts.
    """
    kinds = list(next(iter(parts.values()), {}))
    if not kinds or any(list(one) != kinds for one in parts.values()):
        raise InvalidRequestError("every bar needs the same parts in the same order, and at least one")
    figure, axes = plt.subplots(figsize=(9.5, 0.7 * len(parts) + 1.6), layout="constrained")
    left = [0.0] * len(parts)
    for number, kind in enumerate(kinds):
        sizes = [one[kind] for one in parts.values()]
        colour, hatch = COLOURS[number % len(COLOURS)], HATCHES[number % len(HATCHES)]
        bars = axes.barh(range(len(parts)), sizes, 0.6, left, color=colour, hatch=hatch, edgecolor="white", label=kind)
        shares = [size / sum(one.values()) for size, one in zip(sizes, parts.values(), strict=True)]
        widest = max(sum(one.values()) for one in parts.values())
        texts = [f"{share:.0%}" if size > 0.04 * widest else "" for size, share in zip(sizes, shares, strict=True)]
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        for bar in axes.bar_label(bars, texts, label_type="center", fontsize=9):
            if bar.get_text():
                bar.set_bbox(box)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    axes.set_yticks(range(len(parts)), list(parts))
    axes.invert_yaxis()
    axes.set(xlabel=xlabel, title=title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(kinds), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_rounding(
    weights: Float[Tensor, "size"], rounded: Float[Tensor, "size"], group: int, bits: int, *, title: str = ""
) -> Figure:
    """The beginning of a row of weights, the numbers that each of its groups can say, and the errors of rounding.

    Args:
        rounded: the weights that remain; each is one of 2**bits equally spaced numbers of its group.
        group: weights that share these numbers; divides `size`.
    """
    if len(weights) % group or weights.shape != rounded.shape:
        raise InvalidRequestError(f"{len(weights)} weights and {len(rounded)} rounded ones are no groups of {group}")
    figure, (row, errors) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(2.2, 1), layout="constrained")
    steps = []
    for number, (true, kept) in enumerate(zip(weights.split(group), rounded.split(group), strict=True)):
        low, high = float(true.min()), float(true.max())
        step = (high - low) / (2**bits - 1)
        place = range(number * group, (number + 1) * group)
        levels = [low + step * level for level in range(2**bits)]
        row.hlines(levels, place[0] - 0.5, place[-1] + 0.5, color=LIGHT, linewidth=1, zorder=0)
        row.vlines(place, true, kept, color=ORANGE, linewidth=1.5)
        row.plot(place, true, "o", color=BLUE, markersize=4, label="weight" if number == 0 else None)
        row.plot(place, kept, "_", color="black", markersize=7, label="what remains of it" if number == 0 else None)
        row.axvline(place[-1] + 0.5, color=GREY, linestyle=":")
        steps += ((kept - true) / step).tolist()
    row.set(xlabel=f"input (dotted: the ends of groups of {group})", ylabel="weight")
    row.set_title(f"pale lines: the {2**bits} numbers of each group", fontsize=10)
    errors.hist(steps, bins=20, range=(-0.5, 0.5), color=ORANGE, edgecolor="white", linewidth=0.4)
    errors.set(xlabel="error (steps between two numbers)", ylabel="weights")
    errors.set_title("never more than half a step", fontsize=10)
    for axes in (row, errors):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*row.get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False)
    figure.suptitle(title)
    return figure
