"""What several devices take, against counts made by hand and the simulator of one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.errors import ConfigError, InvalidRequestError
from minillm.simulate.parallel import NVLINK, PCIE, Link, Service, Sums, sharded_cost, simulate_replicas
from minillm.simulate.simulator import CostModel, simulate
from minillm.simulate.trace import Arrival, load_trace
from minillm.viz import published_model, ring_sends

ARRIVALS = [Arrival(0.01 * number, 40 + 7 * number, 5 + number % 3) for number in range(12)]
LIMITS = {"num_blocks": 64, "block_size": 16}


def test_the_sums_are_those_of_the_model_that_the_cost_is_of():
    config = published_model("Llama-3-8B").config
    assert Sums() == Sums(2 * config.num_layers + 1, config.hidden_size * 2)


@given(st.integers(2, 9), st.integers(1, 1000), st.floats(0, 1e-3), st.floats(1e6, 1e12))
def test_a_sum_takes_as_long_as_the_steps_of_a_ring(size, tokens, latency, bandwidth):
    waiting, sending = Sums(count=1, token_bytes=8).seconds(tokens, size, Link(latency, bandwidth))
    steps = len(ring_sends(size))
    assert waiting == pytest.approx(steps * latency)
    assert sending == pytest.approx(steps * (tokens * 8 / size) / bandwidth)


def test_one_device_has_nothing_to_sum():
    assert sharded_cost(CostModel(), 1, PCIE) == CostModel()


def test_links_without_a_price_divide_everything():
    cost = sharded_cost(CostModel(0.4, 0.04, 0.004), 4, Link(0, 1e30))
    assert (cost.step, cost.token, cost.stored_token) == pytest.approx((0.1, 0.01, 0.001))


def test_one_copy_is_the_simulator():
    (copy,) = simulate_replicas(ARRIVALS, 1, **LIMITS)
    assert copy.metrics == simulate(ARRIVALS, **LIMITS).metrics


def test_copies_serve_every_request_once_in_turn():
    copies = simulate_replicas(ARRIVALS, 3, **LIMITS)
    assert [copy.arrivals for copy in copies] == [ARRIVALS[number::3] for number in range(3)]
    assert Service.of(copies).seconds_per_token < Service.of([simulate(ARRIVALS, **LIMITS)]).seconds_per_token


def test_service_by_hand():
    cost = CostModel(step=1, token=0, stored_token=0)
    copies = simulate_replicas([Arrival(0, 4, 2), Arrival(1, 4, 3), Arrival(2, 4, 1)], 2, **LIMITS, cost=cost)
    # The first copy serves requests 0 and 2, each at once: 2 s and 1 s. The second serves request 1 in 3 s, until 4 s.
    service = Service.of(copies)
    assert service.seconds_per_token == pytest.approx(1)
    assert service.tokens_per_second == pytest.approx(6 / 4)


def test_fast_links_beat_copies_under_little_load_only_by_time():
    arrivals = [one._replace(time=10.0 * number) for number, one in enumerate(load_trace(limit=8))]
    limits = {"num_blocks": 1000, "block_size": 16}
    cut = Service.of([simulate(arrivals, cost=sharded_cost(CostModel(), 4, NVLINK), **limits)])
    copies = Service.of(simulate_replicas(arrivals, 4, **limits))
    assert cut.seconds_per_token < copies.seconds_per_token / 2
    assert cut.tokens_per_second == pytest.approx(copies.tokens_per_second, rel=0.1)


def test_what_cannot_be():
    with pytest.raises(ConfigError, match="replicas"):
        simulate_replicas(ARRIVALS, 0, **LIMITS)
    with pytest.raises(InvalidRequestError, match="no arrivals"):
        simulate_replicas(ARRIVALS[:2], 3, **LIMITS)
    with pytest.raises(ConfigError, match="size"):
        sharded_cost(CostModel(), 0, PCIE)
    with pytest.raises(ConfigError, match="bandwidth"):
        Link(0, 0)
