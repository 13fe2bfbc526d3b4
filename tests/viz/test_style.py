"""Contrasts are WCAG's; inks are readable; figures bring a ground of their own."""

from __future__ import annotations

import io

import matplotlib.pyplot as plt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.viz.style import COLOURS, GREY, LIGHT, READABLE, contrast, ink, ink_on, png


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("black", "white", 21.0),
        ("#777777", "white", 4.48),  # the well-known grey that just fails
        ("#767676", "white", 4.54),  # and the one that just passes
        ("#ff0000", "white", 4.00),
        ("#0000ff", "white", 8.59),
        ("white", "white", 1.0),
    ],
)
def test_contrasts_are_those_of_the_published_tables(one, other, expected):
    assert contrast(one, other) == pytest.approx(expected, abs=0.005)
    assert contrast(other, one) == contrast(one, other)


@pytest.mark.parametrize("colour", [*COLOURS, LIGHT])
def test_texts_can_be_read(colour):
    assert contrast(ink(colour), "white") >= READABLE
    assert contrast(ink_on(colour), colour) >= READABLE


def test_grey_is_an_ink():
    assert contrast(GREY, "white") >= READABLE


@given(st.tuples(*[st.floats(0, 1)] * 3))
def test_black_or_white_can_be_read_on_anything(ground):
    assert contrast(ink_on(ground), ground) >= READABLE


def test_a_picture_brings_its_white_ground_with_it():
    figure, _ = plt.subplots(figsize=(1, 1))
    pixels = plt.imread(io.BytesIO(png(figure)))
    assert pixels[0, 0].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert not plt.get_fignums()
