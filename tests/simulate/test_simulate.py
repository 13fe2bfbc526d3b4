"""The simulator and the contiguous policies, against counts made by hand and properties that must hold."""

from __future__ import annotations

import contextlib
import csv
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.errors import CacheFullError, ConfigError, InvalidRequestError
from minillm.simulate.contiguous import POLICIES, ContiguousAllocator
from minillm.simulate.simulator import CostModel, simulate
from minillm.simulate.trace import Arrival, load_trace
from tests.helpers import SHARED


def test_the_shipped_trace_is_azures():
    ours = load_trace()
    assert len(ours) == 2000
    assert ours[0] == (0.0, 374, 44)
    file = SHARED / "traces" / "AzureLLMInferenceTrace_conv.csv"
    if not file.exists():
        pytest.skip("no shared/traces beside the checkout")
    theirs = load_trace(file, limit=2000)
    assert [row[1:] for row in ours] == [row[1:] for row in theirs]
    assert max(abs(a.time - b.time) for a, b in zip(ours, theirs, strict=True)) < 1e-3
    with file.open() as lines:
        first = next(iter(csv.DictReader(lines)))
    assert (theirs[0].prompt_tokens, theirs[0].output_tokens) == (
        int(first["ContextTokens"]),
        int(first["GeneratedTokens"]),
    )


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "arrival_time,prompt_tokens,output_tokens\n0,x,1\n", None])
def test_what_is_no_trace_is_refused(tmp_path, text):
    file = tmp_path / "trace.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InvalidRequestError, match=r"trace\.csv"):
        load_trace(file)


def test_one_request_takes_what_the_cost_model_says():
    cost = CostModel(step=1.0, token=0.1, stored_token=0.01)
    found = simulate([Arrival(5.0, 10, 3)], num_blocks=10, block_size=4, cost=cost)
    # A step of 10 tokens, then two of 1, with 10, 11 and 12 stored.
    assert found.seconds == pytest.approx(5 + 3 * 1.0 + 12 * 0.1 + 33 * 0.01)
    (metrics,) = found.metrics
    assert metrics.arrival_time == 5.0
    assert metrics.first_token_time == pytest.approx(5 + 1 + 1.0 + 0.1)
    assert metrics.finished_time == pytest.approx(found.seconds)
    assert [step.parts[0].count for step in found.trace.steps] == [10, 1, 1]


def test_a_real_trace_ends_with_every_request_answered_and_every_block_free():
    arrivals = load_trace(limit=150)
    found = simulate(arrivals, num_blocks=600, max_model_len=8192)
    assert len(found.metrics) == 150
    assert sum(metrics.num_preemptions for metrics in found.metrics) > 0
    written = sum(part.samples for step in found.trace.steps for part in step.parts)
    assert written == sum(arrival.output_tokens for arrival in arrivals)
    for arrival, metrics in zip(found.arrivals, found.metrics, strict=True):
        assert arrival.time <= metrics.first_scheduled_time < metrics.first_token_time <= metrics.finished_time
    assert all(sum(count > 0 for count in step.ref_counts) <= 600 for step in found.trace.steps)


def test_policies_reserve_what_they_say():
    sizes = {policy: ContiguousAllocator(4096, policy, 1024).size_for(300) for policy in POLICIES}
    assert sizes == {"max": 1024, "pow2": 512, "exact": 300}
    assert ContiguousAllocator(4096, "pow2", 1000).size_for(600) == 1000
    assert ContiguousAllocator(4096, "pow2", 1024).size_for(512) == 512


def test_fragmentation_by_hand():
    memory = ContiguousAllocator(100, "exact", 100)
    for name in "abc":
        memory.allocate(name, 10, 30)
    memory.free("a")
    memory.free("c")
    assert memory.gaps() == [(0, 30), (60, 100)]
    with pytest.raises(CacheFullError):
        memory.allocate("d", 10, 50)
    use = memory.use()
    assert (use.tokens, use.reserved, use.internal, use.external, use.free) == (10, 20, 0, 70, 0)
    memory.allocate("e", 5, 40)
    assert memory.use().external == 0


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(POLICIES), st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=30), st.data())
def test_stretches_never_overlap_and_every_slot_is_accounted_for(policy, requests, data):
    memory = ContiguousAllocator(512, policy, 128)
    for number, (prompt, output) in enumerate(requests):
        with contextlib.suppress(CacheFullError):
            memory.allocate(str(number), prompt, prompt + output)
        if memory.stretches and data.draw(st.booleans()):
            memory.free(data.draw(st.sampled_from(sorted(memory.stretches))))
        held = sorted((stretch.start, stretch.start + stretch.size) for stretch in memory.stretches.values())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(held))
        use = memory.use()
        assert use.tokens + use.reserved + use.internal + use.external + use.free == 512
        assert min(use.tokens, use.reserved, use.internal, use.external, use.free) >= 0


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="policy"):
        ContiguousAllocator(10, "best", 5)
    with pytest.raises(ConfigError, match="max_model_len"):
        ContiguousAllocator(10, "max", 11)
    with pytest.raises(ConfigError, match="time must pass"):
        CostModel(step=0, token=0)
    with pytest.raises(InvalidRequestError, match="blocks"):
        simulate([Arrival(0.0, 100, 10)], num_blocks=2)
