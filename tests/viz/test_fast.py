"""Figures of speed draw what they are given: shares of the roof, gains, parts of a step, rounded weights."""

from __future__ import annotations

import pytest
import torch

from minillm.errors import InvalidRequestError
from minillm.viz import Machine, plot_gains, plot_parts, plot_reached, plot_rounding

MACHINE = Machine("a machine", flops=100.0, bandwidth=10.0)


def test_what_was_reached_stands_below_its_roof():
    panel = plot_reached(MACHINE, {"half": (2.0, 10.0), "flat": (40.0, 25.0)}).axes[0]
    roof, *rest = panel.lines
    assert max(roof.get_ydata()) == 100
    ways, marks = rest[::2], rest[1::2]
    assert [list(way.get_ydata()) for way in ways] == [[10, 20], [25, 100]]
    assert [mark.get_label() for mark in marks] == ["half: 50.0%", "flat: 25.0%"]
    assert [(mark.get_xdata()[0], mark.get_ydata()[0]) for mark in marks] == [(2, 10), (40, 25)]


def test_gains_are_those_over_the_stage_before():
    panel = plot_gains({"a": 10.0, "b": 25.0, "c": 20.0}, limit=1000.0, xlabel="tokens a second").axes[0]
    assert [bar.get_width() for bar in panel.patches] == [10, 25, 20]
    assert [text.get_text() for text in panel.texts] == ["10", "25  (2.5×)", "20  (0.8×)"]
    assert list(panel.lines[0].get_xdata()) == [1000, 1000]
    assert panel.get_xlim()[1] > 1000


def test_parts_stand_end_to_end_and_small_ones_have_no_name():
    panel = plot_parts({"1": {"x": 3.0, "y": 1.0}, "16": {"x": 99.0, "y": 1.0}}, xlabel="ms").axes[0]
    assert [(bar.get_x(), bar.get_width()) for bar in panel.patches] == [(0, 3), (0, 99), (3, 1), (99, 1)]
    assert [text.get_text() for text in panel.texts] == ["", "99%", "", ""]


@pytest.mark.parametrize("parts", [{}, {"a": {}}, {"a": {"x": 1.0}, "b": {"y": 1.0}}])
def test_bars_of_different_parts_are_refused(parts):
    with pytest.raises(InvalidRequestError, match="same parts"):
        plot_parts(parts, xlabel="ms")


def test_rounding_shows_weights_levels_and_errors():
    weights = torch.tensor([0.0, 1.4, 3.0, 1.0, 10.0, 13.0, 11.0, 12.4])
    row, errors = plot_rounding(weights, weights.round(), group=4, bits=2).axes
    shown = [line for line in row.lines if len(line.get_xdata()) == 4]
    assert [list(line.get_ydata()) for line in shown[::2]] == [weights[:4].tolist(), weights[4:].tolist()]
    assert [list(line.get_ydata()) for line in shown[1::2]] == [[0, 1, 3, 1], [10, 13, 11, 12]]
    levels = [[segment[0][1] for segment in lines.get_segments()] for lines in row.collections[::2]]
    assert levels == [[0, 1, 2, 3], [10, 11, 12, 13]]
    heights = [bar.get_height() for bar in errors.patches]
    assert sum(heights) == 8
    assert sum(heights[:8]) == 2, "the two errors of -0.4 steps"


def test_weights_that_are_no_groups_are_refused():
    with pytest.raises(InvalidRequestError, match="groups of 3"):
        plot_rounding(torch.ones(4), torch.ones(4), group=3, bits=4)
