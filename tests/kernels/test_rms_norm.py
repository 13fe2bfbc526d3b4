"""The Numba RMSNorm against PyTorch's and float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")
from minillm.kernels.cpu.rms_norm import rms_norm, supports


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.lists(st.integers(1, 4), max_size=3),
    size=st.integers(1, 200),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=st.integers(0, 100),
)
def test_float32_equals_float64(batch, size, scale, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(*batch, size) * scale, torch.randn(size)
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, 1e-6).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 7, 64, 576])
def test_bfloat16_rounds_once(size):
    torch.manual_seed(size)
    x, weight = torch.randn(5, size).bfloat16(), torch.randn(size).bfloat16()
    x32, weight32 = x.float(), weight.float()
    exact = x32 / (x32.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight32
    ours = rms_norm(x, weight, 1e-5).float()
    # Half a unit in the last of bfloat16's 8 bits, and the little that float32 rounds differently.
    assert ((ours - exact).abs() <= exact.abs() * 2**-8).all()


def test_infinities_and_nan_pass_through_float32():
    x = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    ours = rms_norm(x, torch.ones(2), 1e-6)
    assert torch.isnan(ours[0]).all()
    assert torch.isfinite(ours[1]).all()


def test_it_says_what_it_takes():
    x = torch.randn(4, 8)
    assert supports(x, torch.ones(8))
    assert supports(x.T, torch.ones(4))
    assert not supports(x.half(), torch.ones(8).half())
    assert not supports(x, torch.ones(8).bfloat16())
