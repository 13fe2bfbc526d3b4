"""The decoder: configuration errors, shapes, gradients; its numbers are tested family by family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minillm.cache.contiguous import ContiguousCache
from minillm.errors import ConfigError, InvalidRequestError
from minillm.transformer.decoder import Decoder, DecoderConfig, LayerConfig
from minillm.transformer.kv import PaddedBatch
from minillm.transformer.positions import RotaryConfig

CONFIG = DecoderConfig(50, 24, 3, 1, 8, 32, 64, (LayerConfig(rotary=RotaryConfig(8)),) * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 2}, "multiple of num_kv_heads"),
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1"),
        ({"activation": "sigmoid"}, "'sigmoid' is not one of"),
        ({"layers": (LayerConfig(rotary=RotaryConfig(10)),)}, "at most head_dim"),
        ({"layers": (LayerConfig(rotary=RotaryConfig(3)),)}, "must be even"),
        ({"layers": (LayerConfig(window=0),)}, "sliding window"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **change)


def test_calls_that_cannot_work_are_refused():
    decoder = Decoder(CONFIG)
    with pytest.raises(InvalidRequestError, match="batch, seq"):
        decoder(torch.tensor([1, 2, 3]))
    cache = ContiguousCache.for_decoder(decoder, 1, 8)
    cache.begin(PaddedBatch.full(1, 2))
    with pytest.raises(InvalidRequestError, match="positions"):
        decoder(torch.tensor([[1, 2]]), kv=cache)


@pytest.mark.parametrize("positions", ["none", "learned", "sinusoidal"])
def test_it_learns(positions):
    """Some steps on one sentence bring its loss down: gradients reach every parameter."""
    torch.manual_seed(0)
    decoder = Decoder(replace(CONFIG, positions=positions, tied_head=False))
    tokens = torch.randint(0, 50, (2, 12))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(decoder(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(50.0).log().item(), abs=0.3)
    assert losses[-1] < 0.1


def test_one_projection_for_q_k_v_and_one_for_gate_and_up():
    shapes = {name: tuple(p.shape) for name, p in Decoder(CONFIG).named_parameters() if name.startswith("layers.0")}
    assert shapes["layers.0.attention.qkv.weight"] == (5 * 8, 24)
    assert shapes["layers.0.feed_forward.gate_up.weight"] == (2 * 32, 24)
