"""Figures of pieces and embeddings draw the package's numbers, and the explorer's picture follows its controls."""

from __future__ import annotations

import random
from itertools import pairwise

import ipywidgets
import matplotlib.pyplot as plt
import pytest
import torch

from minillm.tokenizers.bpe import BytePairTokenizer
from minillm.training.stories import tell
from minillm.viz import (
    explore_merges,
    nearest,
    pieces_after,
    plot_merges,
    plot_one_hot,
    plot_pieces,
    plot_tokens_per_word,
    plot_word_maps,
    principal_plane,
    readable,
)

PNG = b"\x89PNG"
TEXT = "Mia had a kite. 你好\nThe end"


@pytest.fixture(scope="module")
def tokenizer() -> BytePairTokenizer:
    rng = random.Random(0)
    return BytePairTokenizer.train([tell(rng).text for _ in range(20)], 500)


@pytest.mark.parametrize(
    ("piece", "read"),
    [("Ġkite", "␣kite"), ("Ċ", "↵"), ("ä½ł", "你"), ("ä½", r"\xe4\xbd"), ("<|im_end|>", "<|im_end|>"), ("▁a", "▁a")],
)
def test_pieces_are_read_as_text(piece, read):
    assert readable(piece) == read


@pytest.mark.parametrize("count", [0, 1, 50, 244])
def test_pieces_after_some_merges_are_those_of_the_smaller_tokenizer(tokenizer, count):
    vocab = dict(list(tokenizer.vocab.items())[: 256 + count])
    smaller = BytePairTokenizer(vocab, tokenizer.merges[:count])
    pieces = pieces_after(TEXT, tokenizer.merges, count)
    assert [vocab[piece] for piece in pieces] == smaller.encode(TEXT)


def drawn(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_pieces_are_drawn_one_box_each(tokenizer):
    pieces = pieces_after(TEXT, tokenizer.merges, 244)
    figure = plot_pieces({"row": pieces, "other": ["<end>", "ä½ł"]}, special=["<end>"])
    # The figures' font has no Chinese: what is whole there is written as its code point.
    assert drawn(figure) == [*map(readable, pieces), "<end>", r"\u4f60", "row", "other"]
    boxes = figure.axes[0].patches
    assert len(boxes) == len(pieces) + 2
    assert boxes[-2].get_facecolor() != boxes[-1].get_facecolor()


def test_long_rows_go_on_in_the_next_line_and_boxes_never_overlap(tokenizer):
    pieces = pieces_after(TEXT * 10, tokenizer.merges, 100)
    boxes = [box.get_bbox() for box in plot_pieces({"": pieces}, width=40).axes[0].patches]
    assert len({box.y0 for box in boxes}) > 10
    for before, after in pairwise(boxes):
        assert after.x0 >= before.x1 - 1e-6 if after.y0 == before.y0 else after.x0 == 0
        assert after.x1 <= 40


def test_merges_count_the_tokens(tokenizer):
    texts = drawn(plot_merges(TEXT, tokenizer.merges, [0, 244]))
    assert f"0 merges: {len(TEXT.encode())} tokens" in texts
    assert f"244 merges: {len(tokenizer.encode(TEXT))} tokens" in texts


def test_the_explorer_follows_its_controls(tokenizer):
    explorer = explore_merges("Mia had a kite.", tokenizer.merges, count=10)
    (box, slider), image = explorer.controls, explorer.image
    assert isinstance(slider, ipywidgets.IntSlider)
    before = bytes(image.value)
    assert before.startswith(PNG)
    slider.value = 200
    merged = bytes(image.value)
    assert merged.startswith(PNG)
    assert merged != before
    slider.value = 10
    assert image.value == before
    box.value = "中🙂 kites"
    assert image.value not in (before, merged)
    box.value = ""
    assert bytes(image.value).startswith(PNG)
    assert not plt.get_fignums(), "the explorer leaves no figure open"


def test_tokens_per_word_draws_its_curves():
    lines = plot_tokens_per_word([256, 300], {"a": [4.0, 2.0], "b": [5.0, 3.0]}).axes[0].lines
    assert list(lines[0].get_xdata()) == [256, 300]
    assert [list(line.get_ydata()) for line in lines[:2]] == [[4.0, 2.0], [5.0, 3.0]]


def test_one_hot_rows_times_the_table_are_its_rows():
    torch.manual_seed(0)
    table, tokens = torch.randn(4, 3), torch.tensor([2, 0, 2])
    one_hot, whole, rows = (panel.images[0].get_array() for panel in plot_one_hot(tokens, table, "abcd").axes[:3])
    assert (one_hot == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0]]).all()
    assert (whole == table.numpy()).all()
    assert (rows == table[tokens].numpy()).all()


def test_nearest_are_the_largest_cosines():
    torch.manual_seed(0)
    table = torch.randn(30, 8)
    unit = table / table.norm(dim=1, keepdim=True)
    cosines = {other: float(unit[7] @ unit[other]) for other in range(30) if other != 7}
    expected = sorted(cosines, key=lambda other: -cosines[other])[:4]
    found = nearest(table, 7, 4)
    assert [token for token, _ in found] == expected
    assert [cosine for _, cosine in found] == pytest.approx([cosines[token] for token in expected], abs=1e-6)


def test_the_principal_plane_is_that_of_the_covariance():
    torch.manual_seed(0)
    points = torch.randn(40, 6) * torch.tensor([5.0, 1.0, 3.0, 0.5, 0.4, 0.3]) + 7
    seen, share = principal_plane(points)
    spread, directions = torch.linalg.eigh(torch.cov(points.double().T))
    expected = (points.double() - points.double().mean(dim=0)) @ directions[:, [-1, -2]]
    for axis in (0, 1):
        direction = directions[:, -1 - axis]
        sign = direction[direction.abs().argmax()].sign()  # the largest entry is positive
        torch.testing.assert_close(seen[:, axis].double(), sign * expected[:, axis], atol=1e-3, rtol=0)
    assert share == pytest.approx(float(spread[-2:].sum() / spread.sum()), abs=1e-5)


def test_word_maps_draw_each_point_and_keep_labels_apart():
    torch.manual_seed(0)
    points = torch.randn(30, 2)
    words, kinds = [f"word{number}" for number in range(30)], ["a", "b", "c"] * 10
    figure = plot_word_maps({"one": points, "two": -points}, words, kinds)
    for panel, expected in zip(figure.axes, (points, -points), strict=True):
        assert [text.get_text() for text in panel.texts] == words
        for number, marks in enumerate(panel.collections):
            torch.testing.assert_close(torch.tensor(marks.get_offsets().data), expected[number::3].double())
        figure.draw_without_rendering()
        boxes = [text.get_tightbbox() if text.arrow_patch is None else None for text in panel.texts]
        boxes = [box for box in boxes if box is not None]
        overlaps = sum(a.overlaps(b) for at, a in enumerate(boxes) for b in boxes[:at])
        assert overlaps <= 1
