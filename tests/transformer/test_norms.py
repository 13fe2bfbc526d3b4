"""Norms against float64."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

from minillm.cache.backends import REFERENCE, attention_backend
from minillm.transformer import twins
from minillm.transformer.norms import LayerNorm, RMSNorm


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_is_the_formula(grad, offset):
    torch.manual_seed(0)
    norm = RMSNorm(24, eps=1e-3, weight_offset=offset)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 24)
    with torch.set_grad_enabled(grad):
        ours = norm(x)
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * (norm.weight.double() + offset)
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=1e-5)
    assert ours.requires_grad is grad


def test_fresh_norms_scale_by_one():
    x = torch.randn(5, 16)
    torch.testing.assert_close(RMSNorm(16)(x), RMSNorm(16, weight_offset=1.0)(x))


def test_layer_norm_is_the_formula():
    torch.manual_seed(0)
    norm, x = LayerNorm(24, eps=1e-3), torch.randn(2, 3, 24).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    expected = (x - mean) / (variance + 1e-3).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x.float()).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def no_kernels(monkeypatch):
    """As in an installation without Numba."""
    for name in [name for name in sys.modules if name.startswith("minillm.kernels.cpu.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "minillm.kernels.cpu", None)
    _forget()
    yield
    _forget()


def _forget():
    twins._load.cache_clear()
    twins._warned.clear()


def test_without_kernels_it_warns_once_and_goes_on(no_kernels):
    norm, x = RMSNorm(16), torch.randn(2, 16)
    with torch.inference_mode():
        with pytest.warns(RuntimeWarning, match="minillm env"):
            first = norm(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = norm(x)
            assert attention_backend("auto", torch.device("cpu")) is REFERENCE
    torch.testing.assert_close(first, second)
