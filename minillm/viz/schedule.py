"""Who is computed when: seats of a batch, the timeline of a trace, one step with its queues, budget and blocks; the
explorer that walks from step to step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from minillm.engine.params import SamplingParams
from minillm.engine.scheduler import SchedulerConfig
from minillm.engine.trace import Trace, TracedPart, TracedStep
from minillm.errors import InvalidRequestError
from minillm.llm import LLM, Prompt
from minillm.viz.explorer import Explorer, Steps
from minillm.viz.style import BLUE, COLOURS, GREEN, GREY, LIGHT, ORANGE, RED, ink_on

BLOCKS_PER_ROW = 32
CHARACTER = 0.009
"""Share of a panel's width that a character on a bar takes."""

State = Literal["prompt", "next token", "again", "held", "waits", "loses"]


@dataclass(frozen=True)
class _Look:
    """How a state is told from the others."""

    label: str
    colour: str
    hatch: str


LOOKS: Mapping[State, _Look] = {
    "prompt": _Look("prompt (tokens)", BLUE, ""),
    "next token": _Look("one token: decode", GREEN, "///"),
    "again": _Look("computed again (tokens)", ORANGE, "\\\\\\"),
    "held": _Look("runs, but gets no share", "white", "..."),
    "waits": _Look("waits", LIGHT, ""),
    "loses": _Look("loses its blocks", RED, "xxx"),
}


@dataclass(frozen=True)
class Sitting:
    """A request's stay in a batch of fixed size: one step for each token that it writes."""

    seat: int
    start: int
    length: int


def seat_plan(outputs: Sequence[int], seats: int, *, continuous: bool) -> list[Sitting]:
    """Who sits where when requests, all there from the beginning, write so many tokens, first come, first seated.

    Args:
        outputs: tokens that each request writes; its prompt is computed in the step that gives the first of them.
        continuous: a seat that is free is taken at once; otherwise all wait until the longest of a batch has ended.

    Raises:
        InvalidRequestError: no seat, or a request that writes nothing.
    """
    if seats < 1 or not outputs or min(outputs) < 1:
        raise InvalidRequestError("a plan needs at least one seat, and requests that write at least one token each")
    plan: list[Sitting] = []
    free_from = [0] * seats
    for number, length in enumerate(outputs):
        if not continuous and number % seats == 0:
            free_from = [max(free_from)] * seats
        seat = min(range(seats), key=free_from.__getitem__)
        plan.append(Sitting(seat, free_from[seat], length))
        free_from[seat] += length
    return plan


def num_steps(plan: Sequence[Sitting]) -> int:
    """Steps until the last one has ended."""
    return max(one.start + one.length for one in plan)


def idle_seat_steps(plan: Sequence[Sitting]) -> int:
    """Seats times steps in which a seat's request had ended and nobody had taken its place."""
    seats = 1 + max(one.seat for one in plan)
    return seats * num_steps(plan) - sum(one.length for one in plan)


def plot_seats(plan: Sequence[Sitting], *, title: str = "") -> Figure:
    """One row a seat, one bar a request; what is hatched was paid for and not used."""
    seats, end = 1 + max(one.seat for one in plan), num_steps(plan)
    figure, axes = plt.subplots(figsize=(10, 0.32 * seats + 1.5), layout="constrained")
    axes.barh(range(seats), [end] * seats, 0.8, color="white", hatch="///", edgecolor=GREY, lw=0, label="idles")
    axes.barh(
        [one.seat for one in plan],
        [one.length for one in plan],
        0.8,
        [one.start for one in plan],
        color=[GREEN if number % 2 else BLUE for number in range(len(plan))],
        edgecolor="white",
    )
    for number, one in enumerate(plan):
        if one.length > 0.02 * end:
            place = (one.start + one.length / 2, one.seat)
            colour = ink_on(GREEN if number % 2 else BLUE)
            axes.text(*place, str(number), ha="center", va="center", fontsize=8, color=colour, fontweight="bold")
    axes.set(xlim=(0, end), xlabel=f"step ({end:,} in all)", ylabel="seat", title=title)
    axes.set_yticks(range(seats))
    axes.invert_yaxis()
    handles = [Patch(facecolor=BLUE, label="writes (its number; two colours by turns)"), axes.containers[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def request_states(trace: Trace) -> list[dict[str, State]]:
    """What each request that is there does in each step.

    "next token": its part is one token, after which another is chosen. "again": it had computed these tokens before
    and lost them. "held": it runs, and the budget was used up before it.
    """
    computed: dict[str, int] = {}  # how far each request has ever come
    found: list[dict[str, State]] = []
    for step in trace.steps:
        states: dict[str, State] = dict.fromkeys(step.running, "held")
        states |= dict.fromkeys(step.waiting, "waits")
        states |= dict.fromkeys(step.preempted, "loses")
        for part in step.parts:
            if part.start < computed.get(part.name, 0):
                states[part.name] = "again"
            else:
                states[part.name] = "next token" if part.count == 1 and part.samples else "prompt"
            computed[part.name] = max(computed.get(part.name, 0), part.start + part.count)
        found.append(states)
    return found


def token_times(trace: Trace) -> dict[str, list[float]]:
    """When each request's tokens were there, in seconds of the trace's clock."""
    times: dict[str, list[float]] = {}
    for step in trace.steps:
        for part in step.parts:
            if part.samples:
                times.setdefault(part.name, []).append(step.end)
    return times


def block_holders(trace: Trace, number: int) -> dict[int, list[str]]:
    """Which running requests hold each block in a step; one that had no share of it holds what it held before."""
    holders: dict[int, list[str]] = {}
    for name in _steps(trace)[number].running:
        for block in next(_earlier_blocks(trace, number, name), ()):
            holders.setdefault(block, []).append(name)
    return holders


def _earlier_blocks(trace: Trace, number: int, name: str) -> Iterator[tuple[int, ...]]:
    for step in reversed(trace.steps[: number + 1]):
        yield from (part.blocks for part in step.parts if part.name == name)


def plot_timeline(
    trace: Trace, *, x: Literal["step", "time"] = "step", mark: int | None = None, title: str = ""
) -> Figure:
    """A row a request, a bar a step.

    Args:
        x: steps are equally wide, or as wide as they took.
        mark: the number of a step to frame.

    Raises:
        InvalidRequestError: an empty trace, another `x`, or no such step.
    """
    rows = _names(trace)
    figure, axes = plt.subplots(figsize=(10, 0.34 * len(rows) + 1.6), layout="constrained")
    _draw_timeline(axes, trace, x, mark)
    axes.set_title(title)
    figure.legend(handles=_state_handles(trace), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return figure


def _draw_timeline(axes: Axes, trace: Trace, x: Literal["step", "time"], mark: int | None) -> None:
    if x not in ("step", "time"):
        raise InvalidRequestError(f"x is 'step' or 'time', not {x!r}")
    rows = {name: row for row, name in enumerate(_names(trace))}
    spans = _spans(trace, x)
    bars: dict[State, list[tuple[int, float, float]]] = {state: [] for state in LOOKS}
    for (begin, end), states in zip(spans, request_states(trace), strict=True):
        for name, state in states.items():
            bars[state].append((rows[name], begin, end - begin))
    thin = 0.3 if len(spans) > 60 else 0.8
    for state, look in LOOKS.items():
        if bars[state]:
            y, starts, widths = map(list, zip(*bars[state], strict=True))
            edge = GREY if look.colour == "white" else "white"
            axes.barh(y, widths, 0.8, starts, label=state, color=look.colour, hatch=look.hatch, edgecolor=edge, lw=thin)
    _label_bars(axes, trace, rows, spans)
    if mark is not None:
        left, right = spans[_existing(trace, mark)]
        axes.add_patch(Rectangle((left, -0.6), right - left, len(rows) + 0.2, fill=False, lw=2.5, zorder=3, gid="mark"))
    axes.set(xlim=(spans[0][0], spans[-1][1]), xlabel="step" if x == "step" else "time (ms)", ylabel="request")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.35, -0.65)
    axes.spines[["top", "right"]].set_visible(False)


def _label_bars(axes: Axes, trace: Trace, rows: Mapping[str, int], spans: Sequence[tuple[float, float]]) -> None:
    """How many tokens a piece of a prompt has, where there is room."""
    whole = spans[-1][1] - spans[0][0]
    for (left, right), step, states in zip(spans, trace.steps, request_states(trace), strict=True):
        for part in step.parts:
            state, label = states[part.name], f"{part.count:,}"
            if state == "next token" or not _fits(label, (right - left) / whole):
                continue
            # A number on a hatched bar needs a ground of its own.
            ground = {"facecolor": LOOKS[state].colour, "edgecolor": "none", "pad": 0.6}
            colour = ink_on(LOOKS[state].colour)
            place = ((left + right) / 2, rows[part.name])
            axes.text(*place, label, ha="center", va="center", fontsize=7.5, color=colour, bbox=ground, clip_on=True)


def _fits(label: str, share: float) -> bool:
    """Whether a bar that takes this share of a panel's width has room for a label."""
    return share >= CHARACTER * len(label)


def _spans(trace: Trace, x: Literal["step", "time"]) -> list[tuple[float, float]]:
    """From where to where each step is drawn: around its number, or milliseconds since the first."""
    if x == "step":
        return [(number - 0.5, number + 0.5) for number in range(len(trace.steps))]
    first = trace.steps[0].start
    return [(1000 * (step.start - first), 1000 * (step.end - first)) for step in trace.steps]


def _state_handles(trace: Trace) -> list[Patch]:
    """The legend, of the states that occur."""
    occur = {state for states in request_states(trace) for state in states.values()}
    return [
        Patch(
            facecolor=look.colour,
            hatch=look.hatch,
            edgecolor=GREY if look.colour in ("white", LIGHT) else "white",
            label=look.label,
        )
        for state, look in LOOKS.items()
        if state in occur
    ]


def _names(trace: Trace) -> list[str]:
    """All requests, in the order in which they are first seen."""
    steps = _steps(trace)
    return list(dict.fromkeys(name for step in steps for name in (*step.running, *step.preempted, *step.waiting)))


def _steps(trace: Trace) -> list[TracedStep]:
    if not trace.steps:
        raise InvalidRequestError("the trace is empty: make the engine with trace=True, and let it answer something")
    return trace.steps


def _existing(trace: Trace, number: int) -> int:
    if not 0 <= number < len(_steps(trace)):
        raise InvalidRequestError(f"the trace has steps 0 to {len(trace.steps) - 1}, not {number}")
    return number


def plot_flat_batch(counts: Mapping[str, int], *, title: str = "") -> Figure:
    """One step's tokens, `counts` of each request: as a padded rectangle, and as the flat row that the engine makes."""
    longest, total = max(counts.values()), sum(counts.values())
    figure, (padded, flat) = plt.subplots(
        2, 1, figsize=(10, 0.34 * len(counts) + 2.1), height_ratios=(len(counts), 1), layout="constrained"
    )
    start = 0
    for row, (name, count) in enumerate(counts.items()):
        for place in range(longest):
            real = place < count
            look = _tint(row) if real else {"facecolor": "white", "hatch": "///", "edgecolor": GREY}
            padded.add_patch(Rectangle((place, row), 1, 1, **look))
        for place in range(start, start + count):
            flat.add_patch(Rectangle((place, 0), 1, 1, **_tint(row)))
            flat.text(place + 0.5, 0.5, name, ha="center", va="center", fontsize=9)
        start += count
    padded.set(xlim=(0, max(longest, total)), ylim=(len(counts), 0))
    padded.set_yticks([row + 0.5 for row in range(len(counts))], list(counts))
    padding = len(counts) * longest - total
    padded.set_title(f"padded: {padding + total} places, {padding} of them padding (hatched)", loc="left", fontsize=10)
    flat.set(xlim=(0, max(longest, total)), ylim=(1, 0), yticks=[], xlabel="row of the batch")
    flat.set_title(f"flat: {total} places", loc="left", fontsize=10)
    for panel in (padded, flat):
        panel.spines[["top", "right", "left", "bottom"]].set_visible(False)
    padded.tick_params(bottom=False, labelbottom=False, left=False)
    figure.suptitle(title)
    return figure


def plot_token_gaps(traces: Mapping[str, Trace], newcomer: str, *, title: str = "") -> Figure:
    """How long each token of the others came after the one before, while `newcomer`'s prompt is computed.

    Args:
        traces: a panel each, by name.
        newcomer: a request; the stretch from its first share of a step to its first token is shaded.

    Raises:
        InvalidRequestError: a trace in which the newcomer gets no token.
    """
    count = len(traces)
    figure, panels = plt.subplots(
        1, count, figsize=(5 * count, 3.4), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for panel, (label, trace) in zip(panels[0], traces.items(), strict=True):
        times = token_times(trace)
        if newcomer not in times:
            raise InvalidRequestError(f"request {newcomer!r} gets no token in the trace {label!r}")
        longest = 0.0
        for name in sorted(times.keys() - {newcomer}):
            gaps = [1000 * (after - before) for before, after in pairwise(times[name])]
            panel.plot(times[name][1:], gaps, "o", markersize=3, color=BLUE, label=name)
            longest = max([longest, *gaps])
        begins = next(step.start for step in trace.steps if any(part.name == newcomer for part in step.parts))
        panel.axvspan(begins, times[newcomer][0], color=ORANGE, alpha=0.35, lw=0)
        panel.set(xlabel="time (s)", ylim=(0, None))
        panel.set_title(f"{label}: longest wait {longest:.0f} ms", fontsize=11)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("since the token before (ms)")
    handles = [
        Line2D([], [], marker="o", linestyle="", color=BLUE, markersize=4, label="a token of a running request"),
        Patch(facecolor=ORANGE, alpha=0.35, label="the long prompt is computed"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    return figure


def plot_schedule(trace: Trace, number: int, config: SchedulerConfig, *, title: str = "") -> Figure:
    """One step: both queues, the budget by request, who holds which block; below, the timeline with the step framed.

    Args:
        number: of the step, from 0.
        config: of the scheduler that made the trace: how many seats and tokens a step has.

    Raises:
        InvalidRequestError: an empty trace, or no such step.
    """
    step = _steps(trace)[_existing(trace, number)]
    rows = {name: row for row, name in enumerate(_names(trace))}
    block_rows = -(-_num_shown_blocks(trace) // BLOCKS_PER_ROW)
    heights = (0.95, 0.5, 0.34 * block_rows + 0.1, 0.25 * len(rows) + 0.3)
    figure, panels = plt.subplots(4, 1, figsize=(10, sum(heights) + 2.9), height_ratios=heights, layout="constrained")
    queues, budget, blocks, timeline = panels
    _draw_queues(queues, trace, number, config, rows)
    _draw_budget(budget, step.parts, config.max_num_batched_tokens, rows)
    _draw_blocks(blocks, trace, number, rows)
    _draw_timeline(timeline, trace, "step", number)
    figure.legend(handles=_state_handles(trace), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.suptitle(title or f"Step {number}")
    return figure


def _draw_queues(axes: Axes, trace: Trace, number: int, config: SchedulerConfig, rows: Mapping[str, int]) -> None:
    step = trace.steps[number]
    seats = min(config.max_num_seqs, len(rows))
    width = max(seats, len(rows), 8)
    served = {part.name for part in step.parts}
    for seat in range(seats):
        axes.add_patch(Rectangle((seat, 0), 0.92, 0.8, fill=False, edgecolor=GREY, linestyle=":"))
    for y, queue in enumerate((step.running, step.waiting)):
        for place, name in enumerate(queue):
            hatch = "xxx" if name in step.preempted else "..." if name in step.running and name not in served else ""
            axes.add_patch(Rectangle((place, y), 0.92, 0.8, **_tint(rows[name]), hatch=hatch, gid=f"queue {y}"))
            _name(axes, place + 0.46, y + 0.4, name, 10)
    axes.set(xlim=(-0.05, width), ylim=(1.9, -0.1), xticks=[])
    free = config.max_num_seqs - len(step.running)
    axes.set_yticks([0.4, 1.4], [f"running, oldest first\n(free seats: {free})", "waiting, next first"])
    axes.tick_params(left=False)
    lost = f"; request {', '.join(step.preempted)} just lost its blocks (xxx)" if step.preempted else ""
    axes.set_title(f"{len(step.running)} running, {len(step.waiting)} waiting{lost}", loc="left", fontsize=10)
    axes.spines[:].set_visible(False)


def _draw_budget(axes: Axes, parts: Sequence[TracedPart], budget: int, rows: Mapping[str, int]) -> None:
    left = 0
    for part in parts:
        axes.barh([0], [part.count], 0.8, [left], **_tint(rows[part.name]))
        labels = (f"{part.name}: {part.count:,}", part.name, "")
        label = next(label for label in labels if _fits(label, part.count / budget))
        axes.text(left + part.count / 2, 0, label, ha="center", va="center", fontsize=9)
        left += part.count
    axes.set(xlim=(0, budget), yticks=[], xlabel="tokens")
    axes.set_ylabel("this step", rotation=0, ha="right", va="center")
    axes.set_title(f"{left:,} tokens of a budget of {budget:,}  (request: tokens)", loc="left", fontsize=10)
    axes.spines[["top", "left"]].set_visible(False)


def _draw_blocks(axes: Axes, trace: Trace, number: int, rows: Mapping[str, int]) -> None:
    step, holders, shown = trace.steps[number], block_holders(trace, number), _num_shown_blocks(trace)
    for block in range(shown):
        y, x = divmod(block, BLOCKS_PER_ROW)
        names = holders.get(block, [])
        look: dict[str, Any] = _tint(rows[names[0]]) if names else {"facecolor": "white", "edgecolor": GREY}
        if step.ref_counts[block] and not names:
            look["facecolor"] = LIGHT
        shared = step.ref_counts[block] > 1
        axes.add_patch(Rectangle((x, y), 0.95, 0.9, **look, hatch="///" if shared else "", gid=f"block {block}"))
        if names:
            _name(axes, x + 0.47, y + 0.45, names[0] + ("+" if shared else ""), 8)
    held = sum(count > 0 for count in step.ref_counts)
    columns = min(shown, BLOCKS_PER_ROW)
    axes.set(xlim=(-0.05, columns), ylim=(-(-shown // BLOCKS_PER_ROW), -0.1), yticks=[])
    axes.set_xticks([block + 0.47 for block in range(columns)], [str(block) for block in range(columns)], fontsize=7)
    axes.tick_params(length=0)
    axes.set_ylabel("blocks", rotation=0, ha="right", va="center")
    axes.set_xlabel("block" if shown <= BLOCKS_PER_ROW else f"block, in rows of {BLOCKS_PER_ROW}")
    unused = "" if shown == len(step.ref_counts) else f"; {len(step.ref_counts) - shown:,} never used are not drawn"
    said = f"{held} of {len(step.ref_counts):,} blocks held (by whom), {step.num_cached_blocks} can be found by content"
    axes.set_title(said + unused, loc="left", fontsize=10)
    axes.spines[:].set_visible(False)


def _num_shown_blocks(trace: Trace) -> int:
    """Up to the last block that is ever held."""
    held = [block for step in _steps(trace) for block, count in enumerate(step.ref_counts) if count]
    return 1 + max(held, default=0)


def _tint(row: int) -> dict[str, Any]:
    """A request's own light colour; its name stands beside or on it."""
    red, green, blue = (int(COLOURS[row % len(COLOURS)][at : at + 2], 16) for at in (1, 3, 5))
    lighter = tuple((255 - 0.45 * (255 - channel)) / 255 for channel in (red, green, blue))
    return {"facecolor": lighter, "edgecolor": "white"}


def _name(axes: Axes, x: float, y: float, name: str, size: int) -> None:
    axes.text(x, y, name, ha="center", va="center", fontsize=size, clip_on=True)


def explore_schedule(
    llm: LLM,
    prompts: Prompt | Sequence[Prompt],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
) -> Explorer:
    """`plot_schedule` of the steps in which `llm` answers `prompts`, to go through forth and back, or to play.

    The answers are computed at once; `llm` is free afterwards.

    Raises:
        InvalidRequestError: what `LLM.generate` refuses.
    """
    trace = _trace_of(llm, prompts, sampling_params)
    config = llm.engine.scheduler.config
    steps = Steps.to(len(trace.steps) - 1)
    return Explorer(
        [steps.slider],
        lambda number: plot_schedule(trace, number, config),
        lambda number: describe_step(trace, number),
        rows=[steps.row],
    )


def _trace_of(
    llm: LLM, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
) -> Trace:
    """The steps in which these prompts are answered; they are in the LLM's own trace too, where it keeps one."""
    trace = Trace() if llm.trace is None else llm.trace
    before = len(trace.steps)
    llm.engine.trace = trace
    try:
        llm.generate(prompts, sampling_params)
    finally:
        llm.engine.trace = llm.trace
    return Trace(trace.steps[before:])


def describe_step(trace: Trace, number: int) -> str:
    """What a step did for whom, in words.

    Raises:
        InvalidRequestError: an empty trace, or no such step.
    """
    step = _steps(trace)[_existing(trace, number)]
    states = request_states(trace)[number]
    counts = {part.name: part.count for part in step.parts}
    said = []
    for state, look in LOOKS.items():
        names = [name for name, its in states.items() if its == state]
        tokens = sum(counts.get(name, 0) for name in names)
        if names:
            said.append(f"{look.label.removesuffix(' (tokens)')}: {', '.join(names)}" + (f" ({tokens})" * bool(tokens)))
    return f"Step {number}, {sum(counts.values())} tokens. " + "; ".join(said) + "."
