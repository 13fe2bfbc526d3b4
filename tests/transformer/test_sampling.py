"""The logit transforms against transformers' warpers, and the draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from minillm.errors import InvalidRequestError
from minillm.transformer.sampling import (
    GREEDY,
    Sampling,
    apply_temperature,
    keep_min_p,
    keep_top_k,
    keep_top_p,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), k=st.integers(1, 60), p=st.floats(0.01, 0.99), t=st.floats(0.1, 3.0))
def test_each_transform_is_transformers(seed, k, p, t):
    torch.manual_seed(seed)
    logits = torch.randn(3, 50) * 3
    ids = torch.zeros(3, 1, dtype=torch.long)
    torch.testing.assert_close(apply_temperature(logits, t), TemperatureLogitsWarper(t)(ids, logits))
    torch.testing.assert_close(keep_top_k(logits, k), TopKLogitsWarper(k)(ids, logits))
    torch.testing.assert_close(keep_top_p(logits, p), TopPLogitsWarper(p)(ids, logits))
    torch.testing.assert_close(keep_min_p(logits, p), MinPLogitsWarper(p)(ids, logits))


@pytest.mark.parametrize("sharpness", [[0.0, 0.05, 0.5, 4.0], [4.0, 4.0, 4.0, 4.0]])
def test_top_p_of_a_large_vocabulary_is_transformers(sharpness):
    """Rows whose nucleus is nearly all, thousands, hundreds, and a few tokens."""
    torch.manual_seed(0)
    logits = torch.randn(4, 20_000) * torch.tensor(sharpness)[:, None] - torch.arange(20_000) * 1e-5
    ps = torch.tensor([[0.9], [0.5], [0.7], [0.95]])
    expected = torch.cat([TopPLogitsWarper(float(p))(None, row[None]) for p, row in zip(ps, logits, strict=True)])
    differs = (keep_top_p(logits, ps) != expected).sum(dim=-1)
    assert (differs <= 3).all(), "sums of thousands of probabilities, rounded in another order, may differ by a token"


def test_the_likeliest_always_stays():
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    for kept in (keep_top_k(logits, 1), keep_top_p(logits, 1e-9), keep_min_p(logits, 1.0)):
        assert kept.argmax() == 1
        assert torch.isinf(kept).sum() == 2


def test_ties_at_the_edge_of_top_k_all_stay():
    assert torch.isinf(keep_top_k(torch.tensor([[1.0, 1.0, 0.0]]), 1)).sum() == 1


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20000, -1)
    sampling = Sampling(temperature=0.7, top_k=3, seed=3)
    drawn = sampling.choose(logits, sampling.generator())
    expected = torch.tensor([0.0, 1.0, 2.0, float("-inf")]).div(0.7).softmax(0)
    torch.testing.assert_close(drawn.bincount(minlength=4) / 20000, expected, atol=0.015, rtol=0)


def test_a_seed_repeats_and_greedy_needs_none():
    logits = torch.randn(4, 100)
    draws = [Sampling(seed=7).choose(logits, Sampling(seed=7).generator()).tolist() for _ in range(2)]
    assert draws[0] == draws[1]
    assert GREEDY.choose(logits, GREEDY.generator()).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": float("inf")}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\]"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\]"),
        ({"min_p": float("nan")}, r"min_p must be in \[0, 1\]"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(InvalidRequestError, match=message):
        Sampling(**values)
