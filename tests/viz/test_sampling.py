"""Figures of sampling draw what the package computes, and the explorer follows its sliders."""

from __future__ import annotations

import math

import ipywidgets
import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.colors import to_rgba

from minillm.transformer.decoder import Decoder, DecoderConfig, LayerConfig
from minillm.transformer.sampling import GREEDY, Sampling
from minillm.viz import (
    describe,
    distribution,
    entropy_bits,
    explore_sampling,
    plot_against_temperature,
    plot_packed_rows,
    plot_parameter_parts,
    plot_sampling,
    plot_surprise,
    plot_what_stays,
)
from minillm.viz.sampling import CHARACTERS_PER_LINE, MOST_BITS, SURPRISE

PNG = b"\x89PNG"
VOCAB = 32


class Letters:
    """A tokenizer of letters: what the figures need of one."""

    eos_token_id = None

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": [ord(letter) % VOCAB for letter in text]})

    def decode(self, tokens):
        return "".join(chr(64 + token) for token in tokens)


@pytest.fixture
def logits():
    return 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Decoder(DecoderConfig(VOCAB, 16, 2, 2, 8, 16, 64, layers=(LayerConfig(),), positions="sinusoidal")).eval()


def widths(panel, number):
    """The lengths of a panel's grey (0) or coloured (1) bars."""
    return [bar.get_width() for bar in panel.containers[number]]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.5, top_k=4), Sampling(2, min_p=0.3, top_p=0.8), GREEDY])
def test_bars_are_the_distributions_before_and_after(logits, sampling):
    count = 6
    (panel,) = plot_sampling(logits, Letters(), sampling, count=count).axes
    before = logits.softmax(dim=-1)
    if sampling.temperature == 0:
        after = torch.eye(VOCAB)[logits.argmax()]
    else:
        after = sampling.transform(logits).softmax(dim=-1)
    best = logits.topk(count).indices
    for number, expected in ((0, before), (1, after)):
        drawn = widths(panel, number)
        assert drawn[:count] == pytest.approx((100 * expected[best]).tolist(), abs=1e-3)
        assert drawn[count] == pytest.approx(100 * float(1 - expected[best].sum()), abs=1e-3)
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert names == [repr(Letters().decode([token])) for token in best.tolist()] + [f"the {VOCAB - count} others"]
    assert [text.get_text().strip() == "cut" for text in panel.texts[:count]] == (after[best] == 0).tolist()
    assert f"{int((after > 0).sum())} of {VOCAB} tokens kept" in panel.get_title()


def test_every_sampling_has_a_panel(logits):
    panels = plot_sampling(logits, Letters(), Sampling(0.5), Sampling(2), title="both").axes
    assert [panel.get_title().splitlines()[0] for panel in panels] == ["temperature 0.5", "temperature 2"]
    assert widths(panels[0], 0) == widths(panels[1], 0)
    assert widths(panels[0], 1)[0] > widths(panels[1], 1)[0]


def test_the_distribution_is_what_choose_draws_from(logits):
    sampling = Sampling(0.7, top_p=0.9, seed=0)
    draws = sampling.choose(logits.expand(20_000, -1), sampling.generator())
    shares = torch.bincount(draws, minlength=VOCAB) / 20_000
    torch.testing.assert_close(shares, distribution(logits, sampling), atol=0.02, rtol=0)
    assert distribution(logits, GREEDY).argmax() == logits.argmax()


def test_entropy_and_settings_in_words():
    even, sure = torch.full((8,), 1 / 8), torch.eye(8)[3]
    assert entropy_bits(torch.stack((even, sure))).tolist() == pytest.approx([3, 0])
    assert describe(Sampling()) == "temperature 1"
    assert describe(GREEDY) == "greedy"
    assert describe(Sampling(0.5, 3, 0.9, 0.1)) == "temperature 0.5, top-k 3, top-p 0.9, min-p 0.1"


def test_a_text_is_coloured_by_surprise_and_broken_between_words():
    pieces = ["Once", " upon", " a", "\n", "\n", *[" wo", "rd"] * 40]
    probabilities = [math.nan, 1.0, 0.25, 2.0**-9, *[0.5] * 81]
    axes = plot_surprise(pieces, probabilities).axes[0]
    grounds = [patch.get_facecolor() for patch in axes.patches]
    assert len(grounds) == len(pieces)
    assert grounds[1] == to_rgba(SURPRISE(0.0))
    assert grounds[2] == to_rgba(SURPRISE(2 / MOST_BITS))
    assert grounds[3] == to_rgba(SURPRISE(1.0))
    places = [(patch.get_x(), patch.get_y()) for patch in axes.patches]
    assert all(patch.get_x() + patch.get_width() <= CHARACTERS_PER_LINE for patch in axes.patches)
    assert places[5] == (0, places[0][1] + 1), "what follows a line's end begins the next"
    for first, second in zip(places[5::2], places[6::2], strict=True):
        assert first[1] == second[1], "a word is not broken"


def test_parameters_packed_rows_and_curves_draw_what_they_are_given():
    panel = plot_parameter_parts({"one": {"a": 30, "b": 10}, "two": {"b": 4, "c": 1}}).axes[0]
    assert [bar.get_width() for bar in panel.patches] == pytest.approx([75, 25, 80, 20])
    assert [label.get_text().split(":")[0] for label in panel.get_yticklabels()] == ["one", "two"]
    weight = torch.randn(8, 3)
    panel = plot_packed_rows(weight, {"q": 4, "k": 2, "v": 2}).axes[0]
    assert (panel.images[0].get_array() == weight.numpy()).all()
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert labels == ["q\nrows 0–3", "k\nrows 4–5", "v\nrows 6–7"]
    assert [line.get_ydata()[0] for line in panel.lines] == [3.5, 5.5]
    lines = plot_against_temperature([1, 2], {"x": [3, 4]}, ylabel="bits", limit=("most", 5)).axes[0].lines
    assert list(lines[0].get_ydata()) == [3, 4]
    assert set(lines[1].get_ydata()) == {5}
    assert {text.get_text() for text in plot_what_stays().axes[0].texts} >= {"cross-attention", "one text"}


def test_the_explorers_controls_change_picture_and_text(model):
    explorer = explore_sampling(model, "ABC", Sampling(seed=0), tokenizer=Letters(), max_tokens=12)
    sliders, text, image = explorer.controls, explorer.line, explorer.image
    temperature, top_k, top_p, min_p, seed = sliders
    assert all(isinstance(slider, ipywidgets.IntSlider | ipywidgets.FloatSlider) for slider in sliders)
    first_picture, first_text = bytes(image.value), text.value
    assert first_picture.startswith(PNG)
    for slider, value in ((temperature, 0.3), (top_k, 3), (top_p, 0.5), (min_p, 0.9)):
        old, slider.value = slider.value, value
        assert image.value != first_picture
        slider.value = old
        assert image.value == first_picture
        assert text.value == first_text
    seed.value = 1
    assert text.value != first_text
    assert image.value == first_picture, "a seed changes the draw, not the distribution"
    assert not plt.get_fignums(), "the explorer leaves no figure open"


def test_at_temperature_0_the_explorer_writes_the_greedy_text(model):
    explorer = explore_sampling(model, "ABC", Sampling(0, seed=0), tokenizer=Letters(), max_tokens=5)
    sliders, text = explorer.controls, explorer.line
    tokens = Letters()("ABC").input_ids
    with torch.inference_mode():
        for _ in range(5):
            tokens = [*tokens, int(model(torch.tensor([tokens]))[0, -1].argmax())]
    assert f"<b>{Letters().decode(tokens[3:])}</b>" in text.value.replace("&amp;", "&")
    before = text.value
    sliders[-1].value = 5
    assert text.value == before
