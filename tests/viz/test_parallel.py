"""Figures of cut models show what torch and the package compute; the ring's steps are an all-reduce."""

from __future__ import annotations

import ipywidgets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.errors import ConfigError, InvalidRequestError
from minillm.simulate.parallel import Link, Service, sharded_cost
from minillm.simulate.simulator import CostModel
from minillm.viz import (
    explore_sharding,
    plot_rank_heads,
    plot_ring,
    plot_shard_or_replicate,
    plot_sharded_step,
    plot_split,
    ring_sends,
    step_parts,
)

PNG = b"\x89PNG"


@given(st.integers(2, 9), st.integers(0, 2**31))
def test_ring_sends_are_an_all_reduce(size, seed):
    tensors = torch.randint(-99, 99, (size, 3 * size), generator=torch.Generator().manual_seed(seed))
    held = [list(tensor.clone().chunk(size)) for tensor in tensors]
    steps = ring_sends(size)
    assert len(steps) == 2 * (size - 1)
    for step in steps:
        assert sorted(send.source for send in step) == list(range(size))
        assert all(send.target == (send.source + 1) % size for send in step)
        messages = [held[send.source][send.chunk].clone() for send in step]
        for send, message in zip(step, messages, strict=True):
            held[send.target][send.chunk] = message + (held[send.target][send.chunk] if send.adds else 0)
    assert all(torch.equal(torch.cat(chunks), tensors.sum(dim=0)) for chunks in held)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ring_ends_with_everything_everywhere_and_its_bytes(size):
    axes = plot_ring(size, 12 * 1024).axes
    first, *_, last, amounts = axes
    assert sorted(text.get_text() for text in first.texts if text.get_text()) == sorted(
        str(rank) for rank in range(size) for _ in range(size)
    )
    everyone = "".join(map(str, range(size)))
    assert [text.get_text() for text in last.texts if text.get_text()] == [everyone] * size**2
    ring, star = ([bar.get_width() for bar in container] for container in amounts.containers)
    assert ring == pytest.approx([12 * 2 * (size - 1) / size] * size)
    assert sum(ring) == pytest.approx(sum(star))  # the same bytes, shared out evenly
    assert star[0] == 12 * (size - 1)


def test_split_shows_parts_that_add_up_to_torchs_product():
    generator = torch.Generator().manual_seed(0)
    x, first, second = (torch.randint(-3, 4, shape, generator=generator).float() for shape in ((2, 3), (3, 4), (4, 2)))
    for size in (1, 2, 4):
        (axes,) = plot_split(x, first, second, size).axes
        numbers = [text.get_text() for text in axes.texts]
        expected = torch.nn.functional.relu(x @ first) @ second
        # Of each row of matrices, the last four numbers are its output.
        values = [float(text) for text in numbers if text.lstrip("-").replace(".", "").isdigit()]
        units = 4 // size
        length = 6 + 3 * units + 2 * units + 2 * units + 4
        rows = [values[start : start + length] for start in range(0, size * length, length)]
        total = torch.tensor([row[-4:] for row in rows]).sum(dim=0)
        assert torch.equal(total, expected.flatten())
        assert torch.equal(torch.tensor(values[-4:]), expected.flatten())
    with pytest.raises(InvalidRequestError, match="4 units"):
        plot_split(x, first, second, 3)


def drawn(axes):
    """For each rank, the heads of its row."""
    rows = {}
    for patch in axes.patches:
        rows.setdefault(round(patch.get_y() - 0.08), []).append(patch.get_gid())
    return [rows[rank] for rank in sorted(rows)]


def test_heads_of_ranks():
    one, two, four = plot_rank_heads(8, 2, (1, 2, 4)).axes
    assert drawn(one) == [[*(f"q{head}" for head in range(8)), "k0", "k1"]]
    assert drawn(two) == [["q0", "q1", "q2", "q3", "k0"], ["q4", "q5", "q6", "q7", "k1"]]
    assert drawn(four) == [["q0", "q1", "k0"], ["q2", "q3", "k0"], ["q4", "q5", "k1"], ["q6", "q7", "k1"]]
    with pytest.raises(ConfigError, match="3 ranks"):
        plot_rank_heads(8, 2, (3,))


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (32, 4), (300, 8)])
def test_parts_of_a_step_are_what_the_simulator_takes(batch, size):
    link = Link(1e-5, 1e10)
    cost = sharded_cost(CostModel(), size, link)
    expected = cost.step + batch * (cost.token + 1000 * cost.stored_token)
    assert sum(step_parts(batch, size, link).values()) == pytest.approx(expected)


def test_bars_of_a_step():
    (axes,) = plot_sharded_step(4, 50, 64).axes
    widths = {}
    for bar in axes.patches:
        widths.setdefault(round(bar.get_y() + 0.31), {})[bar.get_gid()] = bar.get_width() / 1e3
    assert widths[0] == pytest.approx(step_parts(64))
    assert widths[1] == pytest.approx(step_parts(64, 4, Link(2.5e-6, 50e9)))
    assert widths[2] == pytest.approx(step_parts(16))
    assert axes.texts[2].get_text().endswith(f"{64 / sum(step_parts(16).values()):,.0f} tokens/s")


def test_services_are_drawn_as_they_are():
    services = {"one": [Service(0.01, 100.0), Service(0.02, 150.0)], "two": [Service(0.03, 90.0), Service(0.04, 95.0)]}
    left, right = plot_shard_or_replicate((1, 2), services).axes
    assert [list(line.get_ydata()) for line in left.lines] == [[10, 20], [30, 40]]
    assert [list(line.get_ydata()) for line in right.lines] == [[100, 150], [90, 95]]


def test_explorer_draws_what_its_controls_say():
    explorer = explore_sharding()
    controls, image = explorer.controls, explorer.image
    assert isinstance(image, ipywidgets.Image)
    assert bytes(image.value).startswith(PNG)
    seen = {bytes(image.value)}
    for control, value in zip(controls, (8, 25, 256), strict=True):
        control.value = value
        seen.add(bytes(image.value))
    assert len(seen) == 4
    with pytest.raises(InvalidRequestError, match="devices"):
        explore_sharding(ranks=3)


def test_a_ring_has_two_ranks():
    with pytest.raises(InvalidRequestError, match="two ranks"):
        ring_sends(1)
