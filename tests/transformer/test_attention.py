"""Attention by hand and fused, against float64 and each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.transformer.attention import attend, attention_mask, dot_product_attention, sdpa_attention


def float64_attention(q, k, v, mask, scale, soft_cap=None):
    """One head and one query at a time, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        scores = (k[b, h // group].double() @ q[b, h, i].double()) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        scores[~mask[min(b, mask.shape[0] - 1), 0, i]] = float("-inf")
        out[b, h, i] = scores.softmax(0) @ v[b, h // group].double()
    return out


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    queries=st.integers(1, 5),
    before=st.integers(0, 5),
    window=st.one_of(st.none(), st.integers(1, 6)),
    soft_cap=st.one_of(st.none(), st.just(2.0)),
    seed=st.integers(0, 100),
)
def test_both_ways_equal_float64(kv_heads, group, queries, before, window, soft_cap, seed):
    torch.manual_seed(seed)
    keys = before + queries
    q = torch.randn(2, kv_heads * group, queries, 8)
    k, v = torch.randn(2, kv_heads, keys, 8), torch.randn(2, kv_heads, keys, 8)
    steps = torch.arange(keys)
    mask = attention_mask(steps[before:], steps, window=window)[None, None]
    expected = float64_attention(q, k, v, mask, 0.3, soft_cap)
    by_hand = dot_product_attention(q, k, v, mask, scale=0.3, soft_cap=soft_cap)
    torch.testing.assert_close(by_hand.double(), expected, atol=1e-5, rtol=1e-5)
    if soft_cap is None:
        torch.testing.assert_close(sdpa_attention(q, k, v, mask, scale=0.3), by_hand, atol=1e-5, rtol=1e-5)
    if window is None and (queries == 1 or before == 0):
        torch.testing.assert_close(attend(q, k, v, scale=0.3, soft_cap=soft_cap), by_hand, atol=1e-5, rtol=1e-5)


def test_default_scale_is_one_over_root_head_dim():
    q, k, v = torch.randn(3, 1, 2, 4, 16)
    expected = dot_product_attention(q, k, v, scale=0.25)
    torch.testing.assert_close(dot_product_attention(q, k, v), expected)
    torch.testing.assert_close(sdpa_attention(q, k, v), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_a_query_sees_itself_and_what_it_may(causal):
    steps = torch.arange(5)
    mask = attention_mask(steps, steps, causal=causal, window=2)
    for query in range(5):
        for key in range(5):
            near = query - key in (0, 1) if causal else abs(query - key) <= 1
            assert bool(mask[query, key]) is near


def test_bfloat16_softmax_is_float32():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 1 if i == 0 else 2000, 16, dtype=torch.bfloat16) for i in range(3))
    expected = dot_product_attention(q.float(), k.float(), v.float())
    assert (dot_product_attention(q, k, v).float() - expected).abs().max() < 5e-3
