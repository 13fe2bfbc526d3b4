"""Figures of wasted memory draw what was counted otherwise; the explorer obeys its controls."""

from __future__ import annotations

import ipywidgets
import matplotlib.pyplot as plt
import pytest

from minillm.errors import CacheFullError, ConfigError, InvalidRequestError
from minillm.simulate.contiguous import ContiguousAllocator
from minillm.simulate.reservation import MEMORY_POLICIES, Held, simulate_memory
from minillm.simulate.trace import Arrival
from minillm.viz import explore_memory, plot_lengths, plot_memory, plot_running, plot_strips, plot_use
from minillm.viz.waste import Piece, pieces

PNG = b"\x89PNG"
ARRIVALS = [Arrival(0.002 * number, 10 + 7 * (number % 5), 5 + 3 * (number % 4)) for number in range(20)]
SIZES = {"num_slots": 128, "max_model_len": 64}


def drawn(panel, purpose):
    """Slots drawn with this purpose in a strip."""
    return round(sum(patch.get_width() for patch in panel.patches if patch.get_gid() == purpose))


def test_lengths_and_arrivals():
    prompts, answers, times = plot_lengths([Arrival(0, 10, 1), Arrival(4, 20, 2), Arrival(12, 60, 9)]).axes
    assert sum(bar.get_height() for bar in prompts.patches) == 3
    assert sum(bar.get_height() for bar in answers.patches) == 3
    assert prompts.lines[0].get_xdata()[0] == 30
    assert answers.get_title().endswith("4")
    assert times.patches[0].get_xy()[:, 1].max() == 2


def test_a_stretch_and_blocks_are_cut_where_their_tokens_end():
    stretch = Held("a", (0,), 10, 20, length=4, final=7)
    blocks = Held("b", (1, 0), 8, 0, length=9, final=12)
    assert pieces([stretch, blocks], 40, scattered=False) == [
        Piece("tokens", "b", 0, 1),
        Piece("reserved", "b", 1, 4),
        Piece("internal", "b", 4, 8),
        Piece("tokens", "b", 8, 16),
        Piece("free", "", 16, 20),
        Piece("tokens", "a", 20, 24),
        Piece("reserved", "a", 24, 27),
        Piece("internal", "a", 27, 30),
        Piece("free", "", 30, 40),
    ]
    assert pieces([Held("c", (0, 1), 4, 0, 8, 8)], 8, scattered=False) == [Piece("tokens", "c", 0, 8)]
    assert pieces([], 5, scattered=True) == [Piece("external", "", 0, 5)]


def test_strips_show_what_the_allocator_counts():
    memory = ContiguousAllocator(100, "pow2", 64)
    memory.allocate("A", 5, 20)
    memory.allocate("B", 9, 30)
    memory.free("A")
    with pytest.raises(CacheFullError):
        memory.allocate("C", 1, 60)
    panel = plot_strips({"after": memory}).axes[0]
    use = memory.use()
    assert use.external == 68
    for purpose in ("tokens", "reserved", "internal", "external", "free"):
        assert drawn(panel, purpose) == getattr(use, purpose)
    assert "9 of 100" in panel.get_title(loc="left")
    assert [text.get_text() for text in panel.texts] == ["B"]


def test_bars_of_use_beside_published_ones():
    shares = {
        "one": {"tokens": 0.2, "reserved": 0.1, "internal": 0.4, "external": 0.25, "free": 0.05},
        "two": {"tokens": 0.9, "reserved": 0.0, "internal": 0.1, "external": 0.0, "free": 0.0},
    }
    axes = plot_use(shares, {"one": 33.0}, source="them").axes[0]
    bars = [(bar[0].get_x(), bar[0].get_width()) for bar in axes.containers]
    assert bars[:6] == [pytest.approx(pair) for pair in [(0, 20), (20, 10), (30, 40), (70, 25), (95, 5), (0, 33)]]
    assert [width for _, width in bars[6:]] == pytest.approx([90, 0, 10, 0, 0])
    assert {"20.0", "33.0", "25.0", "90.0"} <= {text.get_text() for text in axes.texts}


def test_who_runs_and_who_waits():
    simulation = simulate_memory("max", ARRIVALS, **SIZES)
    running, waiting = plot_running({"max": simulation}).axes
    counted = [len(step.running) for step in simulation.trace.steps]
    assert max(counted) == 2
    assert list(running.lines[0].get_ydata()) == counted
    assert list(waiting.lines[0].get_ydata()) == [len(step.waiting) for step in simulation.trace.steps]


@pytest.mark.parametrize("policy", MEMORY_POLICIES)
def test_a_step_is_drawn_slot_for_slot(policy):
    simulation = simulate_memory(policy, ARRIVALS, **SIZES)
    step = len(simulation.memory) // 2
    figure = plot_memory(policy, ARRIVALS, step, **SIZES)
    memory, queue, used = figure.axes
    use = simulation.memory[step].use
    for purpose in ("tokens", "reserved", "internal", "external", "free"):
        assert drawn(memory, purpose) == getattr(use, purpose)
    assert all(patch.get_x() + patch.get_width() <= 64 for patch in memory.patches)
    assert queue.lines[0].get_ydata()[-1] == len(simulation.trace.steps[step].waiting)
    assert used.lines[0].get_ydata()[-1] == pytest.approx(100 * use.tokens / 128)
    assert len(used.lines[0].get_xdata()) == step + 1
    assert f"{len(simulation.trace.steps[step].running)} run" in figure.get_suptitle()


def test_what_there_is_not_is_refused():
    last = len(simulate_memory("max", ARRIVALS, **SIZES).memory) - 1
    for step in (-1, last + 1):
        with pytest.raises(InvalidRequestError, match=f"0 … {last}"):
            plot_memory("max", ARRIVALS, step, **SIZES)
    with pytest.raises(ConfigError, match="pow2"):
        plot_memory("half", ARRIVALS, 0, **SIZES)


def explored(policy="pow2", step=5):
    explorer = explore_memory(policy, ARRIVALS, step, **SIZES)
    (policies, steps), image = explorer.controls, explorer.image
    *_, play, slider = explorer.children[1].children
    assert slider is steps
    assert isinstance(image, ipywidgets.Image)
    assert bytes(image.value).startswith(PNG)
    return policies, steps, play, image


def test_the_step_and_the_player_redraw_the_explorer():
    _, steps, play, image = explored()
    before = bytes(image.value)
    steps.value = 9
    assert play.value == 9
    after = bytes(image.value)
    assert after.startswith(PNG)
    assert after != before
    play.value = 5
    assert steps.value == 5
    assert image.value == before
    assert not plt.get_fignums(), "the explorer leaves no figure open"


def test_another_policy_is_shown_at_the_same_time():
    policies, steps, play, image = explored("max", step=40)
    before = bytes(image.value)
    memories = {policy: simulate_memory(policy, ARRIVALS, **SIZES).memory for policy in MEMORY_POLICIES}
    time = memories["max"][40].end
    assert len(memories["paged"]) < len(memories["max"])
    policies.value = "paged"
    assert steps.max == play.max == len(memories["paged"]) - 1
    assert memories["paged"][steps.value - 1].end < time <= memories["paged"][steps.value].end
    assert image.value != before
    policies.value = "max"
    steps.value = len(memories["max"]) - 1
    policies.value = "paged"  # has ended by then
    assert steps.value == steps.max == len(memories["paged"]) - 1
    policies.value = "max"
    steps.value = 40
    assert image.value == before
