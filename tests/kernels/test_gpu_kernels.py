"""The Triton kernels in Triton's interpreter (on a GPU: themselves) against float64 and PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from minillm.cache import reference
from minillm.kernels.gpu import paged_attention as kernel
from minillm.kernels.gpu import rms_norm, rotary
from minillm.kernels.gpu.silu_mul import silu_mul
from minillm.kernels.gpu.write_kv import write_kv
from tests.kernels.paged import Case, check_rotary, float64_attention, make_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def attend(case: Case, queries: list[int], **options) -> torch.Tensor:
    return kernel.paged_attention(*case.arguments, max_query_len=max(queries), scale=case.scale, **options).cpu()


def check(case: Case, queries: list[int], dtype: torch.dtype, **options) -> None:
    """The kernel's dtype is the queries', and its numbers are those of float64."""
    ours, expected = attend(case, queries, **options), float64_attention(case, **options)
    assert ours.dtype is dtype
    torch.testing.assert_close(ours.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    data=st.data(),
    group=st.sampled_from([1, 3, 4, 7]),
    head_dim=st.sampled_from([16, 64, 80]),
    block_size=st.sampled_from([1, 8, 16, 32]),
    dtype=st.sampled_from(DTYPES),
    window=st.sampled_from([None, 1, 9, 60]),
    soft_cap=st.sampled_from([None, 5.0]),
)
def test_equals_float64(lengths, data, group, head_dim, block_size, dtype, window, soft_cap):
    """Ragged lengths, scattered blocks; unused slots hold NaN, which must not leak."""
    queries = [data.draw(st.integers(1, min(length, 20))) for length in lengths]
    case = make_case(
        queries,
        lengths,
        kv_heads=2,
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        device=DEVICE,
        seed=data.draw(st.integers(0, 99)),
    )
    check(case, queries, dtype, window=window, soft_cap=soft_cap)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("queries", [[1, 1, 1], [40, 1, 5]])
def test_second_and_third_tiles_in_half_precision(queries, window, dtype):
    """Tiles are 128 keys for single queries and 64 for prompts; one length ends with a tile, one just behind one."""
    assert kernel.tile_of(dtype, 64, 4, 1).keys == 128
    case = make_case(
        queries, [300, 129, 128], kv_heads=2, group=4, head_dim=64, block_size=16, dtype=dtype, device=DEVICE
    )
    check(case, queries, dtype, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [4, 40])
def test_rows_that_see_nothing_of_their_first_tile(window, dtype):
    """A tile of queries begins at the keys that its first query sees; windows of later queries begin tiles later."""
    queries, lengths = [150, 70], [150, 200]
    case = make_case(queries, lengths, kv_heads=1, group=1, head_dim=16, block_size=16, dtype=dtype, device=DEVICE)
    check(case, queries, dtype, window=window)


@pytest.mark.parametrize("splits", [2, 3, 8])
@pytest.mark.parametrize("window", [None, 40])
def test_split_keys_are_put_together_again(splits, window, monkeypatch):
    """More splits than a short sequence has tiles: some have nothing to say."""
    monkeypatch.setattr(kernel, "num_splits", lambda *_: splits)
    queries, lengths = [1, 1, 1], [300, 5, 64]
    case = make_case(queries, lengths, kv_heads=2, group=3, head_dim=16, block_size=16, device=DEVICE)
    check(case, queries, torch.float32, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"window": 150}, {"soft_cap": 5.0}], ids=str)
def test_splits_that_the_kernel_chooses(options, dtype, monkeypatch):
    monkeypatch.setattr(kernel, "MIN_KEYS_PER_SPLIT", 64)
    monkeypatch.setattr(kernel, "_processors", lambda _: 4)
    assert kernel.num_splits(programs=6, max_keys=320, processors=4) == 3
    queries, lengths = [1, 1, 1], [300, 129, 5]
    case = make_case(queries, lengths, kv_heads=2, group=3, head_dim=64, block_size=16, dtype=dtype, device=DEVICE)
    check(case, queries, dtype, **options)


def test_splits_fill_the_chip_and_no_more():
    assert kernel.num_splits(programs=8, max_keys=65_536, processors=132) == kernel.MAX_SPLITS
    assert kernel.num_splits(programs=264, max_keys=65_536, processors=132) == 2
    assert kernel.num_splits(programs=2048, max_keys=65_536, processors=132) == 1
    assert kernel.num_splits(programs=1, max_keys=100, processors=132) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [None, 9])
def test_a_sequence_without_keys_gets_zeros(window, splits, dtype, monkeypatch):
    """As a CUDA graph's padding has them: length 0, nothing is read. What stands beside it is right."""
    monkeypatch.setattr(kernel, "num_splits", lambda *_: splits)
    case = make_case([1, 1], [200, 1], kv_heads=1, group=2, head_dim=16, block_size=16, dtype=dtype, device=DEVICE)
    expected = float64_attention(case, window=window)[0]
    case.arguments[5][1] = 0
    ours = attend(case, [1, 1], window=window)
    assert torch.equal(ours[1], torch.zeros_like(ours[1]))
    torch.testing.assert_close(ours[0].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.sampled_from([(1, 16), (3, 64), (2, 80)]), st.sampled_from([1, 5, 16]), st.integers(0, 99))
def test_keys_and_values_go_to_their_slots(tokens, shape, block_size, seed):
    torch.manual_seed(seed)
    heads, dim = shape
    caches = torch.zeros(2, 8, heads, block_size, dim, device=DEVICE)
    packed = torch.randn(tokens, 3 * heads, dim, device=DEVICE)  # k and v as they come out of the packed projection
    k, v = packed[:, heads : 2 * heads], packed[:, 2 * heads :]
    slots = torch.randperm(8 * block_size, device=DEVICE)[:tokens]
    slots[torch.rand(len(slots), device=DEVICE) < 0.2] = reference.NO_SLOT
    expected = caches.clone()
    reference.write_kv(*expected, k[: len(slots)], v[: len(slots)], slots)
    write_kv(*caches, k[: len(slots)], v[: len(slots)], slots)
    assert torch.equal(caches, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "size"), [((1,), 64), ((3, 2), 576), ((5,), 1000)])
def test_rms_norm(rows, size, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(*rows, 2 * size).to(dtype)[..., :size], torch.randn(size).to(dtype)
    expected = torch.nn.functional.rms_norm(x.double(), (size,), weight.double(), 1e-5)
    x, weight = x.to(DEVICE), weight.to(DEVICE)
    assert rms_norm.supports(x, weight)
    ours = rms_norm.rms_norm(x, weight, 1e-5).cpu()
    torch.testing.assert_close(ours.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 1000, 1500])
def test_silu_mul(size, dtype):
    torch.manual_seed(0)
    gate_up = torch.randn(3, 2 * size).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    ours = silu_mul(gate_up.to(DEVICE)).cpu()
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(ours.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "dim"), [(9, 3, 64, 64), (4, 2, 32, 16), (2, 1, 80, 80)])
def test_rotary(heads, kv_heads, head_dim, dim, interleaved, dtype):
    check_rotary(rotary, heads, kv_heads, head_dim, dim, interleaved, dtype, DEVICE)
