"""The common construction: controls, a line, a picture; what shows no widgets gets the picture."""

from __future__ import annotations

import base64

import ipywidgets
import matplotlib.pyplot as plt
import pytest
from IPython.core.formatters import DisplayFormatter

from minillm import LLM
from minillm.errors import InvalidRequestError
from minillm.models.loader import load_model
from minillm.models.tokenizer import get_tokenizer, stop_token_ids
from minillm.viz.explorer import Explorer, Steps, choice, number_slider, reader_of, slider

WIDGET = "application/vnd.jupyter.widget-view+json"


def bar(height: int):
    figure, axes = plt.subplots(figsize=(1, 1))
    axes.bar([0], [height])
    axes.set_ylim(0, 10)
    return figure


def refuse(height: int):
    if height > 5:
        raise InvalidRequestError("a <bar> of more than 5 does not fit")
    return bar(height)


def test_a_control_changes_picture_and_line():
    explorer = Explorer([slider("height", 2, 0, 9)], bar, lambda height: f"It is {height} high.")
    before = bytes(explorer.image.value)
    assert explorer.line.value == "It is 2 high."
    explorer.controls[0].value = 7
    assert explorer.line.value == "It is 7 high."
    assert explorer.image.value != before
    assert not plt.get_fignums()


def test_it_is_displayed_as_a_widget_and_as_its_picture():
    explorer = Explorer([slider("height", 2, 0, 9)], bar)
    bundle, _ = DisplayFormatter().format(explorer)
    assert bundle[WIDGET]["model_id"] == explorer.model_id
    assert base64.b64decode(bundle["image/png"]) == bytes(explorer.image.value)
    assert bundle["text/plain"].startswith("Explorer(")
    explorer.controls[0].value = 3
    assert base64.b64decode(DisplayFormatter().format(explorer)[0]["image/png"]) == bytes(explorer.image.value)


def test_what_is_refused_is_told_and_the_picture_stays():
    explorer = Explorer([slider("height", 2, 0, 9)], refuse)
    before = bytes(explorer.image.value)
    explorer.controls[0].value = 6
    assert explorer.line.value == "a &lt;bar&gt; of more than 5 does not fit"
    assert explorer.image.value == before
    explorer.controls[0].value = 3
    assert not explorer.line.value
    with pytest.raises(InvalidRequestError, match="more than 5"):
        Explorer([slider("height", 6, 0, 9)], refuse)


def test_values_that_a_control_cannot_have_are_refused():
    """A widget of ipywidgets would take the nearest one without a word."""
    with pytest.raises(InvalidRequestError, match="height: 10 is not in 0 … 9"):
        slider("height", 10, 0, 9)
    with pytest.raises(InvalidRequestError, match="size: 3 is not one of 2, 4"):
        number_slider("size", (2, 4), 3)
    with pytest.raises(InvalidRequestError, match="kind: 'c' is not one of a, b"):
        choice("kind", "ab", "c")
    with pytest.raises(InvalidRequestError, match="step: 4 is not in 0 … 3"):
        Steps.to(3, 4)
    assert isinstance(slider("share", 0.5, 0, 1, 0.1), ipywidgets.FloatSlider)
    assert isinstance(slider("count", 5, 0, 9), ipywidgets.IntSlider)


@pytest.mark.parametrize(("last", "value"), [(20, 12), (2, 0), (200, 150)])
def test_steps_can_become_others(last, value):
    steps = Steps.to(9, 5)
    steps.set(last, value)
    assert (steps.slider.max, steps.play.max) == (last, last)
    assert (steps.slider.value, steps.play.value) == (value, value)
    assert steps.play.step == max(1, last // 60)


def test_whatever_names_a_model_can_be_read():
    tokenizer = get_tokenizer("tiny")
    decoder = load_model("tiny", dtype="float32", device="cpu")
    assert reader_of(decoder, tokenizer) == (decoder, tokenizer, {tokenizer.eos_token_id})
    named = reader_of("tiny")
    assert named.model.config == decoder.config
    assert named.stop_ids == stop_token_ids("tiny", tokenizer)
    with LLM("tiny", dtype="float32", device="cpu", num_gpu_blocks_override=8) as llm:
        assert reader_of(llm) == (llm.decoder, llm.get_tokenizer(), stop_token_ids("tiny", tokenizer))
    with pytest.raises(InvalidRequestError, match="tokenizer="):
        reader_of(decoder)
