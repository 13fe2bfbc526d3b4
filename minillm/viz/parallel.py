"""A model on several devices: matrices and heads cut into parts, sums on a ring, to shard or to replicate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from minillm.errors import InvalidRequestError
from minillm.simulate.parallel import NVLINK, Link, Service, Sums
from minillm.simulate.simulator import CostModel
from minillm.transformer.decoder import DecoderConfig, LayerConfig
from minillm.transformer.parallel import cut_of, shard_config
from minillm.viz.explorer import Explorer, number_slider
from minillm.viz.style import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    LIGHT,
    LINE_STYLES,
    MARKERS,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    arrow,
    ink,
    ink_on,
)

RANK_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
"""A rank's own; those of 6 and more begin again."""

# --- matrices as numbers


def plot_split(
    x: Float[Tensor, "tokens hidden"],
    first: Float[Tensor, "hidden units"],
    second: Float[Tensor, "units out"],
    size: int,
) -> Figure:
    """relu(x · first) · second on so many ranks: the first matrix cut by columns, the second by rows, then one sum.

    Raises:
        InvalidRequestError: units that cannot be divided so.
    """
    units = first.shape[1]
    if size < 1 or units % size:
        raise InvalidRequestError(f"{units} units cannot be divided among {size} ranks")
    parts = [slice(rank * units // size, (rank + 1) * units // size) for rank in range(size)]
    names = [f"rank {rank}" for rank in range(size)] + ["whole"]
    heights = [max(len(first), len(x), units // size)] * size + [max(len(first), len(x), units)]
    widths = [x.shape[1], units, units, units, second.shape[1]]  # the hidden numbers, and those after the relu
    lefts = [sum(widths[:place]) + 1.2 * place for place in range(len(widths))]
    lefts = [left + (1.2 if place > 2 else 0) for place, left in enumerate(lefts)]
    figure, axes = plt.subplots(figsize=(10, 0.42 * sum(heights) + 0.8), layout="constrained")
    top = 0.0
    for row, (name, own) in enumerate(zip(names, [*parts, slice(0, units)], strict=True)):
        colour = GREY if row == size else RANK_COLOURS[row % len(RANK_COLOURS)]
        axes.text(-0.5, top + len(x) / 2, name, ha="right", va="center", fontweight="bold", color=ink(colour))
        _draw_products(axes, top, lefts, x, first[:, own], second[own], colour)
        top += heights[row] + 0.8
        if row < size:
            sign = "+" if row < size - 1 else "= (the sum)"
            axes.text(lefts[4] + widths[4] / 2, top - (heights[row] - len(x) + 0.8) / 2, sign, ha="center", va="center")
    axes.set(xlim=(-3, lefts[4] + widths[4] + 1.5), ylim=(top - 0.6, -1.4))
    for left, title in zip(lefts, ("x", "first", "x · first", "second", "a part of the output"), strict=True):
        axes.text(left, -0.5, title, fontsize=10)
    axes.set_aspect("equal")
    axes.set_axis_off()
    return figure


def _draw_products(
    axes: Axes, top: float, lefts: Sequence[float], x: Tensor, first: Tensor, second: Tensor, colour: str
) -> None:
    """x · first = hidden, relu(hidden) · second = a part of the output."""
    hidden = x @ first
    matrices = (x, first, hidden, second, hidden.relu() @ second)
    shades = (GREY if colour == GREY else LIGHT, *[colour] * 4)
    for place, (left, matrix, shade) in enumerate(zip(lefts, matrices, shades, strict=True)):
        _draw_matrix(axes, left, top, matrix, shade)
        sign = ("·", "=", "→ relu ·", "=", "")[place]
        gap = 1.2 if place != 2 else 2.4
        axes.text(left + matrix.shape[1] + gap / 2, top + len(x) / 2, sign, ha="center", va="center", fontsize=11)


def _draw_matrix(axes: Axes, left: float, top: float, matrix: Tensor, colour: str) -> None:
    for row, numbers in enumerate(matrix.tolist()):
        for column, number in enumerate(numbers):
            place = (left + column, top + row)
            axes.add_patch(Rectangle(place, 1, 1, facecolor=colour, alpha=0.3, linewidth=0))
            axes.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor="white"))
            axes.text(place[0] + 0.5, place[1] + 0.5, f"{number:g}", ha="center", va="center", fontsize=9)


# --- heads


def plot_rank_heads(num_heads: int, num_kv_heads: int, sizes: Sequence[int], *, title: str = "") -> Figure:
    """Which query heads and which key/value heads each rank holds, for some numbers of ranks; a colour is a group.

    Raises:
        ConfigError: heads that cannot be divided so.
    """
    figure, panels = plt.subplots(
        len(sizes),
        1,
        figsize=(10, 0.36 * sum(sizes) + 0.75 * len(sizes)),
        squeeze=False,
        height_ratios=[size + 0.6 for size in sizes],
        layout="constrained",
    )
    for axes, size in zip(panels[:, 0], sizes, strict=True):
        _draw_heads(axes, num_heads, num_kv_heads, size)
    figure.suptitle(title)
    return figure


def _draw_heads(axes: Axes, num_heads: int, num_kv_heads: int, size: int) -> None:
    """Each square's gid is its kind and number."""
    config = DecoderConfig(1, 1, num_heads, num_kv_heads, 1, size, 1, (LayerConfig(),))
    shard_config(config, size)
    for rank in range(size):
        axes.text(-0.4, rank + 0.5, f"rank {rank}", ha="right", va="center", fontsize=9)
        for part, start in (("q", 0), ("k", num_heads + 1)):
            (heads,) = cut_of("layers.0.attention.qkv", part, config, rank, size).rows or ((),)
            for head in heads:
                group = head * num_kv_heads // num_heads if part == "q" else head
                colour = RANK_COLOURS[group % len(RANK_COLOURS)]
                place, gid = (start + head + 0.06, rank + 0.08), f"{part}{head}"
                axes.add_patch(Rectangle(place, 0.88, 0.84, facecolor=colour, gid=gid, hatch="//" * (part == "k")))
                label = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
                axes.text(start + head + 0.5, rank + 0.5, str(head), ha="center", va="center", fontsize=8,
                          color=ink_on(colour), bbox=label)  # fmt: skip
    axes.set(xlim=(-2, num_heads + num_kv_heads + 1.2), ylim=(size, 0))
    ranks = "one rank" if size == 1 else f"{size} ranks"
    axes.set_title(f"{ranks}: query heads, and (hatched) key/value heads", fontsize=10, loc="left")
    axes.set_axis_off()


# --- the ring


class Send(NamedTuple):
    """In one step of a ring: a chunk goes from a rank to the next, which adds it to its own or puts it in its place."""

    source: int
    target: int
    chunk: int
    adds: bool


def ring_sends(size: int) -> list[list[Send]]:
    """All steps of an all-reduce on a ring; the sends of one step are at the same time.

    First every chunk goes round and is summed up (reduce-scatter), then every sum goes round (all-gather).

    Raises:
        InvalidRequestError: fewer than two ranks.
    """
    if size < 2:
        raise InvalidRequestError(f"a ring has two ranks or more, not {size}")
    steps = []
    for adds in (True, False):
        for step in range(size - 1):
            first = 0 if adds else 1
            steps.append([Send(rank, (rank + 1) % size, (rank + first - step) % size, adds) for rank in range(size)])
    return steps


def plot_ring(size: int, nbytes: int) -> Figure:
    """The all-reduce of a tensor of so many bytes: each chunk names the ranks whose numbers are in it; last, the bytes.

    Raises:
        InvalidRequestError: fewer than two ranks.
    """
    steps = ring_sends(size)
    figure, panels = plt.subplots(2, size, figsize=(2.5 * size, 5.6), layout="constrained")
    *pictures, last = panels.flat
    held = [[{rank} for _ in range(size)] for rank in range(size)]
    for number, axes in enumerate(pictures):
        sends = steps[number - 1] if number else []
        given = [held[send.source][send.chunk] for send in sends]
        for send, ranks in zip(sends, given, strict=True):
            held[send.target][send.chunk] = held[send.target][send.chunk] | ranks if send.adds else ranks
        _draw_ring(axes, held, sends)
        what = "reduce-scatter" if number < size else "all-gather"
        axes.set_title(f"{number}: {what}" if number else "at the beginning", fontsize=10)
    _draw_bytes(last, size, nbytes)
    return figure


def _draw_ring(axes: Axes, held: Sequence[Sequence[set[int]]], sends: Sequence[Send]) -> None:
    """Rows are ranks, columns chunks; what has just come has a thick edge and an arrow."""
    size = len(held)
    for rank, chunks in enumerate(held):
        for chunk, ranks in enumerate(chunks):
            whole = len(ranks) == size
            colour, alpha = (GREEN, 0.45) if whole else (BLUE, 0.1 + 0.4 * len(ranks) / size)
            axes.add_patch(Rectangle((chunk, 1.4 * rank), 1, 1, linewidth=0, facecolor=colour, alpha=alpha))
            axes.add_patch(Rectangle((chunk, 1.4 * rank), 1, 1, fill=False, edgecolor="white"))
            name = "".join(map(str, sorted(ranks)))
            axes.text(chunk + 0.5, 1.4 * rank + 0.5, name, ha="center", va="center", fontsize=9)
    for send in sends:
        x, y = send.chunk + 0.5, 1.4 * send.target
        colour = BLUE if send.adds else GREEN
        axes.add_patch(Rectangle((send.chunk, y), 1, 1, fill=False, edgecolor=colour, linewidth=2, zorder=3))
        arrow(axes, (x, y - 0.42), (x, y), colour, width=2)
    axes.set(xlim=(-0.1, size + 0.1), ylim=(1.4 * size - 0.3, -0.55))
    axes.set_xticks([chunk + 0.5 for chunk in range(size)], [f"chunk {chunk}" for chunk in range(size)], fontsize=7)
    axes.set_yticks([1.4 * rank + 0.5 for rank in range(size)], [f"rank {rank}" for rank in range(size)], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_bytes(axes: Axes, size: int, nbytes: int) -> None:
    """What leaves each rank: on the ring, and when rank 0 adds everything up and sends it back to all."""
    ring = [2 * (size - 1) * nbytes / size] * size
    star = [(size - 1) * nbytes, *[nbytes] * (size - 1)]
    rows = range(size)
    axes.barh([row - 0.18 for row in rows], [b / 2**10 for b in ring], 0.34, color=GREEN, label="on the ring")
    axes.barh([row + 0.18 for row in rows], [b / 2**10 for b in star], 0.34, color=LIGHT, edgecolor=GREY,
              hatch="///", label="rank 0 adds all up")  # fmt: skip
    axes.set_yticks(rows, [f"rank {row}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("KiB sent", fontsize=9)
    axes.set_title(f"bytes, for {nbytes / 2**10:g} KiB", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.22))
    axes.spines[["top", "right"]].set_visible(False)


# --- to shard or to replicate

STORED = 1000
"""Tokens that each sequence of an explored step has in memory."""
EXPLORED_RANKS = (2, 4, 8)
EXPLORED_BANDWIDTHS = (1, 12, 25, 50, 100, 200, 450, 900)
EXPLORED_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
STEP_LOOKS: Mapping[str, tuple[str, str]] = {
    "weights": (BLUE, ""),
    "computing": (GREEN, ""),
    "keys and values": (ORANGE, "//"),
    "sums: waiting": (RED, "xx"),
    "sums: bytes": (PURPLE, ".."),
}


def step_parts(batch: int, size: int = 1, link: Link = NVLINK, cost: CostModel | None = None) -> dict[str, float]:
    """What a step of single tokens is made of, in seconds, for an 8-billion-parameter model cut over `size` devices.

    Args:
        batch: sequences, each with `STORED` tokens in memory.
        cost: on one device.
    """
    cost = cost or CostModel()
    waiting, sending = Sums().seconds(batch, size, link)
    alone = (cost.step, cost.token * batch, cost.stored_token * STORED * batch)
    return dict(zip(STEP_LOOKS, (*(part / size for part in alone), waiting, sending), strict=True))


def plot_sharded_step(ranks: int = 4, gigabytes: float = 450, batch: int = 32) -> Figure:
    """One step of single tokens for `batch` sequences: on one device, sharded, and with a copy on each device.

    Args:
        ranks: devices.
        gigabytes: 10⁹ bytes a second of a link, in each direction; its latency is `NVLINK`'s.
        batch: sequences in all; of copies, each has its share of them.
    """
    link = Link(NVLINK.latency, 1e9 * gigabytes)
    rows = {
        "one device": step_parts(batch),
        f"{ranks} devices, sharded": step_parts(batch, ranks, link),
        f"{ranks} copies": step_parts(-(-batch // ranks)),
    }
    figure, axes = plt.subplots(figsize=(10, 3.1), layout="constrained")
    longest = max(sum(parts.values()) for parts in rows.values())
    for row, parts in enumerate(rows.values()):
        left = 0.0
        for name, seconds in parts.items():
            colour, hatch = STEP_LOOKS[name]
            looks: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": name, "gid": name}
            axes.barh([row], [1e3 * seconds], 0.62, [1e3 * left], **looks)
            left += seconds
        axes.text(1e3 * left, row, f"  {1e3 * left:.1f} ms, {batch / left:,.0f} tokens/s", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    sequences = f"{batch} sequence{'s' * (batch > 1)}"
    axes.set(xlim=(0, 1.35e3 * longest), xlabel="a step (ms)", title=f"{sequences}, links of {gigabytes:g} GB/s")
    handles = [Patch(facecolor=colour, hatch=hatch, edgecolor="white") for colour, hatch in STEP_LOOKS.values()]
    figure.legend(handles, list(STEP_LOOKS), loc="outside lower center", ncols=len(STEP_LOOKS), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def explore_sharding(ranks: int = 4, gigabytes: int = 450, batch: int = 32) -> Explorer:
    """`plot_sharded_step` with a slider for each of its arguments; needs a running kernel to move."""
    controls = (
        number_slider("devices", EXPLORED_RANKS, ranks),
        number_slider("GB/s of a link", EXPLORED_BANDWIDTHS, gigabytes),
        number_slider("sequences", EXPLORED_SEQUENCES, batch),
    )
    return Explorer(controls, plot_sharded_step)


def plot_shard_or_replicate(
    loads: Sequence[float], services: Mapping[str, Sequence[Service]], *, title: str = ""
) -> Figure:
    """How long a token takes and how many there are a second, against the load, for some ways of using devices.

    Args:
        loads: requests a second.
        services: of each way, what came of each load.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
    for number, (name, found) in enumerate(services.items()):
        look: dict[str, Any] = {"color": COLOURS[number], "linestyle": LINE_STYLES[number % len(LINE_STYLES)]}
        look |= {"marker": MARKERS[number], "markersize": 5, "linewidth": 2, "label": name}
        left.plot(loads, [1e3 * one.seconds_per_token for one in found], **look)
        right.plot(loads, [one.tokens_per_second for one in found], **look)
    for axes, label in ((left, "a token takes (ms)"), (right, "tokens/s")):
        axes.set(xlabel="requests/s", ylabel=label, xscale="log", ylim=(0, None))
        axes.set_xticks(loads, [f"{load:g}" for load in loads])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure
