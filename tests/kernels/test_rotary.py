"""The Numba rotary positions against `apply_rotary` in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numba")
from minillm.kernels.cpu import rotary
from tests.kernels.paged import check_rotary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "dim"), [(9, 3, 64, 64), (4, 2, 32, 16)])
def test_rotary(heads, kv_heads, head_dim, dim, interleaved, dtype):
    check_rotary(rotary, heads, kv_heads, head_dim, dim, interleaved, dtype, "cpu")
