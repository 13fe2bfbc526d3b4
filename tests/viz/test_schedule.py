"""Figures of the schedule draw what traces say, counted here otherwise; the explorer obeys its slider."""

from __future__ import annotations

from itertools import pairwise

import ipywidgets
import matplotlib.pyplot as plt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from minillm import LLM, SamplingParams
from minillm.engine.scheduler import SchedulerConfig
from minillm.engine.trace import Trace, TracedPart, TracedStep
from minillm.errors import InvalidRequestError
from minillm.simulate.simulator import simulate
from minillm.simulate.trace import Arrival
from minillm.viz import (
    block_holders,
    explore_schedule,
    idle_seat_steps,
    num_steps,
    plot_flat_batch,
    plot_schedule,
    plot_seats,
    plot_timeline,
    plot_token_gaps,
    request_states,
    seat_plan,
    token_times,
)
from minillm.viz.schedule import LOOKS

PNG = b"\x89PNG"
CONFIG = SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=8, max_model_len=64)


def part(name, start, count, samples, *blocks):
    return TracedPart(name, start, count, samples, blocks)


def step(number, parts, running, waiting="", preempted="", counts=(), cached=0):
    """One of 10 ms + 1 ms for each token."""
    start = 5.0 + 0.1 * number
    end = start + 0.01 + 0.001 * sum(one.count for one in parts)
    return TracedStep(start, end, tuple(parts), tuple(waiting), tuple(running), tuple(preempted), tuple(counts), cached)


@pytest.fixture
def by_hand():
    """Blocks of 4. `a` writes, `b` comes in two chunks, `c` waits; `b` loses its blocks, comes back in two chunks."""
    steps = [
        step(0, [part("a", 0, 3, True, 0), part("b", 0, 5, False, 1, 2)], "ab", "c", counts=(1, 1, 1, 0, 0)),
        step(1, [part("a", 3, 1, True, 0), part("b", 5, 1, True, 1, 2)], "ab", "c", counts=(1, 1, 1, 0, 0)),
        step(2, [part("a", 4, 1, True, 0, 3)], "a", "bc", "b", counts=(1, 0, 0, 1, 0), cached=2),
        step(3, [part("b", 0, 4, False, 1)], "ab", "c", counts=(1, 1, 0, 1, 0)),
        step(4, [part("b", 4, 3, True, 1, 2), part("c", 0, 5, True, 1, 4)], "bc", counts=(0, 2, 1, 0, 1)),
    ]
    return Trace(steps)


def arrivals(outputs):
    return [Arrival(0.0, 3 + number, count) for number, count in enumerate(outputs)]


# --- seats


def test_a_plan_by_hand():
    outputs = [3, 1, 2, 4, 1]
    static = [(one.seat, one.start, one.length) for one in seat_plan(outputs, 2, continuous=False)]
    assert static == [(0, 0, 3), (1, 0, 1), (0, 3, 2), (1, 3, 4), (0, 7, 1)]
    continuous = [(one.seat, one.start, one.length) for one in seat_plan(outputs, 2, continuous=True)]
    assert continuous == [(0, 0, 3), (1, 0, 1), (1, 1, 2), (0, 3, 4), (1, 3, 1)]
    assert idle_seat_steps(seat_plan(outputs, 2, continuous=False)) == 2 + 2 + 1
    assert idle_seat_steps(seat_plan(outputs, 2, continuous=True)) == 3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 4))
def test_a_continuous_plan_is_what_the_scheduler_does(outputs, seats):
    result = simulate(arrivals(outputs), num_blocks=100, max_num_seqs=seats, max_num_batched_tokens=1000)
    assert num_steps(seat_plan(outputs, seats, continuous=True)) == len(result.trace.steps)


def test_seats_are_drawn_as_planned():
    plan = seat_plan([3, 1, 2, 4, 1], 2, continuous=False)
    axes = plot_seats(plan, title="t").axes[0]
    idle, used = axes.containers
    assert [bar.get_width() for bar in idle] == [8, 8]
    assert [bar.get_hatch() for bar in idle] == ["///"] * 2
    drawn = [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width()) for bar in used]
    assert drawn == [pytest.approx((one.seat, one.start, one.length)) for one in plan]
    assert [text.get_text() for text in axes.texts] == ["0", "1", "2", "3", "4"]
    assert (axes.get_title(), axes.get_xlim()) == ("t", (0, 8))


@pytest.mark.parametrize(("outputs", "seats"), [([], 2), ([3, 0], 2), ([3], 0)])
def test_no_plan_without_seats_or_tokens(outputs, seats):
    with pytest.raises(InvalidRequestError, match="at least one"):
        seat_plan(outputs, seats, continuous=True)


# --- what a trace says


def test_states_by_hand(by_hand):
    assert request_states(by_hand) == [
        {"a": "prompt", "b": "prompt", "c": "waits"},
        {"a": "next token", "b": "next token", "c": "waits"},
        {"a": "next token", "b": "loses", "c": "waits"},
        {"a": "held", "b": "again", "c": "waits"},
        {"b": "again", "c": "prompt"},
    ]


def test_states_of_the_engine_add_up():
    result = simulate(arrivals([9, 30, 4, 20, 12]), num_blocks=12, block_size=4, max_num_seqs=3)
    states = request_states(result.trace)
    lost = sum(state == "loses" for one in states for state in one.values())
    assert lost == sum(metrics.num_preemptions for metrics in result.metrics) > 0
    for taken, one in zip(result.trace.steps, states, strict=True):
        shares = {name for name, state in one.items() if state in ("prompt", "next token", "again")}
        assert shares == {part.name for part in taken.parts}
        assert {name for name, state in one.items() if state in ("waits", "loses")} == set(taken.waiting)


def test_times_of_tokens(by_hand):
    times = token_times(by_hand)
    assert times["a"] == pytest.approx([5.018, 5.112, 5.211])
    assert times["b"] == pytest.approx([5.112, 5.418])
    result = simulate(arrivals([9, 3]), num_blocks=12)
    for name, metrics in enumerate(result.metrics):
        there = token_times(result.trace)[str(name)]
        assert (there[0], there[-1]) == (metrics.first_token_time, metrics.finished_time)


def test_holders_of_blocks(by_hand):
    assert block_holders(by_hand, 0) == {0: ["a"], 1: ["b"], 2: ["b"]}
    assert block_holders(by_hand, 2) == {0: ["a"], 3: ["a"]}
    assert block_holders(by_hand, 3) == {0: ["a"], 3: ["a"], 1: ["b"]}, "a had no share, and holds what it held"
    assert block_holders(by_hand, 4) == {1: ["b", "c"], 2: ["b"], 4: ["c"]}


# --- timeline


def drawn_states(axes):
    """State → the (row, step) of its bars, with the looks checked on the way."""
    found = {}
    for container in axes.containers:
        state = container.get_label()
        for bar in container:
            look = LOOKS[state]
            assert to_hex(bar.get_facecolor()) == to_hex(look.colour)
            assert (bar.get_hatch() or "") == look.hatch
            place = round(bar.get_y() + bar.get_height() / 2), round(bar.get_x() + bar.get_width() / 2)
            found.setdefault(state, set()).add(place)
    return found


def test_a_bar_for_each_state(by_hand):
    axes = plot_timeline(by_hand, title="t").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert drawn_states(axes) == {
        "prompt": {(0, 0), (1, 0), (2, 4)},
        "next token": {(0, 1), (1, 1), (0, 2)},
        "again": {(1, 3), (1, 4)},
        "held": {(0, 3)},
        "waits": {(2, 0), (2, 1), (2, 2), (2, 3)},
        "loses": {(1, 2)},
    }
    assert sorted(text.get_text() for text in axes.texts) == ["3", "3", "4", "5", "5"]
    (legend,) = axes.figure.legends
    assert len(legend.get_texts()) == len(LOOKS)


def test_looks_differ_in_more_than_colour():
    assert len({(look.hatch, look.colour in ("white", LOOKS["waits"].colour)) for look in LOOKS.values()}) >= 5
    assert len({look.colour for look in LOOKS.values()}) == len(LOOKS)


def test_time_on_the_axis(by_hand):
    axes = plot_timeline(by_hand, x="time").axes[0]
    bars = [bar for container in axes.containers for bar in container]
    widths = {round(bar.get_x()): bar.get_width() for bar in bars}
    assert sorted(widths) == [0, 100, 200, 300, 400]
    assert [widths[x] for x in sorted(widths)] == pytest.approx([18, 12, 11, 14, 18])
    assert "ms" in axes.get_xlabel()


def test_a_step_is_framed(by_hand):
    axes = plot_timeline(by_hand, mark=3).axes[0]
    (frame,) = (patch for patch in axes.patches if patch.get_gid() == "mark")
    assert (frame.get_x(), frame.get_width()) == (2.5, 1)


def test_numbers_only_where_there_is_room():
    long = simulate([Arrival(0.0, 600, 3), Arrival(0.0, 700, 200)], num_blocks=100).trace
    assert not plot_timeline(long).axes[0].texts
    short = simulate([Arrival(0.0, 1600, 3)], num_blocks=200).trace
    assert [text.get_text() for text in plot_timeline(short).axes[0].texts] == ["1,600"]


def test_what_cannot_be_drawn(by_hand):
    for draw in (plot_timeline, lambda trace: plot_schedule(trace, 0, CONFIG)):
        with pytest.raises(InvalidRequestError, match="trace=True"):
            draw(Trace())
    for number in (-1, 5):
        with pytest.raises(InvalidRequestError, match=f"0 to 4, not {number}"):
            plot_schedule(by_hand, number, CONFIG)
        with pytest.raises(InvalidRequestError, match=f"0 to 4, not {number}"):
            plot_timeline(by_hand, mark=number)
    with pytest.raises(InvalidRequestError, match="'hours'"):
        plot_timeline(by_hand, x="hours")


# --- the flat batch, and waits between tokens


def test_the_flat_batch():
    padded, flat = plot_flat_batch({"a": 1, "b": 1, "c": 4}).axes
    assert sum(patch.get_hatch() == "///" for patch in padded.patches) == 6
    assert len(padded.patches) == 12
    assert [text.get_text() for text in flat.texts] == list("abcccc")
    assert "12 places, 6" in padded.get_title(loc="left")
    assert "6 places" in flat.get_title(loc="left")


def test_waits_between_tokens():
    trace = simulate([*arrivals([12, 12]), Arrival(0.01, 900, 4)], num_blocks=200).trace
    (axes,) = plot_token_gaps({"whole": trace}, "2").axes
    times = token_times(trace)
    assert [line.get_label() for line in axes.lines] == ["0", "1"]
    for line in axes.lines:
        there = times[line.get_label()]
        assert list(line.get_xdata()) == there[1:]
        assert list(line.get_ydata()) == pytest.approx([1000 * (b - a) for a, b in pairwise(there)])
    (shade,) = axes.patches
    first = next(taken.start for taken in trace.steps if any(one.name == "2" for one in taken.parts))
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == pytest.approx((first, times["2"][0]))
    longest = max(max(line.get_ydata()) for line in axes.lines)
    assert longest > 900 * 0.04
    assert axes.get_title() == f"whole: longest wait {longest:.0f} ms"
    with pytest.raises(InvalidRequestError, match="'7'"):
        plot_token_gaps({"whole": trace}, "7")


# --- one step


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_one_step_by_hand(by_hand):
    queues, budget, blocks, timeline = plot_schedule(by_hand, 0, CONFIG).axes
    assert texts(queues) == ["a", "b", "c"]
    assert [patch.get_gid() for patch in queues.patches] == [None] * 3 + ["queue 0", "queue 0", "queue 1"]
    assert queues.get_title(loc="left") == "2 running, 1 waiting"
    assert "free seats: 1" in queues.get_yticklabels()[0].get_text()
    bars = [bar for container in budget.containers for bar in container]
    assert [(bar.get_x(), bar.get_width()) for bar in bars] == [(0, 3), (3, 5)]
    assert texts(budget) == ["a: 3", "b: 5"]
    assert budget.get_xlim() == (0, 8)
    assert texts(blocks) == ["a", "b", "b"]
    assert [patch.get_gid() for patch in timeline.patches][-1] == "mark"


def test_a_step_that_preempts(by_hand):
    queues, budget, blocks, _ = plot_schedule(by_hand, 2, CONFIG).axes
    assert texts(queues) == ["a", "b", "c"]
    assert [patch.get_hatch() for patch in queues.patches][-3:] == ["", "xxx", ""]
    assert "b just lost" in queues.get_title(loc="left")
    assert texts(budget) == ["a: 1"]
    assert texts(blocks) == ["a", "a"]
    assert "2 of 5 blocks held (by whom), 2 can" in blocks.get_title(loc="left")


def test_no_share_and_shared_blocks(by_hand):
    queues, _, blocks, _ = plot_schedule(by_hand, 3, CONFIG).axes
    assert [patch.get_hatch() for patch in queues.patches][-3:] == ["...", "", ""], "a runs and gets nothing"
    queues, _, blocks, _ = plot_schedule(by_hand, 4, CONFIG).axes
    assert texts(blocks) == ["b+", "b", "c"]
    drawn = {patch.get_gid(): patch.get_hatch() for patch in blocks.patches}
    assert drawn == {f"block {n}": "///" if n == 1 else "" for n in range(5)}


def test_a_large_pool_is_drawn_as_far_as_it_is_used():
    result = simulate(arrivals([5, 6]), num_blocks=4000, block_size=4)
    blocks = plot_schedule(result.trace, 1, SchedulerConfig(256, 2048, 16_384)).axes[2]
    used = {block for one in result.trace.steps for block, count in enumerate(one.ref_counts) if count}
    assert len(blocks.patches) == max(used) + 1
    assert f"{4000 - max(used) - 1:,} never used" in blocks.get_title(loc="left")


# --- explorer


@pytest.fixture(scope="module")
def llm():
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "num_gpu_blocks_override": 8, "block_size": 4}
    with LLM("tiny", dtype="float32", device="cpu", trace=True, **sizes) as one:
        yield one


WRITING = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(20, 30)), [8]]


def test_the_explorer_walks(llm):
    for _ in range(2):  # the second time, the engine has a trace already
        before = len(llm.trace.steps)
        explorer = explore_schedule(llm, PROMPTS, WRITING)
        slider, image = explorer.controls[0], explorer.image
        assert isinstance(image, ipywidgets.Image)
        assert (slider.min, slider.max) == (0, len(llm.trace.steps) - before - 1)
        first = bytes(image.value)
        assert first.startswith(PNG)
        slider.value = 2
        assert bytes(image.value).startswith(PNG)
        assert image.value != first
        slider.value = 0
        assert image.value == first
    assert not plt.get_fignums(), "the explorer leaves no figure open"


def test_back_step_and_play_move_the_slider(llm, monkeypatch):
    monkeypatch.setattr("minillm.viz.schedule.plot_schedule", lambda *_: plt.figure())
    explorer = explore_schedule(llm, PROMPTS, WRITING)
    back, step, play, slider = explorer.children[0].children
    back.click()
    assert slider.value == 0, "there is nothing before the first step"
    step.click()
    step.click()
    assert slider.value == play.value == 2
    assert explorer.line.value.startswith("Step 2,")
    back.click()
    assert slider.value == 1
    play.value = play.max  # what the player sends
    assert slider.value == slider.max
    step.click()
    assert slider.value == slider.max


def test_the_line_tells_what_the_trace_holds(llm):
    """Two seats and 8 tokens a step: three tokens of the first prompt, then five of the second; the third waits."""
    explorer = explore_schedule(llm, [[50, 51, 52], list(range(60, 70)), [53]], WRITING)
    first = llm.trace.steps[-explorer.controls[0].max - 1]
    one, two, three = *first.running, *first.waiting
    assert explorer.line.value == f"Step 0, 8 tokens. prompt: {one}, {two} (8); waits: {three}."
    explorer.controls[0].value = 1
    assert explorer.line.value == f"Step 1, 6 tokens. prompt: {two} (5); one token: decode: {one} (1); waits: {three}."


def test_the_explorer_draws_this_run_only(llm, monkeypatch):
    drawn = []
    monkeypatch.setattr("minillm.viz.schedule.plot_schedule", lambda *given: drawn.append(given) or plt.figure())
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (2, 5)]
    before = len(llm.trace.steps)
    explorer = explore_schedule(llm, [[5, 6, 7], [9, 8]], params)
    explorer.controls[0].value = 3
    assert [number for _, number, _ in drawn] == [0, 3]
    trace, _, config = drawn[0]
    assert trace.steps == llm.trace.steps[before:]
    assert config == SchedulerConfig(2, 8, llm.max_model_len)


def test_an_llm_that_keeps_no_trace_is_explored_too():
    with LLM("tiny", dtype="float32", device="cpu", num_gpu_blocks_override=8) as silent:
        explorer = explore_schedule(silent, [[5, 6]], WRITING)
        assert explorer.controls[0].max == 3
        assert silent.engine.trace is silent.trace is None
        with pytest.raises(InvalidRequestError, match="give at least one"):
            explore_schedule(silent, [])
