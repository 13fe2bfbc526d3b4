"""The engine's way through the layers against the blocks' own way."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numba")
from minillm.cache.backends import REFERENCE, attention_backend
from minillm.cache.block_pool import BlockPool
from minillm.cache.block_table import BlockTable
from minillm.cache.paged import PagedBatch, PagedKVCache
from minillm.transformer import fused
from minillm.transformer.decoder import Decoder, DecoderConfig, LayerConfig
from minillm.transformer.positions import RotaryConfig

ROTARY = RotaryConfig(16)
FORMS = {
    "llama": {},
    "qk norm": {"qk_norm": True},
    "sandwich, norm weights from 0": {"norm_placement": "sandwich", "norm_weight_offset": 1.0},
    "windows, partly rotary": {
        "layers": (LayerConfig(3, RotaryConfig(8, interleaved=True)), LayerConfig(None, None), LayerConfig(5, ROTARY))
    },
    "no gate, biases": {"gated": False, "qkv_bias": True, "feed_forward_bias": True, "attention_out_bias": True},
}


def decoder(**changes) -> Decoder:
    torch.manual_seed(0)
    layers = (LayerConfig(None, ROTARY),) * 3
    sizes = {"vocab_size": 50, "hidden_size": 48, "num_heads": 6, "num_kv_heads": 2, "head_dim": 16}
    more = {"intermediate_size": 64, "max_position_embeddings": 64, "layers": layers}
    model = Decoder(DecoderConfig(**{**sizes, **more, **changes}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


def paged_logits(model: Decoder, backend) -> torch.Tensor:
    """A prompt of 9 tokens and one of 2, then a step of one token each."""
    kv = PagedKVCache(model.config, 8, 4, backend=backend)
    pool = BlockPool(8, 4)
    tables = [BlockTable(pool), BlockTable(pool)]
    found = []
    for counts in ((9, 2), (1, 1)):
        starts = [table.num_tokens for table in tables]
        for table, count in zip(tables, counts, strict=True):
            table.append(count)
        ends = [table.num_tokens for table in tables]
        slots = [slot for table, at, to in zip(tables, starts, ends, strict=True) for slot in table.slots(at, to)]
        positions = torch.tensor([at for start, end in zip(starts, ends, strict=True) for at in range(start, end)])
        rows = torch.tensor([table.blocks + [0] * (4 - len(table.blocks)) for table in tables])
        edges = torch.tensor([0, *counts]).cumsum(0)
        kv.begin(PagedBatch(torch.tensor(slots), edges, torch.tensor(ends), rows, max(counts)))
        found.append(model(positions * 7 % 50, positions, kv))
    return torch.cat(found)


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_blocks_own_way(form, monkeypatch):
    model, numba = decoder(**FORMS[form]), attention_backend("numba", torch.device("cpu"))
    calls = []
    run = fused.run_layers
    monkeypatch.setattr(fused, "run_layers", lambda *arguments: calls.append(1) or run(*arguments))
    with torch.inference_mode():
        ours = paged_logits(model, numba)
        assert len(calls) == 2
        plain = paged_logits(model, REFERENCE)
    assert len(calls) == 2, "the reference goes the blocks' own way"
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"norm": "layer_norm"}, {"norm_placement": "post"}, {"final_norm": False}])
def test_other_blocks_go_their_own_way(changes, monkeypatch):
    monkeypatch.setattr(fused, "run_layers", None)
    model = decoder(**changes)
    with torch.inference_mode():
        ours = paged_logits(model, attention_backend("numba", torch.device("cpu")))
        torch.testing.assert_close(ours, paged_logits(model, REFERENCE), atol=1e-4, rtol=1e-4)


def test_gradients_go_the_blocks_own_way(monkeypatch):
    monkeypatch.setattr(fused, "run_layers", None)
    logits = paged_logits(decoder(), attention_backend("numba", torch.device("cpu")))
    assert torch.isfinite(logits).all()
