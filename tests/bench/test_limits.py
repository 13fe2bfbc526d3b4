"""What a machine could do at best, by hand."""

from __future__ import annotations

import pytest
import torch

from minillm.bench.limits import ModelCost, Rates, limit, measure_rates, model_config
from minillm.bench.workloads import Ask, Workload
from minillm.models.loader import load_model, num_parameters
from minillm.models.source import resolve

COST = ModelCost(body=100, head=10, channels=4, kv_channels=2, itemsize=2)
NO_READING, NO_ARITHMETIC = Rates(1e30, 1.0), Rates(1.0, 1e30)


def asks(*lengths: tuple[int, int], shared: int = 0) -> Workload:
    prompts = [([0] * shared + [number + 1] * (length - shared), new) for number, (length, new) in enumerate(lengths)]
    return Workload("W", "by hand", [Ask(*each) for each in prompts])


def test_numbers_of_a_model():
    cost = ModelCost.of(model_config(resolve("tiny")), torch.bfloat16)
    model = load_model("tiny", device="cpu")
    assert cost.body + cost.head == num_parameters(model)
    assert (cost.head, cost.channels, cost.kv_channels, cost.itemsize) == (1536 * 192, 6 * 6 * 32, 6 * 2 * 32, 2)


def test_one_request_by_bytes():
    first, seconds = limit(asks((5, 3)), COST, NO_ARITHMETIC)
    weights = 2 * 110
    assert first == weights
    assert seconds == 3 * weights + 2 * 2 * 2 * (6 + 7)


def test_requests_by_arithmetic():
    first, seconds = limit(asks((2, 1), (3, 2)), COST, NO_READING)
    assert first == 2 * 100 * 5 + 2 * 10 * 2 + 4 * 4 * (3 + 6)
    assert seconds - first == 2 * 100 + 2 * 10 + 4 * 4 * 4


def test_a_common_beginning_is_computed_and_read_once():
    work = asks((5, 2), (5, 2), shared=3)
    assert work.shared_prefix == 3
    assert limit(work, COST, NO_READING).first_token_seconds == 2 * 100 * 7 + 2 * 10 * 2 + 4 * 4 * (6 + 2 * (15 - 6))
    by_bytes = limit(work, COST, NO_ARITHMETIC)
    assert by_bytes.seconds - by_bytes.first_token_seconds == 2 * 110 + 2 * 2 * 2 * (3 + 3 + 3)


def test_median_of_rates():
    assert Rates.median([Rates(1.0, 9.0), Rates(3.0, 7.0), Rates(2.0, 8.0)]) == Rates(2.0, 8.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_are_measured(dtype, monkeypatch):
    monkeypatch.setattr("minillm.bench.limits.READ_BYTES", 2**16)
    monkeypatch.setattr("minillm.bench.limits.MATRIX_SIZE", 32)
    assert min(measure_rates(dtype)) > 0
