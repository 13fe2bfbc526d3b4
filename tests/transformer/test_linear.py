"""Linear layers for a CPU against `F.linear`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.errors import ConfigError
from minillm.transformer import linear
from minillm.transformer.linear import Int4Linear, Int8Linear, PackedEmbedding, PackedLinear


@pytest.fixture(autouse=True, params=["kernels", "PyTorch"])
def way(request):
    """With gradients wanted, everything is PyTorch's own; without, few rows go to the kernels."""
    with torch.set_grad_enabled(request.param == "PyTorch"):
        yield


def weights(out=64, size=96, bias=True):
    torch.manual_seed(0)
    return torch.randn(out, size), torch.randn(out) if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (5, 96), (300, 96), (2, 3, 96), (0, 96)])
def test_packed_is_the_same_product(shape, bias):
    weight, added = weights(bias=bias)
    x = torch.randn(shape)
    torch.testing.assert_close(PackedLinear(weight, added)(x), F.linear(x, weight, added), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [64, 300])
@pytest.mark.parametrize("tokens", [(), (0,), (7,), (2, 3)])
@torch.no_grad()
def test_a_tied_table_is_read_in_the_head(tokens, vocabulary, dtype):
    table = weights(vocabulary, bias=False)[0].to(dtype)
    head = PackedLinear(table)
    if head.few is None:
        pytest.skip("oneDNN's layout is another one on this processor")
    asked = torch.randint(vocabulary, tokens)
    embedding = PackedEmbedding(head)
    assert torch.equal(embedding(asked), F.embedding(asked, table))
    assert torch.equal(embedding(torch.arange(vocabulary)), table)
    assert torch.equal(embedding.weight, table)
    for missing in (-1, vocabulary):
        with pytest.raises(IndexError, match=f"rows from 0 to {vocabulary - 1} can be looked up"):
            embedding(torch.tensor([0, missing]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(0, 96), (1, 96), (5, 96), (300, 96), (2, 3, 96)])
def test_int8_is_the_product_with_rounded_weights(shape, bias):
    weight, added = weights(bias=bias)
    layer, x = Int8Linear(weight, added), torch.randn(shape)
    rounded = layer.dequantized()
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((rounded - weight).abs() <= step / 2 + 1e-6).all()
    torch.testing.assert_close(layer(x), F.linear(x, rounded, added), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(0, 96), (1, 96), (5, 96), (300, 96), (2, 3, 96)])
def test_int4_is_the_product_with_rounded_weights(shape, bias):
    weight, added = weights(bias=bias)
    layer, x = Int4Linear(weight, added), torch.randn(shape)
    rounded = layer.dequantized()
    groups = weight.unflatten(1, (-1, linear.GROUP))
    step = (groups.amax(dim=2) - groups.amin(dim=2)) / 15
    error = (rounded - weight).abs().unflatten(1, (-1, linear.GROUP)).amax(dim=2)
    assert (error <= step / 2 + 1e-2 * step + 1e-5).all()
    torch.testing.assert_close(layer(x), F.linear(x, rounded, added), atol=2e-3, rtol=2e-3)


def test_constant_and_zero_weights_survive_rounding():
    for weight in (torch.zeros(16, 32), torch.full((16, 32), 0.5)):
        for kind in (Int8Linear, Int4Linear):
            x = torch.randn(3, 32)
            torch.testing.assert_close(kind(weight)(x), F.linear(x, weight), atol=1e-3, rtol=1e-3)


def test_every_layer_is_swapped_and_only_those():
    model = nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.ReLU(), nn.Linear(32, 16)), nn.LayerNorm(16))
    linear.quantize(model, "int4")
    assert [type(module).__name__ for module in model.modules() if not isinstance(module, nn.Sequential)] == [
        "Int4Linear",
        "ReLU",
        "Int4Linear",
        "LayerNorm",
    ]


def test_what_cannot_be_quantized_is_said():
    with pytest.raises(ConfigError, match="not one of int8, int4"):
        linear.quantize(nn.Sequential(nn.Linear(32, 32)), "fp8")
    with pytest.raises(ConfigError, match="and 0 has 24: take 'int8'"):
        linear.quantize(nn.Sequential(nn.Linear(24, 32)), "int4")
    with pytest.raises(ConfigError, match="is for a CPU"):
        linear.quantize(nn.Sequential(nn.Linear(32, 32, device="meta")), "int8")


def test_packing_is_left_out_where_the_operation_is_missing(monkeypatch):
    def missing(*_):
        raise RuntimeError("no such operation")

    monkeypatch.setattr(PackedLinear, "__init__", missing)
    model = nn.Sequential(nn.Linear(32, 32))
    assert not linear.pack(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("pays", [True, False])
def test_packing_is_measured(monkeypatch, pays):
    seconds = {PackedLinear: 1.0, nn.Linear: 2.0} if pays else {PackedLinear: 2.0, nn.Linear: 1.0}
    monkeypatch.setattr(linear, "_seconds", lambda layer, _: seconds[type(layer)])
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 64))
    assert linear.pack(model) is pays
    assert {type(layer) for layer in model} == {PackedLinear if pays else nn.Linear}


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4)])
def test_a_quantized_engine_answers_as_its_rounded_weights_do(kind, bits):
    """Every request's tokens are those of the same model with the dequantised weights in PyTorch's own layers."""
    from minillm import LLM, SamplingParams

    params, prompts = SamplingParams(temperature=0, max_tokens=16), ["Once upon a time", "Mia had a red kite."]
    with LLM("tiny", dtype="float32", quantization=kind, device="cpu") as llm:
        quantized = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
        decoder = llm._runner.decoder
        swapped = [module for module in decoder.modules() if isinstance(module, Int8Linear | Int4Linear)]
        assert len(swapped) == 4 * decoder.config.num_layers + 1, "each layer's four, and the head"
        for name, module in list(decoder.named_modules()):
            if module in swapped:
                plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
                plain.weight, plain.bias = nn.Parameter(module.dequantized(), False), module.bias
                parent, _, child = name.rpartition(".")
                setattr(decoder.get_submodule(parent), child, plain)
        llm.reset_prefix_cache()
        plain = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    assert quantized == plain


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_packed_decoder_gives_a_tied_table_back(tied):
    from tests.transformer.test_fused import decoder as small_decoder  # skips this test where there is no Numba

    decoder, tokens = small_decoder(tied_head=tied, vocab_size=300), torch.randint(300, (2, 7))
    table, before = decoder.embedding.weight, decoder(tokens)
    decoder.make_head()
    linear.swap_linears(decoder, PackedLinear)
    decoder.look_up_in_head()
    if decoder.head.few is None:
        pytest.skip("oneDNN's layout is another one on this processor")
    assert any(parameter is table for parameter in decoder.parameters()) is not tied
    assert (decoder.dtype, decoder.device) == (torch.float32, torch.device("cpu"))
    assert torch.equal(decoder.embed(tokens, tokens), F.embedding(tokens, table))
    torch.testing.assert_close(decoder(tokens), before, atol=1e-4, rtol=1e-4)
