"""Figures of the encoder/decoder show the numbers that they were given."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch

from minillm.training.numbers import chinese
from minillm.training.schedules import cosine
from minillm.viz import (
    gloss,
    plot_alignment,
    plot_exact_match,
    plot_losses,
    plot_schedules,
    plot_signal,
    plot_stack,
)


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def test_alignment_shows_the_weights():
    weights = torch.rand(3, 4).softmax(dim=-1)
    axes = plot_alignment(weights, list("abcd"), list("xyz"), title="t").axes[0]
    assert axes.images[0].get_array().tolist() == pytest.approx(weights.numpy())
    assert [label.get_text() for label in axes.get_xticklabels()] == list("abcd")
    assert [label.get_text() for label in axes.get_yticklabels()] == list("xyz")


def test_losses_are_means_of_steps():
    axes = plot_losses({"a": [1.0, 3.0, 5.0, 7.0, 100.0]}, smooth=2).axes[0]
    assert axes.lines[0].get_ydata().tolist() == [2.0, 6.0]  # a last, incomplete stretch is not shown
    assert axes.lines[0].get_xdata().tolist() == [1.0, 3.0]


def test_schedules_signals_and_shares():
    schedule = cosine(20, 5)
    assert plot_schedules({"c": schedule}, 20).axes[0].lines[0].get_ydata().tolist() == [schedule(s) for s in range(20)]
    assert plot_signal({"s": [1.0, 0.5]}).axes[0].lines[0].get_ydata().tolist() == [1.0, 0.5]
    bars = plot_exact_match({"a": {1: 0.5, 2: 1.0}, "b": {1: 0.25, 2: 0.75}}).axes[0].patches
    assert [bar.get_height() for bar in bars] == [0.5, 1.0, 0.25, 0.75]


def test_the_stack_names_its_parts():
    said = " ".join(text.get_text() for text in plot_stack(6).axes[0].texts)
    for part in ("self-attention", "cross-attention", "feed-forward", "shifted right", "encoder: 6 ×", "decoder: 6 ×"):
        assert part in said


def test_every_chinese_numeral_has_a_gloss():
    characters = {character for n in (0, 1_2345_6789, 100_000_005) for character in chinese(n)}
    assert all(" · " in gloss(character) for character in characters)
    assert gloss("万") == "wàn · 10⁴"
    assert gloss("x") == "x"
