"""What a deployment takes is what layers and stores really hold; figures and explorer show it."""

from __future__ import annotations

import ipywidgets
import pytest
import torch

from minillm.cache.contiguous import ContiguousCache
from minillm.errors import InvalidRequestError
from minillm.models.glm4 import GLM4_9B_CHAT, translate_chatglm
from minillm.training.glm4 import SMALL
from minillm.transformer.decoder import Decoder
from minillm.transformer.linear import quantize
from minillm.viz import Deployment, explore_deployment, plot_deployment, plot_deployments, published_model, weight_bytes

PNG = b"\x89PNG"
GLM4 = published_model("GLM-4-9B")


@pytest.fixture
def small():
    return Decoder(translate_chatglm({**GLM4_9B_CHAT, **SMALL, "padded_vocab_size": 448})).bfloat16()


def stored_bytes(model):
    """Of every tensor that a module holds, registered or not."""
    held = [
        value for module in model.modules() for value in (*vars(module).values(), *module.parameters(recurse=False))
    ]
    return sum(value.nbytes for value in held if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_weights_take_what_the_layers_take(small, kind):
    expected = weight_bytes(small, kind)
    before = stored_bytes(small)
    if kind != "bfloat16":
        quantize(small, kind)
        assert stored_bytes(small) < before
    assert stored_bytes(small) == expected


def test_keys_and_values_take_what_a_store_takes(small):
    cache = ContiguousCache.for_decoder(small, max_len=10)
    assert Deployment(small, 1e9).token_bytes * 10 == cache.num_bytes


def test_a_card_is_used_up():
    one = Deployment(GLM4, 24e9, utilization=0.85, step=2e9)
    assert one.weights_a_card == 2 * 9_399_951_360
    assert one.token_bytes == 40 * 2**10
    used = one.weights_a_card + one.step + one.tokens * one.token_bytes
    assert 0 <= 24e9 * 0.85 - used < one.token_bytes or one.tokens == 0
    assert Deployment(GLM4, 10e9).tokens == 0


@pytest.mark.parametrize(("cards", "heads"), [(1, 2), (2, 1), (4, 1), (32, 1)])
def test_groups_are_shared_out_and_then_kept_more_than_once(cards, heads):
    one = Deployment(GLM4, 24e9, cards=cards)
    assert one.kv_heads_a_card == heads
    assert one.token_bytes == heads * 20 * 2**10
    assert one.weights_a_card * cards == weight_bytes(GLM4)


@pytest.mark.parametrize(
    "change", [{"cards": 3}, {"cards": 0}, {"cards": 64}, {"utilization": 0}, {"utilization": 1.1}]
)
def test_what_cannot_be(change):
    with pytest.raises(InvalidRequestError):
        Deployment(GLM4, 24e9, **change)


def test_other_weights_are_refused():
    with pytest.raises(InvalidRequestError, match="int3"):
        weight_bytes(GLM4, "int3")


def widths(axes, row, name):
    return sum(bar.get_width() for bar in axes.patches if bar.get_gid() == name and round(bar.get_y() + 0.31) == row)


def test_bars_are_the_card():
    rows = {"fits": Deployment(GLM4, 40e9), "too small": Deployment(GLM4, 16e9)}
    axes = plot_deployments(rows).axes[0]
    parts = ("weights", "a step", "keys and values", "left to others")
    assert sum(widths(axes, 0, name) for name in parts) == pytest.approx(40)
    assert widths(axes, 0, "keys and values") == pytest.approx(rows["fits"].room / 1e9)
    assert widths(axes, 1, "missing") == pytest.approx(-rows["too small"].room / 1e9)
    assert [text.get_text().strip() for text in axes.texts if "tokens" in text.get_text()] == [
        f"{rows['fits'].tokens:,} tokens: {rows['fits'].tokens // 8192} texts of 8,192"
    ]


def test_a_text_that_does_not_fit_is_told():
    axes = plot_deployment(context=131_072).axes[0]
    assert any("no text of 131,072" in text.get_text() for text in axes.texts)
    assert "18.8 GB" in axes.get_title()


def test_explorer_draws_what_its_controls_say():
    explorer = explore_deployment()
    controls, image = explorer.controls, explorer.image
    assert isinstance(image, ipywidgets.Image)
    assert bytes(image.value).startswith(PNG)
    seen = {bytes(image.value)}
    for control, value in zip(controls, ("int8", 0.7, 2, 131_072), strict=True):
        control.value = value
        seen.add(bytes(image.value))
    assert len(seen) == 5
