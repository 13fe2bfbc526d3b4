"""What is measured: the sizes of the workloads, and prompts from files."""

from __future__ import annotations

import json

import pytest

from minillm.bench.workloads import WORKLOADS, random_asks, sharegpt_asks, workload
from minillm.errors import ConfigError, InvalidRequestError
from minillm.models.tokenizer import get_tokenizer


def test_sizes():
    one, many, sharing, long = (workload(name, 1000) for name in WORKLOADS)
    assert [(len(ask.prompt), ask.output_len) for ask in one.asks + long.asks] == [(32, 128), (4096, 64)]
    for lengths in ([len(ask.prompt) for ask in many.asks], [ask.output_len for ask in many.asks]):
        assert len(lengths) == 64
        assert min(lengths) >= 16
        assert max(lengths) <= 256
        assert len(set(lengths)) > 30
    assert {(len(ask.prompt), ask.output_len) for ask in sharing.asks} == {(528, 32)}
    assert len(sharing.asks) == 32
    assert sharing.shared_prefix == 512
    assert many.shared_prefix == one.shared_prefix == 0
    assert (one.longest, sharing.output_tokens) == (160, 1024)


@pytest.mark.parametrize("name", WORKLOADS)
def test_always_the_same_tokens_of_the_vocabulary(name):
    asks = workload(name, 100).asks
    assert asks == workload(name, 100).asks
    assert {token for ask in asks for token in ask.prompt} <= set(range(100))


def test_shortened():
    assert {ask.output_len for ask in workload("W2", 10).shortened(4).asks} == {4}


def test_random_prompts_differ_by_seed():
    asks = random_asks(3, 5, 7, 100, seed=0)
    assert [(len(ask.prompt), ask.output_len) for ask in asks] == [(5, 7)] * 3
    assert asks != random_asks(3, 5, 7, 100, seed=1)


@pytest.fixture
def conversations(tmp_path):
    talks = [[f"Tell me about a kite, number {n}.", "It flew over the hill and far away."] for n in range(6)]
    talks += [["alone"], ["a " * 400, "too long a question to fit here"], ["hi", "no"]]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([{"conversations": [{"from": "x", "value": text} for text in talk]} for talk in talks]))
    return path


def test_sharegpt(conversations):
    tokenizer = get_tokenizer("tiny")
    asks = sharegpt_asks(conversations, 6, tokenizer, 100, None, 0)
    answer = len(tokenizer("It flew over the hill and far away.", add_special_tokens=False).input_ids)
    assert {ask.output_len for ask in asks} == {answer}
    texts = sorted(tokenizer.decode(ask.prompt, skip_special_tokens=True) for ask in asks)
    assert texts == [f"Tell me about a kite, number {n}." for n in range(6)]
    assert {ask.output_len for ask in sharegpt_asks(conversations, 2, tokenizer, 100, 9, 0)} == {9}
    with pytest.raises(InvalidRequestError, match="6 conversations"):
        sharegpt_asks(conversations, 7, tokenizer, 100, None, 0)


@pytest.mark.parametrize("content", ["{", "[1]", '[{"conversations": [{}, {}]}]', '[{"other": 1}]', "3"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "talks.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"talks\.json"):
        sharegpt_asks(path, 1, get_tokenizer("tiny"), 100, None, 0)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="W9"):
        workload("W9", 100)
