"""The simulator and the contiguous policies, against counts made by hand and properties that must hold."""

from __future__ import annotations

import contextlib
import csv
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.errors import CacheFullError, ConfigError, InvalidRequestError
from minillm.simulate.contiguous import POLICIES, ContiguousAllocator, Use
from minillm.simulate.reservation import MEMORY_POLICIES, Held, simulate_memory
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


COLUMNS = "arrival_time,prompt_tokens,output_tokens"


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", f"{COLUMNS}\n0,x,1\n", f"{COLUMNS}\nnan,1,1\n", None])
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
    assert found.seconds == pytest.approx(3 * 1.0 + 12 * 0.1 + 33 * 0.01)
    (metrics,) = found.metrics
    assert metrics.arrival_time == 5.0
    assert metrics.first_token_time == pytest.approx(5 + 1 + 1.0 + 0.1)
    assert metrics.finished_time == pytest.approx(5 + found.seconds)
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
    for arrivals in ([], [Arrival(float("nan"), 3, 1)]):
        with pytest.raises(InvalidRequestError, match=r"at least one|finite"):
            simulate(arrivals, num_blocks=2)
    with pytest.raises(InvalidRequestError, match="blocks"):
        simulate([Arrival(0.0, 100, 10)], num_blocks=2)
    with pytest.raises(InvalidRequestError, match="max_model_len=8"):  # rather than an answer cut short
        simulate([Arrival(0.0, 5, 4)], num_blocks=10, max_model_len=8)
    with pytest.raises(ConfigError, match="paged"):
        simulate_memory("best", [Arrival(0.0, 1, 1)], num_slots=100, max_model_len=50)
    with pytest.raises(ConfigError, match="max_model_len"):
        simulate_memory("max", [Arrival(0.0, 1, 1)], num_slots=10, max_model_len=50)


def test_reservation_by_hand():
    arrivals = [Arrival(0.0, 4, 3), Arrival(0.0, 3, 2), Arrival(0.0, 2, 2)]
    cost = CostModel(step=1.0, token=0.0, stored_token=0.0)
    found = simulate_memory("exact", arrivals, num_slots=10, max_model_len=10, cost=cost)
    # The first two reserve 6 and 4 slots: all. The third waits for the second, which ends with step 2.
    assert [step.use for step in found.memory] == [
        Use(tokens=7, reserved=3, internal=0, external=0, free=0),
        Use(tokens=9, reserved=1, internal=0, external=0, free=0),
        Use(tokens=8, reserved=1, internal=0, external=0, free=1),
        Use(tokens=3, reserved=0, internal=0, external=0, free=7),
    ]
    assert [step.waiting for step in found.memory] == [1, 1, 0, 0]
    assert found.memory[2].held == (Held("0", (0,), 6, 0, 6, 6), Held("2", (0,), 3, 6, 2, 3))
    assert [metrics.first_token_time for metrics in found.metrics] == [1.0, 1.0, 3.0]
    assert [metrics.finished_time for metrics in found.metrics] == [3.0, 2.0, 4.0]
    assert found.mean_use() == {"tokens": 0.8, "reserved": 0.2, "internal": 0.0, "external": 0.0, "free": 0.0}


def test_blocks_by_hand():
    cost = CostModel(step=1.0, token=0.0, stored_token=0.0)
    found = simulate_memory("paged", [Arrival(0.0, 5, 3)], num_slots=16, block_size=4, max_model_len=16, cost=cost)
    # 5, then 6, then 7 tokens in two blocks of 4: the eighth slot is never used.
    assert [step.use for step in found.memory] == [Use(5, 2, 1, 0, 8), Use(6, 1, 1, 0, 8), Use(7, 0, 1, 0, 8)]
    assert found.memory[0].held[0].starts == [0, 4]
    assert found.mean_use()["tokens"] == pytest.approx(6 / 16)  # nobody waits: all steps count


SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 40}
some_arrivals = st.lists(st.builds(Arrival, st.floats(0, 0.2), st.integers(1, 30), st.integers(1, 10)), min_size=1)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(MEMORY_POLICIES), some_arrivals)
def test_whatever_the_policy_all_are_answered_and_every_slot_is_accounted_for(policy, arrivals):
    found = simulate_memory(policy, arrivals, num_slots=96, block_size=8, **SMALL)
    written = dict.fromkeys(range(len(arrivals)), 0)
    for traced, step in zip(found.trace.steps, found.memory, strict=True):
        for part in traced.parts:
            written[int(part.name)] += part.samples
        assert {held.name for held in step.held} == set(traced.running)
        assert len(step.held) <= 4
        use = step.use
        assert use.tokens + use.reserved + use.internal + use.external + use.free == 96
        assert min(use.tokens, use.reserved, use.internal, use.external, use.free) >= 0
        assert use.tokens == sum(held.length for held in step.held)
        assert use.reserved == sum(held.reserved for held in step.held)
        assert use.internal == sum(held.internal for held in step.held)
        slots = [slot for held in step.held for start in held.starts for slot in range(start, start + held.size)]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < 96 for slot in slots)
    assert list(written.values()) == [arrival.output_tokens for arrival in found.arrivals]
    for held in (held for step in found.memory for held in step.held):
        arrival = found.arrivals[int(held.name)]
        assert held.length <= held.final == arrival.prompt_tokens + arrival.output_tokens - 1


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(POLICIES), some_arrivals)
def test_who_has_reserved_is_served_in_order_and_never_preempted(policy, arrivals):
    found = simulate_memory(policy, arrivals, num_slots=96, **SMALL)
    started = [metrics.first_scheduled_time for metrics in found.metrics]
    assert started == sorted(started)
    assert not any(metrics.num_preemptions for metrics in found.metrics)
    stretches = {(held.name, held.origin, held.size) for step in found.memory for held in step.held}
    assert len(stretches) == len(arrivals), "a stretch neither moves nor grows"


@settings(max_examples=50, deadline=None)
@given(some_arrivals)
def test_reserving_the_longest_is_paging_with_one_huge_block(arrivals):
    reserved = simulate_memory("max", arrivals, num_slots=96, **SMALL)
    paged = simulate_memory("paged", arrivals, num_slots=96, block_size=40, **SMALL)
    assert reserved.metrics == paged.metrics
    uses = [(step.use.tokens, step.use.reserved, step.use.internal) for step in reserved.memory]
    assert uses == [(step.use.tokens, step.use.reserved, step.use.internal) for step in paged.memory]


def test_blocks_are_those_of_the_plain_simulation():
    arrivals = load_trace(limit=60)
    found = simulate_memory("paged", arrivals, num_slots=600 * 16, max_model_len=8192)
    plain = simulate(arrivals, num_blocks=600, max_model_len=8192)
    assert found.metrics == plain.metrics
    assert found.trace == plain.trace
    for traced, step in zip(plain.trace.steps, found.memory, strict=True):
        assert sum(map(bool, traced.ref_counts)) == sum(len(held.blocks) for held in step.held)
        assert all(held.reserved + held.internal < 16 for held in step.held)
