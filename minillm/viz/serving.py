"""What happens in a server: the way of a request, a queue and who waits in it, histograms of metrics, latency under
load; the explorer of a queue."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import ipywidgets as widgets  # type: ignore[import-untyped]
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minillm.engine.trace import Trace
from minillm.errors import InvalidRequestError
from minillm.viz.explorer import Explorer, slider
from minillm.viz.schedule import block_holders
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
    arrow,
    box,
    ink,
)

HATCHES = ("", "///", "...", "xxx", "\\\\\\")

# --- the way of a request

LANES = ("client A", "client B", "event loop\n(one thread)", "inbox", "engine's thread")
CLIENTS = (BLUE, ORANGE)


def plot_request_way() -> Figure:
    """Two clients' requests on their way through the server, as time goes: event loop, inbox, engine, and back."""
    figure, axes = plt.subplots(figsize=(10, 4.8), layout="constrained")
    for row, name in enumerate(LANES):
        axes.axhline(row, color=LIGHT, linewidth=14 if row != 3 else 4, zorder=0, solid_capstyle="butt")
        axes.text(-0.35, row, name, ha="right", va="center", fontsize=10)
    _draw_coming(axes, 0.2, CLIENTS[0], client=0, step=1.6)
    _draw_coming(axes, 4.25, CLIENTS[1], client=1, step=5.4)
    for number, (start, shares) in enumerate(((1.6, "A"), (3.5, "A"), (5.4, "AB"), (7.3, "AB"))):
        _draw_step(axes, start, number, shares)
    axes.text(0.7, 4.42, "sleeps until\nsomething comes", ha="center", va="top", fontsize=8.5, color="#555555")
    axes.set(xlim=(-1.9, 10.6), ylim=(5.05, -0.75))
    axes.annotate("time", (10.2, 4.9), (9.2, 4.9), va="center", fontsize=9, arrowprops={"arrowstyle": "->"})
    axes.set_axis_off()
    return figure


def _draw_coming(axes: Axes, x: float, colour: str, *, client: int, step: float) -> None:
    """A request from its client to the inbox, and from there into a step."""
    arrow(axes, (x, client), (x + 0.22, 2), colour)
    axes.text(x, client - 0.28, "POST", ha="center", fontsize=9, color=ink(colour), fontweight="bold")
    box(axes, (x + 0.22, 1.72), (0.62, 0.56), "checked,\ntokens", colour, fontsize=7.5)
    arrow(axes, (x + 0.84, 2), (x + 0.92, 3), colour)
    axes.plot([x + 0.92, step], [3, 3], color=colour, linewidth=4, solid_capstyle="butt")
    arrow(axes, (step, 3), (step + 0.06, 4), colour)


def _draw_step(axes: Axes, start: float, number: int, shares: str) -> None:
    """A step, and its tokens' way to the clients that they are for."""
    width = 1.75
    axes.barh([4], [width], 0.62, [start], color="white", edgecolor="black", linewidth=1)
    for place, name in enumerate(shares):
        height = 0.62 / len(shares)
        y = 4 - 0.31 + height * (place + 0.5)
        colour = CLIENTS["AB".index(name)]
        axes.barh([y], [width], height, [start], color=colour, alpha=0.3, hatch=HATCHES["AB".index(name)])
    axes.text(start + width / 2, 4.5, f"step {number}: {' and '.join(shares)}", ha="center", va="center", fontsize=9)
    end = start + width
    for place, name in enumerate(shares):
        client = "AB".index(name)
        x = end + 0.12 + 0.42 * place
        arrow(axes, (end, 4), (x, 2), CLIENTS[client])
        box(axes, (x, 1.72), (0.32, 0.56), "put", CLIENTS[client], fontsize=7.5)
        arrow(axes, (x + 0.32, 2), (x + 0.5, client), CLIENTS[client])
        axes.text(
            x + 0.5, client - 0.28, "data:", ha="center", fontsize=9, color=ink(CLIENTS[client]), family="monospace"
        )


# --- what the engine did for whom


def numbered(trace: Trace) -> Trace:
    """The same steps, the requests called 0, 1, 2, … as they come: a server's own names are long and random."""
    names: dict[str, str] = {}

    def number(name: str) -> str:
        return names.setdefault(name, str(len(names)))

    return Trace(
        [
            replace(
                step,
                running=tuple(map(number, step.running)),
                preempted=tuple(map(number, step.preempted)),
                waiting=tuple(map(number, step.waiting)),
                parts=tuple(replace(part, name=number(part.name)) for part in step.parts),
            )
            for step in trace.steps
        ]
    )


def held_blocks(trace: Trace) -> dict[str, list[int]]:
    """Request → how many blocks it holds after each step; none before it comes and after it has gone.

    Raises:
        InvalidRequestError: an empty trace.
    """
    if not trace.steps:
        raise InvalidRequestError("the trace is empty: make the engine with trace=True, and let it answer something")
    names = dict.fromkeys(part.name for step in trace.steps for part in step.parts)
    counts = {name: [0] * len(trace.steps) for name in names}
    for number in range(len(trace.steps)):
        for holders in block_holders(trace, number).values():
            for name in holders:
                counts[name][number] += 1
    return counts


def plot_held_blocks(trace: Trace, *, title: str = "") -> Figure:
    """The blocks that each request holds, stacked, step by step.

    Raises:
        InvalidRequestError: an empty trace.
    """
    counts = held_blocks(trace)
    figure, axes = plt.subplots(figsize=(10, 3.2), layout="constrained")
    steps = range(len(trace.steps))
    areas = axes.stackplot(
        steps,
        list(counts.values()),
        labels=[f"request {name}" for name in counts],
        colors=[COLOURS[row % len(COLOURS)] for row in range(len(counts))],
        step="mid",
    )
    for row, area in enumerate(areas):
        area.set(hatch=HATCHES[row % len(HATCHES)], edgecolor="white", linewidth=0)
    axes.set(xlabel="step", ylabel="blocks held", xlim=(0, len(trace.steps) - 1), ylim=(0, None), title=title)
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


# --- a queue


def starts_in_order(arrivals: Sequence[float], service: float, seats: int = 1) -> list[float]:
    """When each request's turn comes, first come, first served; each keeps a seat for `service` seconds.

    Raises:
        InvalidRequestError: no seat, or arrivals that are not in order.
    """
    if seats < 1 or any(after < before for before, after in pairwise(arrivals)):
        raise InvalidRequestError("a queue needs at least one seat, and arrivals in the order of time")
    free_from = [0.0] * seats
    starts = []
    for arrival in arrivals:
        starts.append(max(arrival, heapq.heappop(free_from)))
        heapq.heappush(free_from, starts[-1] + service)
    return starts


def mean_wait(utilisation: float, service: float) -> float:
    """Mean seconds in the queue of M/D/1: Poisson arrivals, equal service times, one seat (Pollaczek and Khinchine).

    Args:
        utilisation: the share of the time in which the seat is taken: requests a second × service.

    Raises:
        InvalidRequestError: a utilisation for which there is no mean.
    """
    if not 0 <= utilisation < 1:
        raise InvalidRequestError(f"at a utilisation of {utilisation} no queue has a mean: take one below 1")
    return utilisation * service / (2 * (1 - utilisation))


def plot_queue(arrivals: Sequence[float], service: float, *, title: str = "") -> Figure:
    """Who waits and who is served in a queue with one seat, and how many are there; both areas are the same seconds.

    Args:
        arrivals: seconds, in order.
        service: seconds that each request takes once its turn has come.

    Raises:
        InvalidRequestError: arrivals that are not in order.
    """
    starts = starts_in_order(arrivals, service)
    waits = [start - arrival for start, arrival in zip(starts, arrivals, strict=True)]
    end = starts[-1] + service
    figure, (rows, count) = plt.subplots(
        2, 1, figsize=(10, 4.6), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    numbers = range(len(arrivals))
    rows.barh(numbers, waits, 0.8, arrivals, color=LIGHT, edgecolor=GREY, hatch="////", lw=0, label="waits")
    rows.barh(numbers, [service] * len(starts), 0.8, starts, color=BLUE, label="is served")
    rows.set(ylabel="request", title=title, ylim=(len(arrivals), -1))
    rows.legend(frameon=False, loc="lower left")
    times, present = _present(arrivals, [start + service for start in starts])
    mean = sum(waits + [service] * len(starts)) / end
    count.fill_between(times, present, step="post", color=ORANGE, alpha=0.5)
    count.axhline(mean, color="black", linestyle="--", label=f"mean {mean:.2f}")
    count.set(xlabel="time (s)", ylabel="in the system", xlim=(0, end), ylim=(0, None))
    count.legend(frameon=False, loc="upper left")
    for panel in (rows, count):
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def _present(arrivals: Sequence[float], ends: Sequence[float]) -> tuple[list[float], list[int]]:
    """From when on how many are there."""
    changes = sorted([*((time, 1) for time in arrivals), *((time, -1) for time in ends)])
    times = [time for time, _ in changes]
    return [0.0, *times], [0, *accumulate(change for _, change in changes)]


def random_arrivals(num: int, rate: float, seed: int) -> list[float]:
    """Times of `num` requests that know nothing of each other: a Poisson process, stretched to `rate` exactly."""
    rng = random.Random(seed)
    times = list(accumulate(rng.expovariate(1) for _ in range(num)))
    return [time * num / (rate * times[-1]) for time in times]


def plot_utilisation(utilisation: float, *, even: bool = False, num: int = 40, seed: int = 2) -> Figure:
    """`plot_queue` for requests of one second each that come at random, or evenly spaced, with this utilisation."""
    arrivals = [number / utilisation for number in range(num)] if even else random_arrivals(num, utilisation, seed)
    starts = starts_in_order(arrivals, 1.0)
    mean = sum(start - arrival for start, arrival in zip(starts, arrivals, strict=True)) / num
    how = "evenly spaced" if even else "at random"
    return plot_queue(
        arrivals, 1.0, title=f"Utilisation {utilisation:.0%}, {how}: the mean wait is {mean:.1f} service times"
    )


def explore_queue() -> Explorer:
    """`plot_utilisation` with controls; needs a running kernel to move."""
    even = widgets.Checkbox(False, description="evenly spaced", indent=False)
    controls = (slider("utilisation", 0.8, 0.1, 1.3, 0.1), slider("seed", 2, 0, 20), even)
    return Explorer(controls, lambda utilisation, seed, even: plot_utilisation(utilisation, even=even, seed=seed))


# --- metrics and load


def plot_histogram(buckets: Mapping[float, float], marks: Mapping[str, float], *, unit: str, title: str = "") -> Figure:
    """A histogram as Prometheus reads it: equally wide bars of unequal buckets, and marks where values fall.

    Args:
        buckets: upper edge → how many values lie at or below it, edges rising, the last one infinite.
        marks: name → value.

    Raises:
        InvalidRequestError: edges that do not rise to infinity.
    """
    edges, counts = list(buckets), list(buckets.values())
    if not edges or sorted(edges) != edges or edges[-1] != math.inf:
        raise InvalidRequestError("the edges of a histogram's buckets rise, and the last one is infinite")
    heights = [count - before for count, before in zip(counts, [0, *counts], strict=False)]
    figure, axes = plt.subplots(figsize=(10, 3.2), layout="constrained")
    bars = axes.bar(range(len(edges)), heights, 0.92, color=BLUE, alpha=0.75)
    plain = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # a mark may run behind the number
    axes.bar_label(bars, [f"{height:,.0f}" if height else "" for height in heights], fontsize=9, padding=2, bbox=plain)
    for row, (name, value) in enumerate(marks.items()):
        axes.axvline(_place(edges, value), color=COLOURS[1 + row % 5], linestyle=LINE_STYLES[row % 4], label=name)
    axes.set_xticks(
        [place + 0.5 for place in range(len(edges))],
        ["∞" if edge == math.inf else f"{edge:g}" for edge in edges],
        fontsize=8,
    )
    axes.set(xlabel=f"upper edge of the bucket ({unit})", ylabel="values", title=title)
    axes.margins(y=0.12)
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _place(edges: Sequence[float], value: float) -> float:
    """Where a value lies among bars of equal width: as far into its bucket's bar as into the bucket."""
    number = next(place for place, edge in enumerate(edges) if value <= edge)
    low, high = (edges[number - 1] if number else 0.0), edges[number]
    share = 0.5 if high == math.inf else (value - low) / (high - low)
    return number - 0.5 + share


def plot_gauges(seconds: Sequence[float], gauges: Mapping[str, Sequence[float]], *, title: str = "") -> Figure:
    """A panel for each gauge, one below the other, over the same time."""
    count = len(gauges)
    figure, panels = plt.subplots(
        count, 1, figsize=(10, 1.35 * count + 0.9), sharex=True, squeeze=False, layout="constrained"
    )
    for row, (panel, (name, values)) in enumerate(zip(panels[:, 0], gauges.items(), strict=True)):
        colour = COLOURS[row % len(COLOURS)]
        panel.fill_between(seconds, values, step="post", color=colour, alpha=0.35)
        panel.step(seconds, values, where="post", color=colour)
        panel.set(ylim=(0, None))
        panel.set_title(name, loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set(xlabel="time (s)", xlim=(seconds[0], seconds[-1]))
    figure.suptitle(title)
    return figure


def plot_load(
    rates: Sequence[float],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    capacity: float,
    title: str = "",
) -> Figure:
    """Latencies against the rate at which requests come; the stretch beyond the capacity is shaded.

    Args:
        rates: requests a second.
        panels: what is measured → name of a curve → a value for each rate; the same names in each.
        capacity: requests a second that can be answered.
    """
    figure, drawn = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False, layout="constrained")
    for axes, (name, curves) in zip(drawn[0], panels.items(), strict=True):
        for row, (label, values) in enumerate(curves.items()):
            colour = (BLUE, RED, GREEN, PURPLE)[row % 4]
            style, marker = LINE_STYLES[row % len(LINE_STYLES)], MARKERS[row % len(MARKERS)]
            axes.plot(rates, values, style, marker=marker, markersize=5, linewidth=2, color=colour, label=label)
        right = 1.04 * max(*rates, capacity)
        axes.axvspan(capacity, right, color=LIGHT, zorder=0)
        axes.set(xlabel="requests a second", ylabel=name, xlim=(0, right), ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    handles, _ = drawn[0, 0].get_legend_handles_labels()
    handles.append(Patch(color=LIGHT, label="more than can be answered"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(title)
    return figure
