"""Products of rounded weights in Numba against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")
from minillm.kernels.cpu.quantized import int4_product, int8_product

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""Relative to the largest result."""


def check(ours, exact, dtype):
    assert ours.dtype is dtype
    assert (ours.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 16),
    out=st.sampled_from([1, 3, 64, 700]),
    size=st.sampled_from([1, 31, 96, 576]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
)
def test_int8(rows, out, size, dtype, seed):
    torch.manual_seed(seed)
    numbers, scale = torch.randint(-128, 128, (out, size), dtype=torch.int8), torch.rand(out).to(dtype)
    x = torch.randn(rows, size).to(dtype)
    check(int8_product(x, numbers, scale), x.double() @ (numbers.double() * scale.double()[:, None]).T, dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 16),
    out=st.sampled_from([1, 3, 64, 700]),
    groups=st.integers(1, 18),
    half=st.sampled_from([1, 8, 16]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
)
def test_int4(rows, out, groups, half, dtype, seed):
    """In a byte, the lower half is of the first half of its group, the upper half of the second."""
    torch.manual_seed(seed)
    pairs = torch.randint(0, 256, (out, groups, half), dtype=torch.uint8)
    scale, low = torch.rand(out, groups).to(dtype), torch.randn(out, groups).to(dtype)
    x = torch.randn(rows, groups * 2 * half).to(dtype)
    numbers = torch.cat([pairs & 15, pairs >> 4], dim=2).double()
    weight = (numbers * scale.double()[..., None] + low.double()[..., None]).flatten(1)
    check(int4_product(x, pairs, scale, low), x.double() @ weight.T, dtype)
