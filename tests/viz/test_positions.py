"""Figures of positions draw the package's numbers, and the explorer's picture follows its sliders."""

from __future__ import annotations

import math

import ipywidgets
import matplotlib.pyplot as plt
import pytest
import torch

from minillm.transformer.positions import RotaryConfig, RotaryEmbedding, apply_rotary
from minillm.viz import (
    explore_rotary,
    pair_products,
    plot_clocks,
    plot_position_table,
    plot_products,
    plot_rotary,
    plot_score_maps,
    plot_shuffled_outputs,
    plot_wavelengths,
    wavelengths,
)
from minillm.viz.positions import EXPLORED, KEY_ANGLE, QUERY_ANGLE

PNG = b"\x89PNG"


def rotated_pair(angle: float, position: int, pair: int, config: RotaryConfig) -> torch.Tensor:
    """One pair of channels alone in its head, turned by the package."""
    x = torch.zeros(1, 1, config.dim)
    channels = [2 * pair, 2 * pair + 1] if config.interleaved else [pair, pair + config.dim // 2]
    x[..., channels] = torch.tensor([math.cos(angle), math.sin(angle)])
    return apply_rotary(x, RotaryEmbedding(config)(torch.tensor([position]), torch.float32)).flatten()


@pytest.mark.parametrize("config", [EXPLORED, RotaryConfig(dim=16)])
@pytest.mark.parametrize(("query", "key", "pair"), [(12, 5, 2), (0, 63, 0), (40, 40, 7)])
def test_the_curve_and_the_mark_are_the_packages_products(config, query, key, pair):
    curve, mark = plot_rotary(query, key, pair, config=config).axes[1].lines[:2]
    for distance, drawn in zip(curve.get_xdata(), curve.get_ydata(), strict=True):
        q = rotated_pair(QUERY_ANGLE, 100 + int(distance), pair, config)
        k = rotated_pair(KEY_ANGLE, 100, pair, config)
        assert float(drawn) == pytest.approx(float(q @ k), abs=1e-4)
    expected = rotated_pair(QUERY_ANGLE, query, pair, config) @ rotated_pair(KEY_ANGLE, key, pair, config)
    assert list(mark.get_xdata()) == [query - key]
    assert float(mark.get_ydata()[0]) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_pairs_products_add_up_to_the_dot_product(interleaved):
    torch.manual_seed(0)
    config = RotaryConfig(8, interleaved=interleaved)
    q, k, at = torch.randn(8), torch.randn(8), torch.arange(9)
    rotation = RotaryEmbedding(config)(at, torch.float32)
    turned_q, turned_k = (apply_rotary(x.expand(9, 1, -1), rotation)[:, 0] for x in (q, k))
    products = pair_products(config, q, k, at, at.flip(0))
    assert products.shape == (9, 4)
    torch.testing.assert_close(products.sum(dim=1), (turned_q * turned_k.flip(0)).sum(dim=1))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_each_slider_redraws_the_explorer(number):
    explorer = explore_rotary(query_position=12, key_position=5, pair=2)
    sliders, image = explorer.controls, explorer.image
    assert all(isinstance(slider, ipywidgets.IntSlider) for slider in sliders)
    before = bytes(image.value)
    assert before.startswith(PNG)
    sliders[number].value += 1
    assert bytes(image.value).startswith(PNG)
    assert image.value != before
    sliders[number].value -= 1
    assert image.value == before
    assert not plt.get_fignums(), "the explorer leaves no figure open"


def test_wavelengths_and_their_figure():
    configs = {"short": RotaryConfig(8, base=100.0), "long": RotaryConfig(8, base=10000.0)}
    assert float(wavelengths(configs["short"])[0]) == pytest.approx(2 * math.pi)
    for relative in (False, True):
        lines = plot_wavelengths(configs, context=50, relative=relative).axes[0].lines
        first = wavelengths(configs["short"]) if relative else 1
        for line, config in zip(lines, configs.values(), strict=False):
            assert torch.allclose(torch.tensor(line.get_ydata()), wavelengths(config) / first)


def test_heat_maps_and_curves_draw_what_they_are_given():
    torch.manual_seed(0)
    table, square = torch.randn(6, 4), torch.randn(5, 5)
    assert (plot_position_table(table).axes[0].images[0].get_array() == table.numpy()).all()
    assert (plot_score_maps({"one": square, "two": -square}).axes[1].images[0].get_array() == -square.numpy()).all()
    words = list("abcdef")
    panel = plot_shuffled_outputs((words, table), (words[::-1], table.flip(0))).axes[1]
    assert [label.get_text() for label in panel.get_yticklabels()] == words[::-1]
    assert (panel.images[0].get_array() == table.flip(0).numpy()).all()
    lines = plot_products(torch.arange(5), {"a": square[0], "b": square[1]}).axes[0].lines
    assert list(lines[1].get_ydata()) == square[1].tolist()
    assert len(plot_clocks([0, 3], dim=8).axes) == 8
