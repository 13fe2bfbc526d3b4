"""The n-gram: a proper distribution, and the formula of its source."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.errors import ConfigError, InvalidRequestError
from minillm.training.ngram import NGram

TEXTS = st.lists(st.lists(st.integers(0, 5), max_size=12), max_size=5)


@given(TEXTS, st.lists(st.integers(0, 5), max_size=6), st.integers(1, 4))
def test_probabilities_sum_to_one(texts, context, order):
    model = NGram(order, 6)
    model.train(texts)
    assert sum(model.probability(context, token) for token in range(6)) == pytest.approx(1)


def test_witten_bell_by_hand():
    model = NGram(2, 3)
    model.train([[0, 1, 0, 1, 0, 2]])
    unigram = (2 + 3 / 3) / (6 + 3)  # of 1: seen twice in six, three kinds
    assert model.probability([], 1) == pytest.approx(unigram)
    assert model.probability([2, 0], 1) == pytest.approx((2 + 2 * unigram) / (3 + 2))  # after 0: 1, 1, 2
    assert model.probability([2], 1) == pytest.approx(unigram)  # nothing has followed 2


def test_perplexity():
    model = NGram(3, 4)
    assert model.perplexity([[0, 1, 2, 3]]) == pytest.approx(4)  # untrained: all alike
    model.train([[0, 1, 2, 3]] * 50)
    logs = [math.log(model.probability([0, 1, 2][:at], at)) for at in (1, 2, 3)]
    assert model.perplexity([[0, 1, 2, 3]]) == pytest.approx(math.exp(-sum(logs) / 3))
    assert model.perplexity([[0, 1, 2, 3]]) < 1.2


def test_order_below_one_is_refused():
    for order, vocab_size in ((0, 5), (5, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            NGram(order, vocab_size)


def test_perplexity_of_nothing_is_refused():
    for documents in ([], [[3]]):
        with pytest.raises(InvalidRequestError, match="two tokens"):
            NGram(2, 5).perplexity(documents)
