"""The Numba paged attention against float64 attention over keys and values that were never paged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")
import numba

from minillm.kernels.cpu import paged_attention as kernel
from tests.kernels.paged import Case, float64_attention, make_case


def attend(case: Case, **options) -> torch.Tensor:
    longest = int(case.arguments[4].diff().max())
    return kernel.paged_attention(*case.arguments, max_query_len=longest, scale=case.scale, **options)


SHAPES = (
    {"group": 3, "head_dim": 16, "block_size": 16},
    {"group": 1, "head_dim": 80, "block_size": 5},
    {"group": 3, "head_dim": 64, "block_size": 16},
    {"group": 7, "head_dim": 128, "block_size": 16},
    {"group": 9, "head_dim": 33, "block_size": 16},
)


@st.composite
def cases(draw) -> Case:
    lengths = draw(st.lists(st.integers(1, 150) | st.integers(128, 260), min_size=1, max_size=5))
    queries = [draw(st.integers(1, min(length, 25)) | st.integers(min(length, 128), length)) for length in lengths]
    return make_case(
        queries,
        lengths,
        kv_heads=draw(st.sampled_from([1, 2])),
        **draw(st.sampled_from(SHAPES)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 100)),
    )


@settings(max_examples=120, deadline=None, derandomize=True)
@given(cases(), st.sampled_from([None, 1, 7, 100]), st.sampled_from([None, 5.0]), st.sampled_from([1, 10**6]))
def test_equals_float64(case, window, soft_cap, min_tiles):
    """Whatever the batch; unused blocks and slots hold NaN, which must not leak; on one thread and on several."""
    kernel.MIN_TILES_PER_THREAD, before = min_tiles, kernel.MIN_TILES_PER_THREAD
    try:
        ours = attend(case, window=window, soft_cap=soft_cap)
    finally:
        kernel.MIN_TILES_PER_THREAD = before
    expected = float64_attention(case, window=window, soft_cap=soft_cap)
    assert ours.dtype is case.arguments[0].dtype
    tolerance = 2e-5 if ours.dtype is torch.float32 else 2e-2
    torch.testing.assert_close(ours.double(), expected, atol=tolerance, rtol=tolerance)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from([None, 5.0]), st.sampled_from([1, 10**6]), st.sampled_from(SHAPES))
def test_a_common_beginning_is_read_for_all_at_once(data, soft_cap, min_tiles, shape):
    """Equal to float64, and the blocks in common are taken out of what single queries go over."""
    shared, size = data.draw(st.integers(1, 4)), shape["block_size"]
    own = data.draw(st.lists(st.integers(1, 60) | st.just(140), min_size=2, max_size=6))
    queries = [data.draw(st.integers(1, min(more, 20)) if more < 140 else st.sampled_from([1, 140])) for more in own]
    case = make_case(
        queries,
        [shared * size + more for more in own],
        kv_heads=2,
        **shape,
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        shared=shared,
    )
    few = [count for count, more in zip(queries, own, strict=True) if not kernel._are_many(count, shared * size + more)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "MIN_TILES_PER_THREAD", min_tiles)
        patch.setattr(kernel, "MIN_SHARED", 1)
        ours = attend(case, soft_cap=soft_cap)
        plan = kernel.plan(*case.arguments[3:], block_size=size, max_query_len=max(queries), window=None)
    if len(few) > 1:
        assert plan.shared.tolist() == case.arguments[3][0, :shared].tolist()
    tolerance = 2e-5 if ours.dtype is torch.float32 else 2e-2
    expected = float64_attention(case, soft_cap=soft_cap)
    torch.testing.assert_close(ours.double(), expected, atol=tolerance, rtol=tolerance)


def test_a_common_beginning_needs_to_be_worth_it_and_no_window():
    case = make_case([1] * 4, [70, 90, 80, 64], kv_heads=1, group=1, head_dim=16, block_size=16, shared=4)
    sizes = {"block_size": 16, "max_query_len": 1}
    assert len(kernel.plan(*case.arguments[3:], window=None, **sizes).shared) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "MIN_SHARED", 1)
        assert len(kernel.plan(*case.arguments[3:], window=50, **sizes).shared) == 0
        assert len(kernel.plan(*case.arguments[3:], window=None, **sizes).shared) == 3, "64 keys with the query itself"


@pytest.mark.parametrize("head_dim", [6, 20, 64, 72])
@pytest.mark.parametrize(("group", "block_size"), [(7, 1), (1, 8), (4, 32), (2, 64), (8, 6)])
def test_shapes_of_models(group, block_size, head_dim):
    case = make_case([1, 1, 3], [70, 1, 33], kv_heads=2, group=group, head_dim=head_dim, block_size=block_size)
    ours = attend(case)
    torch.testing.assert_close(ours.double(), float64_attention(case), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("threads", [2, 3, 7, 50])
def test_rows_cut_anywhere_are_put_together_again(threads, monkeypatch):
    """One long sequence, and several: the tiles are cut into so many parts, also through single rows."""
    monkeypatch.setattr(kernel, "MIN_TILES_PER_THREAD", 1)
    monkeypatch.setattr(kernel, "use_torch_threads", lambda: threads)  # this machine may have fewer
    for lengths in ([400], [3, 90, 20], [1, 1, 1]):
        case = make_case([1] * len(lengths), lengths, kv_heads=2, group=3, head_dim=16, block_size=8)
        ours = attend(case)
        torch.testing.assert_close(ours.double(), float64_attention(case), atol=2e-5, rtol=2e-5)


def test_a_window_whose_first_tiles_are_hidden_and_scores_far_below_zero():
    """Hidden tiles are not read at all; and a careless maximum would stay at zero."""
    case = make_case([1], [100], kv_heads=1, group=2, head_dim=16, block_size=16)
    q, k, *_ = case.arguments
    for keys in (k, *case.keys):
        keys.abs_().mul_(-50)
    q.abs_()
    expected = float64_attention(case, window=5)
    ours = attend(case, window=5)
    torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=1e-4)


def test_it_uses_as_many_threads_as_pytorch_and_compiles_once(monkeypatch):
    monkeypatch.setattr(kernel, "MIN_TILES_PER_THREAD", 1)
    case = make_case([1, 1], [200, 30], kv_heads=2, group=1, head_dim=16, block_size=8)
    compiled = None
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for rows in (1, 2):  # a table of one row is contiguous whatever its stride, one of two is not
            q, k, v, tables, starts, lengths = case.arguments
            wide = torch.zeros(2, tables.shape[1] + 5, dtype=torch.int64)[:, : tables.shape[1]]
            wide.copy_(tables)
            few = Case((q[:rows], k, v, wide[:rows], starts[: rows + 1], lengths[:rows]), case.scale, [], [])
            ours = attend(few)
            torch.testing.assert_close(ours.double(), float64_attention(case)[:rows], atol=2e-5, rtol=2e-5)
        assert numba.get_num_threads() == min(threads, numba.config.NUMBA_NUM_THREADS)
        compiled = compiled or len(kernel._attend.signatures)
    assert len(kernel._attend.signatures) == compiled


def test_a_sequence_without_keys_gets_zeros():
    case = make_case([1, 1], [20, 1], kv_heads=1, group=2, head_dim=16, block_size=16)
    case.arguments[5][1] = 0
    assert not attend(case)[1].any()


def test_what_it_does_not_take_goes_to_the_reference():
    case = make_case([1, 4], [20, 9], kv_heads=1, group=2, head_dim=16, block_size=4, dtype=torch.float16)
    ours = attend(case)
    torch.testing.assert_close(ours.double(), float64_attention(case), atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["query is NaN", "seen key is NaN", "query is infinite"])
@pytest.mark.parametrize("queries", [1, 140], ids=["a single query", "a prompt"])
def test_what_is_no_number_stays_none(queries, what, dtype):
    """Else a model that overflows would write plausible tokens."""
    case = make_case([queries], [140], kv_heads=1, group=3, head_dim=64, block_size=16, dtype=dtype, seed=0)
    q, k_cache, _, tables, *_ = case.arguments
    if what == "seen key is NaN":
        k_cache[tables[0, 2], 0, 3, 5] = torch.nan
    else:
        q[-1, 0, 5] = torch.nan if what == "query is NaN" else torch.inf
    assert attend(case)[-1, 0].isnan().all()
