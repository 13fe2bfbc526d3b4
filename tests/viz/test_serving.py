"""Figures of serving draw what they are given; queues and their means are computed here otherwise, too."""

from __future__ import annotations

import math

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.engine.trace import Trace
from minillm.errors import InvalidRequestError
from minillm.simulate.simulator import simulate
from minillm.simulate.trace import Arrival
from minillm.viz import (
    explore_queue,
    held_blocks,
    mean_wait,
    numbered,
    plot_gauges,
    plot_held_blocks,
    plot_histogram,
    plot_load,
    plot_queue,
    plot_request_way,
    plot_utilisation,
    random_arrivals,
    starts_in_order,
)

# --- the way of a request


def test_the_way_of_a_request_gives_each_client_a_token_of_each_of_its_steps():
    axes = plot_request_way().axes[0]
    said = [text.get_text() for text in axes.texts]
    shares = "".join(text.split(": ")[1] for text in said if text.startswith("step"))
    assert said.count("POST") == 2
    assert said.count("data:") == said.count("put") == shares.count("A") + shares.count("B") == 6


# --- traces


@pytest.fixture
def trace():
    return simulate([Arrival(0.0, 20, 6), Arrival(0.01, 5, 30), Arrival(0.02, 9, 3)], num_blocks=12, block_size=4).trace


def test_names_become_numbers_and_nothing_else_changes(trace):
    renamed = numbered(trace)
    names = list(dict.fromkeys(part.name for step in trace.steps for part in step.parts))
    back = {str(number): name for number, name in enumerate(names)}
    for step, before in zip(renamed.steps, trace.steps, strict=True):
        assert [back[name] for name in step.running] == list(before.running)
        assert [back[name] for name in step.waiting] == list(before.waiting)
        assert [(back[part.name], part.blocks) for part in step.parts] == [(p.name, p.blocks) for p in before.parts]
        assert (step.start, step.end, step.ref_counts) == (before.start, before.end, before.ref_counts)


def test_blocks_held_add_up_to_the_pools(trace):
    counts = held_blocks(trace)
    assert set(counts) == {"0", "1", "2"}
    for number, step in enumerate(trace.steps):
        held = sum(count > 0 for count in step.ref_counts)
        assert sum(one[number] for one in counts.values()) >= held
        gone = [name for name in counts if name not in step.running]
        assert not any(counts[name][number] for name in gone)
    axes = plot_held_blocks(trace, title="t").axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["request 0", "request 1", "request 2"]
    with pytest.raises(InvalidRequestError, match="trace=True"):
        plot_held_blocks(Trace())


# --- queues


def seat_by_seat(arrivals, service, seats):
    """The same by going through time in whole ticks."""
    starts, ends, waiting, time = {}, [], list(enumerate(arrivals)), 0
    while waiting:
        ends = [end for end in ends if end > time]
        while waiting and waiting[0][1] <= time and len(ends) < seats:
            starts[waiting.pop(0)[0]] = time
            ends.append(time + service)
        time += 1
    return [starts[number] for number in range(len(arrivals))]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=15).map(sorted), st.integers(1, 6), st.integers(1, 3))
def test_turns_come_in_order(arrivals, service, seats):
    assert starts_in_order(arrivals, service, seats) == seat_by_seat(arrivals, service, seats)


def test_the_formula_is_what_random_arrivals_come_to():
    for utilisation in (0.3, 0.6, 0.8):
        arrivals = random_arrivals(200_000, utilisation, seed=1)
        waits = np.subtract(starts_in_order(arrivals, 1.0), arrivals)
        assert waits.mean() == pytest.approx(mean_wait(utilisation, 1.0), rel=0.05)
        assert arrivals[-1] == pytest.approx(200_000 / utilisation)


@pytest.mark.parametrize("utilisation", [-0.1, 1.0, math.nan])
def test_no_mean_beyond_the_capacity(utilisation):
    with pytest.raises(InvalidRequestError, match="below 1"):
        mean_wait(utilisation, 1.0)


@pytest.mark.parametrize(("arrivals", "seats"), [([2.0, 1.0], 1), ([1.0], 0)])
def test_what_is_no_queue(arrivals, seats):
    with pytest.raises(InvalidRequestError, match="order"):
        starts_in_order(arrivals, 1.0, seats)


def test_a_queue_is_drawn_with_littles_law():
    rows, count = plot_queue([0.0, 1.0, 1.5], 2.0, title="t").axes
    waits, served = rows.containers
    assert [(bar.get_x(), bar.get_width()) for bar in waits] == [(0, 0), (1, 1), (1.5, 2.5)]
    assert [(bar.get_x(), bar.get_width()) for bar in served] == [(0, 2), (2, 2), (4, 2)]
    (mean,) = count.lines
    assert mean.get_ydata()[0] == pytest.approx((2 + 3 + 4.5) / 6)
    (area,) = count.collections
    corners = area.get_paths()[0].vertices
    assert corners[:, 1].max() == 3


def test_evenly_spaced_requests_wait_for_nobody():
    assert "the mean wait is 0.0" in plot_utilisation(0.8, even=True).axes[0].get_title()
    assert "the mean wait is 0.0" not in plot_utilisation(0.8).axes[0].get_title()


def test_the_explorer_obeys():
    explorer = explore_queue()
    (utilisation, seed, even), image = explorer.controls, explorer.image
    assert isinstance(image, ipywidgets.Image)
    seen = {bytes(image.value)}
    for control, value in ((utilisation, 0.5), (seed, 7), (even, True)):
        control.value = value
        assert bytes(image.value).startswith(b"\x89PNG")
        seen.add(bytes(image.value))
    assert len(seen) == 4
    assert not plt.get_fignums()


# --- metrics and load


def test_a_histogram_shows_counts_of_each_bucket_and_marks_in_their_places():
    axes = plot_histogram({0.1: 2, 0.5: 2, 1.0: 7, math.inf: 8}, {"a": 0.75, "b": 0.05}, unit="s").axes[0]
    assert [bar.get_height() for bar in axes.patches] == [2, 0, 5, 1]
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx([2.0, 0.0])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "0.5", "1", "∞"]


@pytest.mark.parametrize("buckets", [{}, {1.0: 3}, {1.0: 1, 0.5: 2, math.inf: 3}])
def test_what_is_no_histogram(buckets):
    with pytest.raises(InvalidRequestError, match="infinite"):
        plot_histogram(buckets, {}, unit="s")


def test_gauges_stand_below_each_other():
    panels = plot_gauges([0.0, 1.0, 2.0], {"waiting": [0, 3, 1], "running": [1, 2, 2]}).axes
    assert [panel.get_title(loc="left") for panel in panels] == ["waiting", "running"]
    assert [list(panel.lines[0].get_ydata()) for panel in panels] == [[0, 3, 1], [1, 2, 2]]


def test_load_is_shaded_beyond_the_capacity():
    curves = {"p50": [1.0, 2.0], "p90": [2.0, 9.0]}
    figure = plot_load([10.0, 30.0], {"first": curves, "pace": curves}, capacity=20.0, title="t")
    for panel in figure.axes:
        assert [list(line.get_ydata()) for line in panel.lines] == [[1, 2], [2, 9]]
        (shade,) = panel.patches
        assert shade.get_x() == 20
        assert shade.get_x() + shade.get_width() == panel.get_xlim()[1] > 30
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["p50", "p90", "more than can be answered"]
