"""The engine's way through the layers against the blocks' own way."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("numba")
from minillm.cache.backends import REFERENCE, attention_backend
from minillm.cache.block_pool import BlockPool
from minillm.cache.block_table import BlockTable
from minillm.cache.paged import PagedBatch, PagedKVCache
from minillm.kernels.cpu import paged_attention
from minillm.transformer import fused
from minillm.transformer.decoder import Decoder, DecoderConfig, LayerConfig
from minillm.transformer.linear import PackedLinear, swap_linears
from minillm.transformer.positions import RotaryConfig
from tests.kernels.test_packed_linear import few_rows

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


def paged_logits(model: Decoder, backend, steps=((9, 2), (1, 1))) -> torch.Tensor:
    """Logits of two sequences' tokens, so many of each in each step: prompts of 9 and 2, then a token each."""
    kv = PagedKVCache(model.config, 8, 4, dtype=model.dtype, backend=backend)
    pool = BlockPool(8, 4)
    tables = [BlockTable(pool), BlockTable(pool)]
    found = []
    for counts in steps:
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


FEW_STEPS = ((3, 1), (1, 2), (9, 2), (1, 1), (1, 1))
WHOLE = {
    "llama": {},
    "qk norm, norm weights from 0": {"qk_norm": True, "norm_weight_offset": 1.0},
    "windows, partly rotary, capped": {
        "layers": tuple(LayerConfig(window, RotaryConfig(8, interleaved=True)) for window in (3, None, 5, 5)),
        "attention_soft_cap": 2.0,
    },
    "biases": {"qkv_bias": True, "feed_forward_bias": True, "attention_out_bias": True},
    "units that do not fill a block": {"intermediate_size": 70, "hidden_size": 100},
}


class HandPacked(PackedLinear):
    """Laid out here instead of by oneDNN, so that the kernels have their layout on every machine."""

    def __init__(self, weight, bias=None):
        nn.Module.__init__(self)
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.few = few_rows(self.weight, self.bias)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", WHOLE)
def test_whole_layers_equal_the_blocks_own_way(form, dtype, monkeypatch):
    plain = decoder(**WHOLE[form])
    model = copy.deepcopy(plain).to(dtype)
    swap_linears(model, HandPacked)
    model.gather_layers()
    calls = []
    run = PagedKVCache.run_layers
    monkeypatch.setattr(PagedKVCache, "run_layers", lambda *arguments: calls.append(1) or run(*arguments))
    numba = attention_backend("numba", torch.device("cpu"), dtype)
    with torch.inference_mode():
        ours = paged_logits(model, numba, FEW_STEPS)
        rounded = plain.to(dtype).double()  # the same weights, computed exactly
        exact = paged_logits(rounded, REFERENCE, FEW_STEPS)
    limit = min(product.few.most_rows for product in model.modules() if isinstance(product, HandPacked))
    assert len(calls) == (5 if limit > 11 else 4), "the step of 11 tokens is for it where registers have 512 bits"
    tolerance = 1e-4 if dtype is torch.float32 else 2**-4
    assert (ours - exact).norm() < tolerance * exact.norm()
    if dtype is torch.float32:
        torch.testing.assert_close(ours.double(), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_placement": "sandwich"},
        {"gated": False},
        {"activation": "gelu_tanh"},
        {"layers": (LayerConfig(None, None), LayerConfig(None, ROTARY))},
        {"layers": (LayerConfig(None, RotaryConfig(8)), LayerConfig(None, ROTARY))},
    ],
)
def test_other_layers_are_not_gathered(changes):
    model = decoder(**changes)
    swap_linears(model, HandPacked)
    model.gather_layers()
    assert model.gathered is None


def test_layers_that_are_not_packed_are_not_gathered():
    model = decoder()
    model.gather_layers()
    assert model.gathered is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sequences", "qk_norm"), [(2, False), (40, False), (40, True)])
def test_whole_layers_of_a_batch_with_a_common_beginning(sequences, qk_norm, dtype, monkeypatch):
    """One layer of three sees but five tokens, the others read what is common once for all; on several threads."""
    monkeypatch.setattr(paged_attention, "MIN_SHARED", 1)
    layers = tuple(LayerConfig(window, RotaryConfig(8)) for window in (None, 5, None))
    plain = decoder(layers=layers, qk_norm=qk_norm)
    model = copy.deepcopy(plain).to(dtype)
    swap_linears(model, HandPacked)
    model.gather_layers()
    assert model.gathered is not None
    model.gathered = model.gathered._replace(most_tokens=64)
    numba = attention_backend("numba", torch.device("cpu"), dtype)
    calls = []
    run = PagedKVCache.run_layers
    monkeypatch.setattr(PagedKVCache, "run_layers", lambda *arguments: calls.append(1) or run(*arguments))
    with torch.inference_mode():
        ours = sharing_logits(model, numba, sequences)
        exact = sharing_logits(plain.to(dtype).double(), REFERENCE, sequences)
    assert len(calls) == 2, "each sequence's own prompt, and the decode step"
    tolerance = 1e-4 if dtype is torch.float32 else 2**-4
    assert (ours - exact).norm() < tolerance * exact.norm()


def sharing_logits(model, backend, sequences: int) -> torch.Tensor:
    """Logits of a decode step of sequences that begin with the same three blocks."""
    shared, size = 3, 4
    kv = PagedKVCache(model.config, shared + sequences, size, dtype=model.dtype, backend=backend)
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (shared * size + sequences,), generator=rng)
    tables = torch.tensor([[*range(shared), shared + number] for number in range(sequences)])
    length = shared * size
    kv.begin(PagedBatch(torch.arange(length), torch.tensor([0, length]), torch.tensor([length]), tables[:1], length))
    model(tokens[:length], torch.arange(length), kv)
    slots, lengths = (shared + torch.arange(sequences)) * size, torch.full((sequences,), length + 1)
    kv.begin(PagedBatch(slots, torch.arange(sequences + 1), lengths, tables, 1))
    return model(tokens[length:], torch.full((sequences,), length), kv)
