"""What reservation wastes: lengths of real requests, memory as a strip of slots, what every slot is for over time; the
explorer that plays an arrival sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from minillm.errors import InvalidRequestError
from minillm.simulate.contiguous import ContiguousAllocator
from minillm.simulate.reservation import (
    MEMORY_POLICIES,
    Held,
    MemoryPolicy,
    MemorySimulation,
    simulate_memory,
)
from minillm.simulate.trace import Arrival
from minillm.text import some
from minillm.viz.explorer import Explorer, Steps, choice
from minillm.viz.style import BLUE, COLOURS, GREY, LIGHT, LINE_STYLES, ORANGE, SKY

EXPLORED_SLOTS = 16_384
EXPLORED_CONTEXT = 4_096
LABELLED_SHARE = 0.035
"""Of a row's length: what a piece must have for a name to be written into it."""

PURPOSES = {
    "tokens": "hold a token",
    "reserved": "reserved, used later",
    "internal": "reserved, never used (internal fragmentation)",
    "external": "free but scattered (external fragmentation)",
    "free": "free",
}
"""The fields of `Use`, and what figures call them."""

BARS = {
    "tokens": (BLUE, ""),
    "reserved": (SKY, "///"),
    "internal": (LIGHT, ""),
    "external": (ORANGE, "xxx"),
    "free": ("white", ""),
}


def plot_lengths(arrivals: Sequence[Arrival], *, title: str = "") -> Figure:
    """How long prompts and answers are, and how many requests come in each ten seconds."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    lengths = {
        "prompt": [arrival.prompt_tokens for arrival in arrivals],
        "answer": [arrival.output_tokens for arrival in arrivals],
    }
    for panel, (name, values), colour in zip(axes, lengths.items(), (BLUE, ORANGE), strict=False):
        panel.hist(values, bins=30, color=colour, edgecolor="white", linewidth=0.4)
        mean = sum(values) / len(values)
        panel.axvline(mean, color="black", linestyle="--")
        panel.set_title(f"dashed: the mean, {mean:,.0f}", fontsize=10)
        panel.set(xlabel=f"length of the {name} (tokens)", ylabel="requests")
    seconds = range(0, int(arrivals[-1].time) + 11, 10)
    axes[2].hist([arrival.time for arrival in arrivals], bins=list(seconds), histtype="step", color="black")
    axes[2].set(xlabel="time (s)", ylabel="requests that come in 10 s", ylim=(0, None))
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure


class Piece(NamedTuple):
    """Slots start … end - 1 that serve one purpose for one request (or for nobody: its name is empty)."""

    purpose: str
    name: str
    start: int
    end: int


def pieces(held: Sequence[Held], num_slots: int, *, scattered: bool) -> list[Piece]:
    """What every slot is for, from first to last; neighbours that are alike are one piece.

    Args:
        scattered: whether what is free is too scattered for the request that waits.
    """
    taken = sorted((piece for one in held for piece in _purposes(one)), key=lambda piece: piece.start)
    found: list[Piece] = []
    nobodys = "external" if scattered else "free"
    for piece in [*taken, Piece("", "", num_slots, num_slots)]:
        end = found[-1].end if found else 0
        if piece.start > end:
            found.append(Piece(nobodys, "", end, piece.start))
        if found and found[-1][:2] == piece[:2]:
            found[-1] = found[-1]._replace(end=piece.end)
        elif piece.end > piece.start:
            found.append(piece)
    return found


def _purposes(one: Held) -> Iterator[Piece]:
    """Its blocks, cut where tokens end and where what is used later ends."""
    for number, start in enumerate(one.starts):
        before = number * one.size
        cuts = [min(max(tokens - before, 0), one.size) for tokens in (one.length, one.final)]
        edges = [start, start + cuts[0], start + cuts[1], start + one.size]
        for purpose, first, last in zip(("tokens", "reserved", "internal"), edges, edges[1:], strict=False):
            if last > first:
                yield Piece(purpose, one.name, first, last)


def plot_strips(memories: Mapping[str, ContiguousAllocator], *, title: str = "") -> Figure:
    """Contiguous memories, one strip of slots each: whose tokens lie where, and what the other slots are for."""
    figure, axes = plt.subplots(
        len(memories), 1, figsize=(9.5, 0.95 * len(memories) + 1.1), squeeze=False, layout="constrained"
    )
    for panel, (name, memory) in zip(axes[:, 0], memories.items(), strict=True):
        use = memory.use()
        found = pieces(Held.of_stretches(memory), memory.num_slots, scattered=use.external > 0)
        _draw_strip(panel, found, memory.num_slots)
        panel.set_title(f"{name}: {use.tokens} of {memory.num_slots} slots hold a token", loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("slot")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title)
    return figure


def _draw_strip(axes: Axes, found: Sequence[Piece], row_slots: int) -> None:
    """The slots in rows of `row_slots`, read like text; each rectangle's gid is its purpose."""
    for piece in found:
        for row in range(piece.start // row_slots, (piece.end - 1) // row_slots + 1):
            first, last = max(piece.start, row * row_slots), min(piece.end, (row + 1) * row_slots)
            box = Rectangle((first - row * row_slots, row + 0.06), last - first, 0.88, **_looks(piece))
            box.set_gid(piece.purpose)
            axes.add_patch(box)
            if piece.purpose == "tokens" and last - first >= LABELLED_SHARE * row_slots:
                x, y = box.get_center()
                axes.text(x, y, piece.name, ha="center", va="center", fontsize=9, color="black",
                          bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"})  # fmt: skip
    rows = -(-found[-1].end // row_slots)
    axes.set(xlim=(0, row_slots), ylim=(rows, 0))
    if rows == 1:
        axes.set_yticks([])
    else:
        axes.set_yticks([row + 0.5 for row in range(rows)], [f"{row * row_slots:,}" for row in range(rows)])


def _looks(piece: Piece) -> dict[str, Any]:
    number = int(piece.name) if piece.name.isdecimal() else sum(map(ord, piece.name))
    colour = COLOURS[number % 6]  # grey, the seventh, means nobody's
    return {
        "tokens": {"facecolor": colour, "edgecolor": "white", "linewidth": 0.5},
        "reserved": {"facecolor": to_rgba(colour, 0.25), "edgecolor": colour, "hatch": "////", "linewidth": 0},
        "internal": {"facecolor": LIGHT, "edgecolor": "white", "linewidth": 0.5},
        "external": {"facecolor": "white", "edgecolor": GREY, "hatch": "xxx", "linewidth": 0},
        "free": {"facecolor": "white", "edgecolor": GREY, "linewidth": 0.5},
    }[piece.purpose]


def _legend() -> list[Patch]:
    """A piece of each purpose; tokens and what is reserved for them have their request's colour."""
    return [Patch(**_looks(Piece(purpose, "0", 0, 1)), label=label) for purpose, label in PURPOSES.items()]


def plot_use(
    shares: Mapping[str, Mapping[str, float]],
    published: Mapping[str, float] | None = None,
    *,
    source: str = "",
    title: str = "",
) -> Figure:
    """What a memory was used for on average, a stacked bar each.

    Args:
        shares: for each bar, the share of the slots for each purpose of `Use`.
        published: the share of tokens that somebody else has measured, drawn below the bar of the same name.
        source: who that was.
    """
    figure, axes = plt.subplots(figsize=(9.5, 0.95 * len(shares) + 1.3), layout="constrained")
    for row, (name, share) in enumerate(shares.items()):
        left = 0.0
        for purpose, (colour, hatch) in BARS.items():
            width = 100 * share[purpose]
            looks: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": GREY, "linewidth": 0.5}
            bar = axes.barh([row - 0.2], [width], 0.38, left, **looks, label=PURPOSES[purpose] if row == 0 else None)
            if width >= 4:
                text = axes.bar_label(bar, [f"{width:.1f}"], label_type="center", fontsize=9)[0]
                text.set_bbox({"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none"})
            left += width
        if published and name in published:
            label = f"hold a token: {source}" if row == 0 else None
            bar = axes.barh(
                [row + 0.2], [published[name]], 0.3, color="white", edgecolor=BLUE, linewidth=2, label=label
            )
            axes.bar_label(bar, [f"{published[name]:.1f}"], padding=4, fontsize=9)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.set(xlim=(0, 100.5), xlabel="share of the memory for keys and values (%)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title)
    return figure


def plot_running(simulations: Mapping[str, MemorySimulation], *, title: str = "") -> Figure:
    """How many requests run and how many wait, over time."""
    figure, axes = plt.subplots(2, 1, figsize=(9.5, 4.8), sharex=True, layout="constrained")
    for number, (name, simulation) in enumerate(simulations.items()):
        times = [step.end for step in simulation.memory]
        looks: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": LINE_STYLES[number % len(LINE_STYLES)],
            "linewidth": 1.6,
        }
        axes[0].plot(times, [len(step.held) for step in simulation.memory], **looks, label=name)
        axes[1].plot(times, [step.waiting for step in simulation.memory], **looks)
    axes[0].set(ylabel="requests that run", ylim=(0, None))
    axes[1].set(ylabel="requests that wait", ylim=(0, None), xlabel="time (s)")
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(simulations), frameon=False)
    figure.suptitle(title)
    return figure


def plot_memory(
    policy: MemoryPolicy,
    trace: Sequence[Arrival],
    step: int,
    *,
    num_slots: int = EXPLORED_SLOTS,
    max_model_len: int = EXPLORED_CONTEXT,
) -> Figure:
    """The memory at one step of serving `trace`, in rows of `max_model_len` slots; below, the queue and what was used
    so far.

    Raises:
        InvalidRequestError: a step that there is not.
        ConfigError: a policy that there is not, or sizes that make no sense.
    """
    simulation = simulate_memory(policy, trace, num_slots=num_slots, max_model_len=max_model_len)
    return _draw_memory(policy, simulation, step, max_model_len)


def _draw_memory(policy: MemoryPolicy, simulation: MemorySimulation, step: int, row_slots: int) -> Figure:
    last = len(simulation.memory) - 1
    if not 0 <= step <= last:
        raise InvalidRequestError(f"there is no step {step}: choose one of 0 … {last}")
    now, so_far = simulation.memory[step], simulation.memory[: step + 1]
    figure, panels = plt.subplot_mosaic(
        [["memory", "memory"], ["queue", "use"]], figsize=(9.5, 5.6), height_ratios=[2, 1], layout="constrained"
    )
    found = pieces(now.held, simulation.num_slots, scattered=now.use.external > 0)
    _draw_strip(panels["memory"], found, row_slots)
    panels["memory"].set(xlabel=f"slot (rows of {row_slots:,}, read like text)", ylabel="first slot of the row")
    times = [moment.end for moment in so_far]
    panels["queue"].step(times, [moment.waiting for moment in so_far], where="post", color=ORANGE)
    used = [100 * moment.use.tokens / simulation.num_slots for moment in so_far]
    panels["use"].step(times, used, where="post", color=BLUE)
    panels["queue"].set(ylabel="requests that wait", ylim=(0, max(moment.waiting for moment in simulation.memory) + 1))
    panels["use"].set(ylabel="tokens (%)", ylim=(0, 102))
    for name in ("queue", "use"):
        panels[name].set(xlim=(0, simulation.seconds), xlabel="time (s)")
        panels[name].spines[["top", "right"]].set_visible(False)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    lost = simulation.trace.steps[step].preempted
    figure.suptitle(
        f"“{policy}”, step {step:,} of {last:,}, at {now.end:.2f} s: {len(now.held)} run, {now.waiting} wait, "
        f"{used[-1]:.0f} % of the slots hold a token" + (f"; {', '.join(lost)} just lost its blocks" if lost else "")
    )
    return figure


def explore_memory(
    policy: MemoryPolicy,
    trace: Sequence[Arrival],
    step: int = 0,
    *,
    num_slots: int = EXPLORED_SLOTS,
    max_model_len: int = EXPLORED_CONTEXT,
) -> Explorer:
    """`plot_memory` of every step under every policy, to go through forth and back, or to play.

    Another policy is shown at the same time as the one before.

    Raises:
        InvalidRequestError: no such policy or step.
    """
    policies = choice("policy", MEMORY_POLICIES, policy)

    @cache
    def served(chosen: MemoryPolicy) -> MemorySimulation:
        return simulate_memory(chosen, trace, num_slots=num_slots, max_model_len=max_model_len)

    steps = Steps.to(len(served(policy).memory) - 1, step)
    shown = {"time": served(policy).memory[step].end}  # of the step that was chosen by hand

    def note_time(_: Any) -> None:
        shown["time"] = served(policies.value).memory[steps.slider.value].end

    def go_to_same_time(_: Any) -> None:
        memory = served(policies.value).memory
        steps.slider.unobserve(note_time, names="value")
        last = len(memory) - 1
        steps.set(last, next((n for n, now in enumerate(memory) if now.end >= shown["time"]), last))
        steps.slider.observe(note_time, names="value")

    # Before the explorer listens: it finds the step changed already.
    policies.observe(go_to_same_time, names="value")
    steps.slider.observe(note_time, names="value")

    def draw(policy: MemoryPolicy, step: int) -> Figure:
        return _draw_memory(policy, served(policy), step, max_model_len)

    return Explorer(
        (policies, steps.slider),
        draw,
        lambda policy, step: _describe(served(policy), step),
        rows=[policies, steps.row],
    )


def _describe(simulation: MemorySimulation, step: int) -> str:
    """Who runs and who waits."""
    now = simulation.trace.steps[step]
    return f"Running: {some(now.running) or 'nobody'}. Waiting: {some(now.waiting) or 'nobody'}."
