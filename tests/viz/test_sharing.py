"""Sharing is counted as Kwon et al. count it; figures draw tables that were really forked; the explorer obeys."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import ipywidgets
import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from minillm import LLM, SamplingParams
from minillm.cache.block_pool import BlockPool
from minillm.cache.block_table import BlockTable
from minillm.engine.beam_search import beam_search
from minillm.engine.outputs import RequestMetrics
from minillm.engine.params import BeamSearchParams
from minillm.engine.request import Request
from minillm.errors import InvalidRequestError
from minillm.viz import (
    RecordedStep,
    RecordingRunner,
    Sharing,
    TableState,
    block_chain,
    explore_sharing,
    fork_samples,
    plot_beams,
    plot_blocks_over_steps,
    plot_prefix_tree,
    plot_saved_share,
    plot_sharing,
    plot_tables,
    sharing_of_samples,
    traced_tables,
)
from minillm.viz.style import BLUE, ORANGE, SKY

PNG = b"\x89PNG"
PROMPT = "Once upon a time there was a brave girl called Mia. One day she found"


@pytest.fixture(scope="module", params=[1, 4, 16])
def llm(request):
    options = {"num_gpu_blocks_override": 512, "trace": True, "enable_prefix_caching": False}
    with LLM("tiny", dtype="float32", device="cpu", block_size=request.param, **options) as llm:
        yield llm


def search(llm, width, tokens, pieces=2048):
    recorder = RecordingRunner(llm.engine.runner)
    params = BeamSearchParams(beam_width=width, max_tokens=tokens, ignore_eos=True)
    prompt = llm.get_tokenizer()(PROMPT).input_ids
    scheduler = llm.engine.scheduler
    found = beam_search(recorder, scheduler.pool, prompt, params, end_ids=frozenset(), max_num_batched_tokens=pieces)
    return prompt, found, recorder.steps


def test_a_shared_block_counts_once():
    tables = [TableState((3, 5), 20), TableState((3, 6, 7), 40), TableState((9,), 2)]
    assert Sharing.of(tables) == Sharing(held=5, needed=6)
    assert Sharing(3, 12).saved == 0.75
    assert Sharing.total([Sharing(1, 4), Sharing(5, 8)]) == Sharing(6, 12)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(
    ("prompt", "answer"), [(1, 0), (16, 0), (16, 1), (17, 0), (17, 20), (15, 1), (3, 30), (32, 16)]
)
def test_the_formula_and_the_tables_are_counted_alike(prompt, answer, n, block_size):
    owners = set()
    for number in range(n):
        for position in range(prompt + answer):
            block = position // block_size
            is_common = (block + 1) * block_size <= prompt or not answer
            owners.add((block, None if is_common else number))
    expected = Sharing(len(owners), n * len({block for block, _ in owners}))
    assert sharing_of_samples(prompt, answer, n, block_size) == expected
    assert Sharing.of(map(TableState.of, fork_samples(prompt, answer, n, block_size))) == expected


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1), (1, -1, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)])
@pytest.mark.parametrize("function", [sharing_of_samples, fork_samples, plot_sharing])
def test_sizes_that_cannot_be_are_refused(function, sizes):
    with pytest.raises(InvalidRequestError, match="at least 1"):
        function(*sizes)


def test_the_engine_shares_as_the_formula_says(llm):
    size, start = llm.engine.scheduler.pool.block_size, len(llm.trace.steps)
    ids = llm.get_tokenizer()(PROMPT).input_ids
    llm.generate([ids], SamplingParams(n=3, seed=1, max_tokens=20, ignore_eos=True), use_tqdm=False)
    first, *others = llm.trace.steps[start:]
    (only,) = traced_tables(first).values()
    assert only.num_tokens == len(ids)
    assert len(others) == 19
    for written, step in enumerate(others, start=1):
        tables = traced_tables(step)
        assert [name.split("/")[1] for name in tables] == ["0", "1", "2"]
        assert Sharing.of(tables.values()) == sharing_of_samples(len(ids), written, 3, size)


@pytest.mark.parametrize("pieces", [2048, 5])
def test_parents_lead_back_to_what_the_beams_have_written(llm, pieces):
    prompt, found, steps = search(llm, width=4, tokens=30, pieces=pieces)
    head = -(-len(prompt) // pieces)
    assert steps[0].parents == ()
    assert [len(step.tables) for step in steps] == [1] * head + [4] * 29
    written = [[]]
    for step in steps[head:]:
        written = [[*written[parent], token] for parent, token in zip(step.parents, step.tokens, strict=True)]
    assert all(beam.tokens[:-1] in written for beam in found)
    assert len({tuple(beam) for beam in written}) == 4


def test_copies_are_those_of_parted_unfilled_blocks(llm):
    size = llm.engine.scheduler.pool.block_size
    _, _, steps = search(llm, width=4, tokens=30)
    for before, step in pairwise(steps):
        is_full = before.tables[0].num_tokens % size == 0
        expected = 0 if is_full else sum(count - 1 for count in Counter(step.parents).values())
        assert step.num_copies == expected
        assert all(table.num_tokens == before.tables[0].num_tokens + 1 for table in step.tables)


def test_a_recorded_search_finds_what_an_unrecorded_one_does(llm):
    prompt, found, _ = search(llm, width=3, tokens=12)
    params = BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True)
    (output,) = llm.beam_search([PROMPT], params)
    assert [beam.tokens for beam in output.sequences] == [prompt + beam.tokens for beam in found]


def test_chains_are_the_engines_hashes():
    tokens = [token * 7 % 100 for token in range(50)]
    params, metrics = SamplingParams(), RequestMetrics(0.0)
    request = Request("0", tokens, params, 1, BlockTable(BlockPool(8, 16)), metrics)
    assert block_chain(tokens, 16) == request.hashes(50)
    assert len(block_chain(tokens, 16)) == 3
    assert block_chain(tokens[:15], 16) == []
    assert not set(block_chain([1, *tokens[1:]], 16)) & set(block_chain(tokens, 16))


def fills(axes):
    """The filled rectangles: (column, row, share of a cell, is shared)."""
    found = []
    for patch in axes.patches:
        if isinstance(patch, Rectangle) and to_hex(patch.get_facecolor()).upper() in (ORANGE, SKY):
            shared = to_hex(patch.get_facecolor()).upper() == ORANGE
            assert bool(patch.get_hatch()) == shared, "never told by colour alone"
            found.append((round(patch.get_x()), round(patch.get_y()), round(patch.get_width() / 0.92, 3), shared))
    return found


def test_tables_are_drawn_with_holders_and_fill():
    tables = {"a": TableState((4, 2), 24), "b": TableState((4, 7), 20), "c": TableState((1,), 16)}
    panel, alone = plot_tables({"now": tables, "alone": {"a": tables["a"]}}, 16).axes
    assert sorted(fills(panel)) == [
        (0, 0, 1.0, True), (0, 1, 1.0, True), (0, 2, 1.0, False), (1, 0, 0.5, False), (1, 1, 0.25, False)
    ]  # fmt: skip
    assert [text.get_text() for text in panel.texts] == ["4 (×2)", "2", "4 (×2)", "7", "1"]
    assert panel.get_title() == "now: 4 blocks"
    assert alone.get_title() == "alone: 2 blocks"
    assert [label.get_text() for label in panel.get_yticklabels()] == ["a", "b", "c"]


def test_long_tables_stand_below_each_other_without_numbers():
    tables = {"a": TableState(tuple(range(20)), 320)}
    above, below = plot_tables({"now": tables, "then": tables}, 16).axes
    assert above.get_position().y0 > below.get_position().y1
    assert not above.texts


def test_blocks_over_steps():
    moments = [Sharing(2, 2), Sharing(5, 8), Sharing(6, 12)]
    needed, held = plot_blocks_over_steps(moments, title="t").axes[0].lines
    assert list(needed.get_xdata()) == [0, 1, 2, 3]
    assert list(needed.get_ydata()) == [2, 8, 12, 12]
    assert list(held.get_ydata()) == [2, 5, 6, 6]


def test_the_saved_share_is_the_formula_and_the_marks_are_given():
    axes = plot_saved_share(40, 8, {2: {10: 0.1, 30: 0.4}, 4: {20: 0.3}}).axes[0]
    formula, limit, marks, _, _, other = axes.lines
    assert list(formula.get_xdata()) == [prompt / 40 for prompt in range(1, 40)]
    assert formula.get_ydata()[19] == pytest.approx(2 / 10)  # 20 tokens: two full blocks, one of them saved twice of 10
    assert list(limit.get_ydata()) == [0, 0.5]
    assert list(zip(*marks.get_data(), strict=True)) == [(0.25, 0.1), (0.75, 0.4)]
    assert list(zip(*other.get_data(), strict=True)) == [(0.5, 0.3)]


def test_beams_are_drawn_with_the_living_marked(llm):
    state = TableState((0,), 1)
    names = [llm.get_tokenizer()(word).input_ids[0] for word in (" the", " a", " to", " in")]
    steps = [
        RecordedStep((names[0],), (state,), (), 0),
        RecordedStep((names[0], names[1]), (state, state), (0, 0), 1),
        RecordedStep((names[2], names[3]), (state, state), (1, 1), 1),
    ]
    axes = plot_beams(steps, llm.get_tokenizer(), title="t").axes[0]
    assert [text.get_text() for text in axes.texts] == ["prompt", "␣the", "␣a", "␣to", "␣in"]
    drawn = [(list(line.get_ydata()), line.get_linestyle(), line.get_color() == BLUE) for line in axes.lines]
    dead, *alive = drawn
    assert dead == ([0, 0], "--", False)
    assert alive == [([0, 1], "-", True), ([1, 0], "-", True), ([1, 1], "-", True)]


def test_the_prefix_tree_has_a_node_for_every_different_block():
    texts = {"a": [1, 2, 3, 4, 5], "b": [1, 2, 3, 9], "c": [1, 2, 3, 4, 5, 6], "d": [7, 2]}
    figure = plot_prefix_tree({name: block_chain(tokens, 2) for name, tokens in texts.items()})
    axes = figure.axes[0]
    nodes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    prefixes = {tuple(tokens[:end]) for tokens in texts.values() for end in range(2, len(tokens) + 1, 2)}
    assert len(nodes) == len(prefixes) == 5
    said = [text.get_text() for text in axes.texts]
    assert sorted(text for text in said if text.startswith("×")) == ["×2", "×3"]
    assert {text for text in said if not text.startswith("×")} == set(texts)
    assert figure.get_suptitle() == "8 full blocks, 5 different ones"


def test_the_picture_of_the_explorer_holds_both():
    figure = plot_sharing(prompt=20, answer=15, n=3, block_size=8)
    left, right = figure.axes
    drawn = fills(left)
    assert len(drawn) == 3 * 5
    assert sum(shared for *_, shared in drawn) == 3 * 2
    assert {share for column, _, share, _ in drawn if column == 4} == {3 / 8}
    assert right.get_title() == "11 blocks instead of 15"
    needed, held = right.lines
    assert (needed.get_ydata()[0], held.get_ydata()[0]) == (9, 3)
    assert (needed.get_ydata()[-1], held.get_ydata()[-1]) == (15, 11)
    assert figure.get_suptitle() == "3 × (20 + 15) tokens in blocks of 8: 26.7% saved"


@pytest.mark.parametrize(
    ("number", "value"), [(0, 200), (1, 0), (2, 7), (3, 32)], ids=["prompt", "answer", "n", "block size"]
)
def test_each_control_redraws_the_explorer(number, value):
    explorer = explore_sharing(prompt=40, answer=20)
    controls, image = explorer.controls, explorer.image
    assert isinstance(image, ipywidgets.Image)
    before, was = bytes(image.value), controls[number].value
    assert before.startswith(PNG)
    controls[number].value = value
    assert bytes(image.value).startswith(PNG)
    assert image.value != before
    controls[number].value = was
    assert image.value == before
    assert not plt.get_fignums(), "the explorer leaves no figure open"
