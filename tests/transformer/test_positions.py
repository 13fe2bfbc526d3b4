"""Positions: the formulas of the papers, and transformers' frequencies for every scaling."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minillm.models.family import rotary
from minillm.transformer.positions import (
    FrequencyFactors,
    LearnedPositions,
    RotaryConfig,
    RotaryEmbedding,
    apply_rotary,
    rotary_frequencies,
    sinusoidal_positions,
)


def test_sinusoidal_is_the_papers_formula():
    table = sinusoidal_positions(torch.arange(20), 10)
    for position in range(20):
        for i in range(5):
            angle = position / 10000 ** (2 * i / 10)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_learned_positions_start_at_the_offset():
    learned = LearnedPositions(10, 4, offset=2)
    torch.nn.init.normal_(learned.weight)
    assert learned.weight.shape == (12, 4)
    torch.testing.assert_close(learned(torch.tensor([0, 9])), learned.weight[[2, 11]])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 4])
def test_products_of_rotated_vectors_depend_on_distance_alone(interleaved, dim):
    torch.manual_seed(0)
    rope = RotaryEmbedding(RotaryConfig(dim, interleaved=interleaved))
    q, k = torch.randn(2, 1, 1, 8)

    def product(at: int, distance: int) -> float:
        rotate = [apply_rotary(x, rope(torch.tensor([p]), torch.float32)) for x, p in ((q, at + distance), (k, at))]
        return float((rotate[0] * rotate[1]).sum())

    for distance in (0, 1, 7):
        assert product(100, distance) == pytest.approx(product(3, distance), abs=1e-4)
    assert product(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-5)


def test_interleaved_is_the_same_rotation_of_reordered_channels():
    torch.manual_seed(0)
    x, positions = torch.randn(6, 2, 8), torch.arange(6)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    pairs = apply_rotary(x, RotaryEmbedding(RotaryConfig(8, interleaved=True))(positions, torch.float32))
    halves = apply_rotary(x[..., order], RotaryEmbedding(RotaryConfig(8))(positions, torch.float32))
    torch.testing.assert_close(pairs[..., order], halves)


def test_partial_rotary_leaves_the_rest():
    x = torch.randn(3, 2, 8)
    turned = apply_rotary(x, RotaryEmbedding(RotaryConfig(4))(torch.arange(3), torch.float32))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert not torch.equal(turned[1:, :, :4], x[1:, :, :4])


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn, all said": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn, factor said": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 1.3,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
def test_scaled_frequencies_are_transformers(name, form):
    scaling = SCALINGS[name]
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 131072}
    reference = LlamaConfig(**sizes, rope_parameters={"rope_theta": 500000.0, **scaling})
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](reference, "cpu")
    if form == "rope_parameters":
        config = rotary({**sizes, "rope_parameters": {"rope_theta": 500000.0, **scaling}})
    else:  # as config.json was before transformers 5; "type" is older still
        old = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
        config = rotary({**sizes, "rope_theta": 500000.0, "rope_scaling": old})
    ours, our_factor = rotary_frequencies(config)
    torch.testing.assert_close(ours, expected)
    assert our_factor == pytest.approx(factor)


def test_frequency_factors_divide():
    plain, _ = rotary_frequencies(RotaryConfig(8))
    divided, _ = rotary_frequencies(RotaryConfig(8, scaling=FrequencyFactors((1.0, 2.0, 4.0, 8.0))))
    torch.testing.assert_close(divided, plain / torch.tensor([1.0, 2.0, 4.0, 8.0]))
