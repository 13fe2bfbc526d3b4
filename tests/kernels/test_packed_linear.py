"""Products of a few rows with weights that oneDNN has laid out, against float64."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")
from minillm.kernels.cpu import compiler, packed_linear
from minillm.kernels.cpu.bfloat16 import bits
from minillm.kernels.cpu.packed_linear import SIDE_BY_SIDE, WIDTHS, FewRows, product
from minillm.transformer.linear import PackedLinear

DTYPES = [torch.float32, torch.bfloat16]


def few_rows(weight: torch.Tensor, bias: torch.Tensor | None, width: int = WIDTHS[0]) -> FewRows:
    """A weight laid out as oneDNN does where the kernel can read it: blocks of outputs, filled up with zeros."""
    side_by_side = SIDE_BY_SIDE[weight.dtype]
    outputs, inputs = weight.shape
    full = torch.zeros(-(-outputs // width) * width, inputs, dtype=weight.dtype)
    full[:outputs] = weight
    blocks = full.view(-1, width, inputs // side_by_side, side_by_side).transpose(1, 2).contiguous()
    nothing = torch.empty(0, dtype=weight.dtype)
    return FewRows(
        blocks,
        bits(blocks).reshape(*blocks.shape[:2], -1),
        bits(nothing if bias is None else bias),
        outputs,
        packed_linear.most_rows(weight.dtype, width),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 6) | st.integers(7, 96),
    outputs=st.integers(1, 300),
    half_inputs=st.integers(1, 200),
    has_bias=st.booleans(),
    width=st.sampled_from(WIDTHS),
    seed=st.integers(0, 99),
)
def test_equals_float64(dtype, rows, outputs, half_inputs, has_bias, width, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, 2 * half_inputs).to(dtype), torch.randn(outputs, 2 * half_inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if has_bias else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    ours = product(x, few_rows(weight, bias, width))
    assert ours.dtype is dtype
    tolerance = (1e-5, 3e-6) if dtype is torch.float32 else (2**-8, 1e-4)
    size = (2 * half_inputs) ** 0.5
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance[0], atol=tolerance[1] * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 5, 13, 96])
@pytest.mark.parametrize("width", WIDTHS)
def test_blocks_divided_among_threads(dtype, rows, width):
    """Enough weights for two threads, an odd number of blocks for each, and inputs that are no multiple of a tile."""
    torch.manual_seed(0)
    outputs, inputs = width * 71 - 5, 334
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((rows, inputs), (outputs, inputs), (outputs,)))
    exact = F.linear(x.double(), weight.double(), bias.double())
    tolerance = 1e-5 if dtype is torch.float32 else 2**-8
    ours = product(x, few_rows(weight, bias, width)).double()
    torch.testing.assert_close(ours, exact, rtol=tolerance, atol=1e-4)


def test_numbers_of_another_dtype_are_not_read_as_the_weights():
    layer = PackedLinear(torch.randn(64, 64))
    with torch.inference_mode(), pytest.raises(RuntimeError):
        layer(torch.randn(1, 64).half())


def test_512_bits_are_asked_for_before_numba_asks_the_processor():
    program = (
        "import llvmlite.binding as b; b.get_host_cpu_features = lambda: {'avx512f': True}\n"
        "import numba.core.codegen as c; c.get_host_cpu_features = lambda: ''\n"
        "import minillm.kernels.cpu.paged_attention\n"
        "from numba.core.registry import cpu_target\n"
        "print(cpu_target.target_context.codegen()._tm_features)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "-prefer-256-bit" in found.stdout


def test_code_that_was_compiled_of_other_sources_is_dropped(tmp_path):
    (tmp_path / "kernel.py").write_text("1")
    compiler.drop_old_code(tmp_path)
    code = tmp_path / "__pycache__" / "kernel.nbi"
    code.write_text("compiled")
    compiler.drop_old_code(tmp_path)
    assert code.exists(), "nothing has changed"
    (tmp_path / "other.py").write_text("2")
    compiler.drop_old_code(tmp_path)
    assert not code.exists()


def test_a_thread_without_tiles_writes_nothing():
    words, x = np.ones((4, 8, packed_linear.WIDE), np.float32), np.ones((12, 8), np.float32)
    out = np.full((12, 4 * packed_linear.WIDE), -1, np.float32)
    packed_linear._some_tiles(words, x, np.zeros((6, 8), np.float32), np.empty(0, np.float32), out, 1, 1)
    assert (out == -1).all()
    packed_linear._some_tiles(words, x, np.zeros((6, 8), np.float32), np.empty(0, np.float32), out, 1, 2)
    assert (out[6:, : packed_linear.WIDE] == 8).all()
    assert (out == -1).sum() == out.size - 6 * packed_linear.WIDE


@pytest.mark.parametrize("sizes", [(960, 576), (3072, 576), (1, 1), (3, 5), (90, 50), (384, 128), (65, 64), (8192, 64)])
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_whatever_layout_onednn_takes_the_layer_is_right(sizes, rows):
    torch.manual_seed(0)
    weight = torch.randn(sizes)
    try:
        layer = PackedLinear(weight)
    except (RuntimeError, AttributeError):
        pytest.skip("this PyTorch does not pack weights")
    x = torch.randn(rows, sizes[1])
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), F.linear(x, weight), atol=1e-4, rtol=1e-4)


def test_another_layout_is_noticed(monkeypatch):
    """As many bytes in another order: the trial product differs, and oneDNN does all of them."""
    weight = torch.randn(128, 64)
    try:
        layer = PackedLinear(weight)
    except (RuntimeError, AttributeError):
        pytest.skip("this PyTorch does not pack weights")
    if layer.few is None:
        pytest.skip("oneDNN takes another layout here already")
    monkeypatch.setattr(packed_linear, "views", lambda *_: [few_rows(weight.flip(0), None)])
    layer = PackedLinear(weight)
    assert layer.few is None
    with torch.inference_mode():
        torch.testing.assert_close(layer(weight[:1]), F.linear(weight[:1], weight), atol=1e-4, rtol=1e-4)
