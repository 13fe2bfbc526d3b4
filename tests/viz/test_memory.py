"""Figures of the cost and memory of generation draw numbers counted here otherwise; the explorer obeys its controls."""

from __future__ import annotations

import ipywidgets
import matplotlib.pyplot as plt
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minillm.cache.contiguous import ContiguousCache
from minillm.errors import InvalidRequestError
from minillm.transformer.decoder import Decoder, DecoderConfig, LayerConfig
from minillm.transformer.kv import PaddedBatch
from minillm.viz import (
    PUBLISHED,
    Machine,
    Reservation,
    explore_kv_memory,
    forward_bytes,
    forward_flops,
    matrix_weights,
    own_heads,
    plot_kv_memory,
    plot_kv_per_token,
    plot_lines,
    plot_reservation,
    plot_roofline,
    plot_slots,
    plot_work,
    published_model,
)

PNG = b"\x89PNG"
PARAMETERS = {  # as the models' own pages count them
    "SmolLM2-135M": 134_515_008,
    "Llama-2-7B": 6_738_415_616,
    "Llama-3-8B": 8_030_261_248,
    "Qwen3-8B": 8_190_735_360,
    "GLM-4-9B": 9_399_951_360,
}
KIB = {"SmolLM2-135M": 22.5, "Llama-2-7B": 512, "Llama-3-8B": 128, "Qwen3-8B": 144, "GLM-4-9B": 40}


def small_model(tied: bool) -> Decoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 24, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8}
    layers = (LayerConfig(),) * 3
    config = DecoderConfig(
        **sizes, intermediate_size=32, max_position_embeddings=64, layers=layers, qkv_bias=True, tied_head=tied
    )
    return Decoder(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 12), (3, 7)])
def test_flops_are_what_pytorch_counts(tied, batch, length):
    model = small_model(tied)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(batch, length, dtype=torch.long))
    assert counter.get_total_flops() == forward_flops(model, length, length, batch)


def test_flops_of_a_step_with_a_store():
    model = small_model(tied=True)
    cache = ContiguousCache.for_decoder(model, batch_size=2)
    for new, start in ((9, 0), (1, 9)):
        batch = PaddedBatch.full(2, new, start)
        cache.begin(batch)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
            model(torch.zeros(2, new, dtype=torch.long), batch.positions(), cache)
        assert counter.get_total_flops() == forward_flops(model, new, start + new, batch=2)


def test_bytes_are_those_of_the_matrices_and_of_the_store():
    for tied in (True, False):
        model = small_model(tied)
        matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
        assert matrix_weights(model) == matrices - (0 if tied else model.embedding.weight.numel())
    read = ContiguousCache.for_decoder(model, batch_size=5, max_len=30).num_bytes
    written = ContiguousCache.for_decoder(model, batch_size=5, max_len=2).num_bytes
    expected = 4 * matrix_weights(model) + read + written
    assert forward_bytes(model, new=2, keys=30, batch=5, dtype=torch.float32) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_sizes_they_are_known_for(name):
    model = published_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert model.config.kv_bytes_per_token(torch.bfloat16) == KIB[name] * 2**10
    assert model.device.type == "meta"


def test_another_name_is_refused():
    with pytest.raises(InvalidRequestError, match="Qwen3-8B"):
        published_model("gpt-5")


def test_the_work_drawn_is_counted_right():
    without, stored = plot_work(prompt=4, written=3).axes
    nan = float("nan")
    expected = torch.tensor([[0, 0, 0, 0, nan, nan], [1, 1, 1, 1, 0, nan], [1, 1, 1, 1, 1, 0]])
    drawn = torch.tensor(without.images[0].get_array().filled(nan))
    torch.testing.assert_close(drawn, expected, equal_nan=True)
    assert "15 tokens" in without.get_title()
    drawn = torch.tensor(stored.images[0].get_array().filled(nan))
    torch.testing.assert_close(drawn, torch.where(expected == 1, 2, expected), equal_nan=True)
    assert "6 tokens" in stored.get_title()


def test_slots_and_lines_are_drawn_as_given():
    slots = torch.randn(6, 4)
    axes = plot_slots({"now": slots, "later": -slots}, used=(2, 5)).axes
    assert (axes[1].images[0].get_array() == -slots.numpy()).all()
    assert axes[1].lines[0].get_ydata()[0] == 4.5
    panel = plot_lines([1, 2], {"a": [3, 4], "b": [5, 6]}, xlabel="x", ylabel="y", scale="log", levels={"c": 7}).axes[0]
    assert [list(line.get_ydata()) for line in panel.lines] == [[3, 4], [5, 6], [7, 7]]


def test_the_roof_and_the_marks_on_it():
    machine = Machine("m", flops=100.0, bandwidth=10.0)
    assert machine.ridge == 10
    assert [machine.attainable(x) for x in (1, 10, 50)] == [10, 100, 100]
    roof, _, *marks = plot_roofline([machine], {"slow": 2.0, "fast": 40.0}).axes[0].lines
    assert [mark.get_ydata()[0] for mark in marks] == [20, 100]
    assert roof.get_xdata()[1] == 10


def test_bars_of_keys_and_values():
    configs = {name: published_model(name).config for name in PUBLISHED}
    published, own = plot_kv_per_token(configs).axes[0].containers
    assert [bar.get_width() for bar in published] == [KIB[name] for name in PUBLISHED]
    groups = [config.num_heads / config.num_kv_heads for config in configs.values()]
    assert [bar.get_width() for bar in own] == [KIB[name] * g for name, g in zip(PUBLISHED, groups, strict=True)]
    assert own_heads(configs["GLM-4-9B"]).num_kv_heads == 32


def test_reservations_add_up():
    requests = [(10, 5), (3, 40)]
    parts = Reservation.at(requests, max_len=50, step=8)
    assert parts.written.tolist() == [5, 8]
    assert parts.to_come.tolist() == [0, 32]
    assert parts.never.tolist() == [35, 7]
    assert parts.utilisation == pytest.approx(26 / 100)
    bars = plot_reservation(requests, max_len=50, step=8).axes[0].containers
    assert [[bar.get_width() for bar in kind] for kind in bars] == [[10, 3], [5, 8], [0, 32], [35, 7]]
    assert bars[3][0].get_x() == 15


def test_memory_beside_the_cards():
    panel = plot_kv_memory("Qwen3-8B", context=32768, batch=10, dtype="bfloat16").axes[0]
    weights, kept = panel.containers[0][0], panel.containers[1][0]
    assert weights.get_width() == pytest.approx(PARAMETERS["Qwen3-8B"] * 2 / 1e9)
    assert kept.get_width() == pytest.approx(10 * 32768 * 144 * 1024 / 1e9)
    assert kept.get_x() == weights.get_width()
    said = [text.get_text() for text in panel.texts]
    assert said == ["too small: room for 1", "fits: room for 13 such sequences", "fits: room for 25 such sequences"]


@pytest.mark.parametrize(
    ("name", "dtype", "fits"),
    [("GLM-4-9B", "bfloat16", False), ("SmolLM2-135M", "bfloat16", True), ("Llama-2-7B", "float32", False)],
)
def test_a_long_text_on_the_smallest_card(name, dtype, fits):
    said = plot_kv_memory(name, context=131072, batch=1, dtype=dtype).axes[0].texts[0].get_text()
    assert said.startswith("fits") == fits
    if dtype == "float32":
        assert said == "too small for the weights alone"


def test_float8_leaves_more_room():
    said = plot_kv_memory("Qwen3-8B", context=32768, batch=1, dtype="float8_e4m3fn").axes[0].texts[1].get_text()
    assert "29" in said


@pytest.mark.parametrize(
    ("number", "value"),
    [(0, "GLM-4-9B"), (1, 32768), (2, 40), (3, "float32")],
    ids=["model", "tokens", "batch", "dtype"],
)
def test_each_control_redraws_the_explorer(number, value):
    explorer = explore_kv_memory()
    controls, image = explorer.controls, explorer.image
    assert isinstance(image, ipywidgets.Image)
    before, was = bytes(image.value), controls[number].value
    assert before.startswith(PNG)
    controls[number].value = value
    assert bytes(image.value).startswith(PNG)
    assert image.value != before
    controls[number].value = was
    assert image.value == before
    assert not plt.get_fignums(), "the explorer leaves no figure open"
