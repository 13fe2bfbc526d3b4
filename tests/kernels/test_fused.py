"""Two operations in one kernel against the two in PyTorch: residual sum + RMSNorm, rotary positions + key/value write.

On the CPU by Numba, and by Triton in its interpreter.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from minillm.cache import reference
from minillm.transformer.positions import RotaryConfig, RotaryEmbedding, apply_rotary

MODULES = {"numba": "minillm.kernels.cpu", "triton": "minillm.kernels.gpu"}
DTYPES = [torch.float32, torch.bfloat16]
GPU = "cuda" if torch.cuda.is_available() else "cpu"


class Kernels:
    """A package of kernels, fed with tensors of the CPU."""

    def __init__(self, name: str) -> None:
        self.package = MODULES[name]
        self.device = GPU if name == "triton" else "cpu"

    def call(self, module, function, *arguments, **options):
        given = [x.to(self.device) if isinstance(x, torch.Tensor) else x for x in arguments]
        found = getattr(importlib.import_module(f"{self.package}.{module}"), function)(*given, **options)
        return found.cpu() if isinstance(found, torch.Tensor) else tuple(x.cpu() for x in found)


@pytest.fixture(params=MODULES)
def kernels(request):
    pytest.importorskip(request.param)
    return Kernels(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 64), (5, 96), (3, 576), (67, 64)])
def test_residual_sum_and_norm(kernels, shape, weight_offset, dtype):
    torch.manual_seed(0)
    x, added, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    before, total = x.clone(), x.to(kernels.device)
    normed = kernels.call("rms_norm", "add_rms_norm", total, added, weight, 1e-6, weight_offset)
    total = total.cpu()
    # Triton's interpreter cuts bfloat16's last bits off, where a GPU rounds them.
    torch.testing.assert_close(total, before + added, atol=0, rtol=0 if dtype is torch.float32 else 2**-7)
    exact = total.double() / (total.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    exact = exact * (weight.double() + weight_offset)
    tolerance = 1e-5 if dtype is torch.float32 else 2**-7
    torch.testing.assert_close(normed.double(), exact, atol=1e-6, rtol=tolerance)
    torch.testing.assert_close(kernels.call("rms_norm", "rms_norm", total, weight, 1e-6, weight_offset), normed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_norm_of_heads_in_a_packed_projection(kernels, tokens, dtype):
    torch.manual_seed(0)
    packed, weight = torch.randn(tokens, 6, 32, dtype=dtype).to(kernels.device), torch.randn(32).to(dtype)
    heads = packed[:, 1:4]
    module = importlib.import_module(f"{kernels.package}.rms_norm")
    assert module.supports(heads, weight.to(kernels.device))
    ours = module.rms_norm(heads, weight.to(kernels.device), 1e-6).cpu().double()
    exact = torch.nn.functional.rms_norm(heads.cpu().double(), (32,), weight.double(), 1e-6)
    tolerance = 1e-5 if dtype is torch.float32 else 2**-7
    torch.testing.assert_close(ours, exact, atol=1e-6, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "dim"), [(9, 3, 64, 64), (4, 2, 32, 16), (2, 1, 80, 80)])
@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("several_threads", [False, True])
def test_rotary_and_write(
    kernels, heads, kv_heads, head_dim, dim, interleaved, block_size, several_threads, dtype, monkeypatch
):
    if several_threads:
        if kernels.package == MODULES["triton"]:
            pytest.skip("a GPU has no such choice")
        monkeypatch.setattr("minillm.kernels.cpu.rotary.MANY_TOKENS", 1)
    torch.manual_seed(0)
    packed = torch.randn(5, heads + 2 * kv_heads, head_dim).to(dtype)
    q, k, v = packed.split([heads, kv_heads, kv_heads], dim=1)
    rotation = RotaryEmbedding(RotaryConfig(dim, interleaved=interleaved))(torch.tensor([0, 7, 1, 90, 3]), dtype)
    slots = torch.tensor([9, reference.NO_SLOT, 0, 13, 6])
    cache = torch.randn(2, 16 // block_size, kv_heads, block_size, head_dim).to(dtype)
    expected = cache.clone()
    exact = rotation._replace(cos=rotation.cos.double(), sin=rotation.sin.double())
    turned_k = apply_rotary(k.double(), exact).to(dtype)
    reference.write_kv(*expected, turned_k, v, slots)
    cache = cache.to(kernels.device)
    turned_q = kernels.call(
        "rotary", "rotate_and_write", q, k, v, rotation.cos, rotation.sin, *cache, slots, interleaved=interleaved
    )
    cache = cache.cpu()
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(cache, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(cache[1], expected[1], atol=0, rtol=0)  # values are only copied
    torch.testing.assert_close(turned_q.double(), apply_rotary(q.double(), exact), atol=tolerance, rtol=tolerance)
