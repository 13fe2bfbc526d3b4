"""Drawings of paged attention say what the kernels do: blocks are poisoned, parts are run, and compared with them."""

from __future__ import annotations

from itertools import product

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

pytest.importorskip("numba")
pytest.importorskip("triton")
from minillm.cache.reference import _gather
from minillm.errors import InvalidRequestError
from minillm.viz import (
    EXPLORED_BATCHES,
    Gathered,
    explore_programs,
    plot_explored_programs,
    plot_gather,
    plot_online,
    plot_programs,
    plot_shares,
    plot_times,
    program_grid,
    scattered_tables,
    shares_by_block,
    shares_by_sequence,
    show_part,
)
from tests.kernels.paged import Case, make_case

PNG = b"\x89PNG"
NAN = float("nan")


def interpreted():
    """The GPU's kernel, where Triton's interpreter runs it."""
    from minillm.kernels.gpu import paged_attention as kernel

    if type(kernel._attend).__name__ != "InterpretedFunction":
        pytest.skip("needs TRITON_INTERPRET=1 before Triton is imported")
    return kernel


def sequence_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split())


def drawn(figure) -> set[tuple[int, int, int]]:
    """(row, physical block, logical block) of every coloured cell, checked against where the cell lies."""
    cells = set()
    for patch in figure.axes[0].patches:
        if patch.get_gid():
            row, block, number = sequence_of(patch.get_gid())
            assert (round(patch.get_x() + 0.46), round(patch.get_y() + 0.42)) == (block, row)
            cells.add((row, block, number))
    return cells


def test_a_part_of_the_source_is_shown():
    shown = show_part(_gather, "cache:", ")").data
    assert "cache: Float[Tensor" in shown
    assert "return" not in shown
    first, last = (int(word.strip(":")) for word in shown.split("\n")[0].split("lines ")[1].split(" to "))
    assert last - first + 1 == len(shown.split("```python\n")[1].split("\n")) - 1 == 2
    with pytest.raises(InvalidRequestError, match="whole source"):
        show_part(_gather, "return", "def _gather")


def test_a_part_of_a_kernel_is_shown_as_it_was_written():
    from minillm.kernels.cpu import paged_attention as cpu
    from minillm.kernels.gpu import paged_attention as gpu

    assert "```python\nbest = largest[head]\nfor t in" in show_part(cpu._attend_tile, "best =", "for t").data
    assert "tl.program_id(0)" in show_part(gpu._attend, "tile, kv_head", "seq =").data


def test_the_online_softmax_is_drawn_as_given():
    scores = [torch.tensor([0.5, 2.0]), torch.tensor([3.0])]
    outputs = [torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.0])]
    left, middle, right = plot_online(scores, [2.0, 3.0], [1.25, 1.5], outputs, ["a", "b"]).axes
    assert [bar.get_height() for bar in left.patches] == [0.5, 2.0, 3.0]
    assert [bar.get_x() + bar.get_width() / 2 for bar in left.patches] == pytest.approx([0, 1, 2])
    assert [list(line.get_xydata()[:, 0]) for line in left.lines[:2]] == [[-0.5, 1.5], [1.5, 2.5]]
    assert [line.get_ydata()[0] for line in left.lines[:2]] == [2, 3]
    assert [bar.get_height() for bar in middle.patches] == [1.25, 1.5]
    assert [text.get_text() for text in middle.texts] == ["1.25", "1.50\nold × 0.37"]
    assert [list(line.get_ydata()) for line in right.lines] == [[1, 0.5], [-1, 0]]


def test_what_the_gather_copies_is_counted_on_its_tensor():
    lengths, block_size = [13, 1, 8], 4
    tables = scattered_tables(lengths, block_size)
    slots = Gathered.of(lengths, block_size)
    assert sum(map(sum, slots)) == _gather(torch.zeros(7, 1, 4, 1), tables).numel() == 3 * 16
    assert slots == ([13, 1, 8], [3, 3, 0], [0, 12, 8])
    bars = plot_gather(lengths, block_size).axes[0].containers
    assert [[bar.get_width() for bar in kind] for kind in bars] == [list(kind) for kind in slots]
    assert [bar.get_x() for bar in bars[2]] == [16, 4, 8]


def test_scattered_blocks_belong_to_one_sequence_each():
    tables = scattered_tables([13, 1, 8], 4)
    held = [*tables[0].tolist(), tables[1, 0].item(), *tables[2, :2].tolist()]
    assert sorted(held) == list(range(7))
    assert held != sorted(held)


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7])
def test_threads_read_what_the_cpu_kernel_gives_them(threads):
    """Each part of the kernel is run alone: what it finishes, and what it leaves unfinished."""
    from minillm.kernels.cpu import paged_attention as cpu
    from minillm.kernels.cpu.prompt_attention import words_for

    lengths, block_size = [50, 4, 30, 2, 8], 4
    counts = [-(-length // block_size) for length in lengths]
    case = make_case([1] * 5, lengths, kv_heads=1, group=2, head_dim=8, block_size=block_size)
    q, k_cache, v_cache, tables, starts, lens = (tensor.numpy() for tensor in case.arguments)
    far = 10**9
    seqs, seen, ends = cpu._rows(starts, lens, far, block_size, 0)
    scale, no_cap = np.float32(1), np.float32(0)
    shares = shares_by_block(lengths, block_size, threads)
    blocks = [(seq, block) for mine in shares for seq, begin, end in mine for block in range(begin, end)]
    assert blocks == [(seq, block) for seq, count in enumerate(counts) for block in range(count)]
    for part, mine in enumerate(shares):
        out, tokens = np.full_like(q, NAN), np.zeros((threads, 2), np.int64)
        stats, means = np.zeros((threads, 2, 2, 2), np.float32), np.zeros((threads, 2, 2, 8), np.float32)
        common = np.zeros((0, 2), np.float32), np.zeros((0, 2, 8), np.float32)
        where = tables, seqs, seen, ends, far, 0, *common
        given = part, threads, words_for(k_cache), q, k_cache, v_cache, *where, scale, no_cap
        cpu._attend_part(*given, out, tokens, stats, means)
        whole = {seq for seq, begin, end in mine if end - begin == counts[seq]}
        assert {seq for seq in range(5) if not np.isnan(out[seq]).any()} == whole
        assert {int(token) for token in tokens[part] if token >= 0} == {share.seq for share in mine} - whole


def test_whole_sequences_are_divided_evenly_by_number():
    shares = shares_by_sequence([40, 8, 8, 8, 8], 8, 2)
    assert shares == [[(0, 0, 5), (1, 0, 1)], [(2, 0, 1), (3, 0, 1), (4, 0, 1)]]


def test_shares_are_drawn_side_by_side():
    figure = plot_shares([40, 8, 8], 8, 2)
    for panel, divide in zip(figure.axes, (shares_by_sequence, shares_by_block), strict=True):
        bars = [(int(bar.get_gid()), bar.get_x(), bar.get_width()) for bar in panel.patches]
        expected = []
        for mine in divide([40, 8, 8], 8, 2):
            sizes = [end - begin for _, begin, end in mine]
            expected += [(share.seq, sum(sizes[:n]), sizes[n]) for n, share in enumerate(mine)]
        assert bars == expected
    assert "5 blocks" in figure.axes[0].get_title()
    assert "4 blocks" in figure.axes[1].get_title()


def grid_of(case: Case, block_size: int, group: int, **options):
    _, k_cache, _, *where = case.arguments
    return program_grid(*where, block_size=block_size, kv_heads=k_cache.shape[1], group=group, head_dim=8, **options)


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize(("queries", "lengths"), [([16, 1, 1], [24, 90, 10]), ([3, 30], [3, 70]), ([1, 1], [70, 33])])
def test_a_poisoned_block_shows_who_reads_it(queries, lengths, window):
    kernel = interpreted()
    case = make_case(queries, lengths, kv_heads=2, group=3, head_dim=8, block_size=8)
    programs = grid_of(case, block_size=8, group=3, window=window)
    q, k_cache, v_cache, *where = case.arguments
    for block in range(len(k_cache)):
        poisoned = v_cache.clone()
        poisoned[block] = NAN
        out = kernel.paged_attention(
            q, k_cache, poisoned, *where, max_query_len=max(queries), scale=case.scale, window=window
        )
        noticed = {tuple(pair) for pair in out.isnan().any(dim=-1).nonzero().tolist()}
        readers = [program for program in programs if block in program.blocks]
        assert noticed == {(token, 3 * p.kv_head + turn) for p in readers for token in p.queries for turn in range(3)}


def test_a_poisoned_block_shows_which_split_reads_it(monkeypatch):
    """Splits are seen before they are merged, in what the second kernel is given."""
    kernel = interpreted()
    case = make_case([1, 1, 1], [300, 20, 1100], kv_heads=1, group=2, head_dim=8, block_size=32)
    programs = grid_of(case, block_size=32, group=2)
    splits = 1 + max(program.split for program in programs)
    assert splits == 4
    q, k_cache, v_cache, *where = case.arguments
    given = []

    class Merge:
        def __getitem__(self, grid):
            return lambda means, *rest, **constants: given.append(means)

    monkeypatch.setattr(kernel, "_merge", Merge())
    for block in range(0, len(k_cache), 3):
        poisoned = v_cache.clone()
        poisoned[block] = NAN
        kernel.paged_attention(q, k_cache, poisoned, *where, max_query_len=1, scale=case.scale)
        means = given.pop()  # [tokens, heads, splits, head_dim]
        noticed = {(token, split) for token, _, split in means.isnan().any(dim=-1).nonzero().tolist()}
        assert noticed == {(p.queries.start, p.split) for p in programs if block in p.blocks}


def test_the_grid_has_the_kernel_s_size(monkeypatch):
    kernel = interpreted()
    launched = []

    class Attend:
        def __getitem__(self, grid):
            launched.append(grid)
            return lambda *arguments, **constants: None

    monkeypatch.setattr(kernel, "_attend", Attend())
    for queries, lengths, count in (([16, 1], [16, 9], 2), ([7], [7], 1), ([1] * 5, [4] * 5, 1), ([9, 9], [9, 9], 1)):
        launched.clear()
        case = make_case(queries, lengths, kv_heads=2, group=2, head_dim=8, block_size=4)
        kernel.paged_attention(*case.arguments, max_query_len=max(queries), scale=1.0)
        programs = grid_of(case, block_size=4, group=2)
        assert len(launched) == count
        assert [program[:4] for program in programs] == [
            (number, *place) for number, grid in enumerate(launched) for place in product(*map(range, grid))
        ]


def test_more_multiprocessors_want_more_splits():
    where = torch.arange(64)[None], torch.tensor([0, 1]), torch.tensor([2048])
    sizes = {"block_size": 32, "kv_heads": 1, "group": 4, "head_dim": 64}
    assert [len(program_grid(*where, **sizes, processors=count)) for count in (1, 2, 132)] == [4, 8, 8]


def test_cells_are_drawn_where_programs_read():
    case = make_case([16, 1], [16, 9], kv_heads=1, group=2, head_dim=8, block_size=4)
    programs = grid_of(case, block_size=4, group=2)
    figure = plot_programs(programs, num_blocks=len(case.arguments[1]))
    tables = case.arguments[3]
    expected = {
        (row, int(tables[program.seq, number]), number)
        for row, program in enumerate(programs)
        if program.seq is not None
        for number in range(-(-program.keys.stop // 4))
    }
    assert drawn(figure) == expected
    written = {text.get_text() for text in figure.axes[0].texts}
    assert "has no queries of its own and returns" in written
    assert {"0", "3"} <= written


def test_too_large_a_drawing_is_refused():
    case = make_case([1], [8], kv_heads=1, group=1, head_dim=8, block_size=4)
    with pytest.raises(InvalidRequestError, match="smaller batch"):
        plot_programs(grid_of(case, block_size=4, group=1), num_blocks=5000)


def test_a_split_without_keys_returns():
    where = torch.arange(20).view(2, 10), torch.tensor([0, 1, 2]), torch.tensor([640, 10])
    programs = program_grid(*where, block_size=64, kv_heads=1, group=1, head_dim=64)
    idle = [program for program in programs if not program.blocks]
    assert [(program.seq, program.split) for program in idle] == [(1, 1)]
    written = [text.get_text() for text in plot_programs(programs, num_blocks=20).axes[0].texts]
    assert "has nothing to read and returns" in written


@pytest.mark.parametrize("batch", EXPLORED_BATCHES)
def test_every_batch_can_be_explored(batch):
    cells = drawn(plot_explored_programs(batch, group=8, kv_heads=3, processors=8, window=32))
    assert cells
    queries, lengths, block_size = EXPLORED_BATCHES[batch]
    assert len(queries) == len(lengths)
    everything = drawn(plot_explored_programs(batch))
    assert {block for _, block, _ in everything} == set(range(sum(-(-n // block_size) for n in lengths)))


def test_another_batch_is_refused():
    with pytest.raises(InvalidRequestError, match="three decodes"):
        plot_explored_programs("a million decodes")


@pytest.mark.parametrize(
    ("number", "value"),
    [(0, "a whole prompt"), (1, 8), (2, 3), (3, 1), (4, 32)],
    ids=["batch", "group", "kv_heads", "processors", "window"],
)
def test_each_control_redraws_the_explorer(number, value):
    explorer = explore_programs("a prompt's piece and two decodes" if number == 1 else "three decodes")
    controls, image = explorer.controls, explorer.image
    assert isinstance(image, ipywidgets.Image)
    if number == 3:  # one long sequence has as many splits as its keys allow; two heads make the difference seen
        controls[0].value, controls[2].value = "one long decode", 3
    before, was = bytes(image.value), controls[number].value
    assert before.startswith(PNG)
    controls[number].value = value
    assert bytes(image.value).startswith(PNG)
    assert image.value != before
    controls[number].value = was
    assert image.value == before
    assert not plt.get_fignums(), "the explorer leaves no figure open"


def test_times_are_drawn_as_given():
    panel = plot_times({"slow": 1200.0, "fast": 0.5}).axes[0]
    assert [bar.get_width() for bar in panel.containers[0]] == [1200.0, 0.5]
    assert [text.get_text() for text in panel.texts] == ["1,200.0 ms", "0.5 ms"]
    assert panel.get_xscale() == "log"
