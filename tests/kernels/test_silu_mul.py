"""The Numba gate against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("numba")
from minillm.kernels.cpu.silu_mul import silu_mul, supports


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 6), (3, 2000), (70, 64), (2, 40, 10)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_equals_float64(shape, scale, dtype):
    torch.manual_seed(0)
    gate_up = (torch.randn(shape) * scale).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    tolerance = 1e-5 if dtype is torch.float32 else 2**-8
    ours = silu_mul(gate_up)
    assert ours.dtype is dtype
    torch.testing.assert_close(ours.double(), F.silu(gate) * up, atol=1e-20, rtol=tolerance)


def test_it_says_what_it_takes():
    assert supports(torch.randn(2, 4))
    assert not supports(torch.randn(4, 2).T)
    assert not supports(torch.randn(2, 4).double())
