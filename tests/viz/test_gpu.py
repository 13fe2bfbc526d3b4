"""Figures of GPUs and their kernels draw what was counted here otherwise; the explorer obeys its controls."""

from __future__ import annotations

import os
from dataclasses import replace

import ipywidgets
import matplotlib.pyplot as plt
import pytest
import torch

pytest.importorskip("triton")
from minillm.errors import InvalidRequestError
from minillm.viz import (
    GPUS,
    Measurement,
    compile_attention,
    explore_splits,
    load_gpu_attention,
    plot_busy,
    plot_chip,
    plot_measured,
    plot_occupancy,
    plot_owners,
    plot_packing,
    plot_pairs,
    plot_sectors,
    plot_splits,
    programs_that_fit,
    sectors,
    used_share,
)

PNG = b"\x89PNG"
H100 = GPUS["H100"]
HEADER = ",".join(Measurement._fields)
LINE = "32,8,128,16,2048,134217728,50.5,2.7e12,3e12,"


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def given(panel):
    """The numbers written on a panel's multiprocessors."""
    return [int(text.get_text()) for text in panel.texts]


def test_the_cards_are_those_of_the_data_sheets():
    assert round(H100.ridge) == 295
    assert H100.processors * 4 * H100.registers == 132 * 256 * 1024
    assert (GPUS["A100"].processors, GPUS["A100"].shared) == (108, 167_936)


def test_the_chip_is_drawn_with_all_its_processors():
    chip, sizes = plot_chip(H100, title="a chip").axes
    assert sum(patch.get_gid() == "multiprocessor" for patch in chip.patches) == 132
    widths = [bar.get_width() for bar in sizes.patches]
    assert widths == [132 * 65_536 * 4, 132 * 228 * 1024, 50 * 2**20, 80e9]
    assert [text.get_text() for text in sizes.texts] == ["33 MiB", "29 MiB", "50 MiB", "80 GB"]


def test_owners_are_written_where_they_wrote():
    panel = plot_owners(torch.tensor([0, 0, 1, -1])).axes[0]
    assert [text.get_text() for text in panel.texts] == ["0", "0", "1", "–"]
    assert [bool(patch.get_hatch()) for patch in panel.patches] == [False, False, False, True]


@pytest.mark.parametrize("itemsize", [1, 2, 4, 16])
@pytest.mark.parametrize("step", [1, 3, 8, 50])
@pytest.mark.parametrize("start", [0, 8, 31])
def test_sectors_are_those_of_every_single_byte(itemsize, step, start):
    addresses = [start + itemsize * step * thread for thread in range(32)]
    each = {byte // 32 for address in addresses for byte in range(address, address + itemsize)}
    assert sectors(addresses, itemsize) == sorted(each)
    assert used_share(addresses, itemsize) == pytest.approx(32 * itemsize / (32 * len(each)))


def test_an_address_that_many_threads_ask_for_is_used_once():
    assert sectors([64] * 32, 4) == [2]
    assert used_share([64] * 32, 4) == 4 / 32


def test_sectors_are_drawn_as_counted():
    panel = plot_sectors({"dense": [0, 4, 8, 12], "wide": [0, 64]}, 4).axes[0]
    drawn = [patch.get_gid() for patch in panel.patches]
    assert drawn.count("asked dense") == 4
    assert drawn.count("asked wide") == 2
    assert (drawn.count("fetched dense"), drawn.count("fetched wide")) == (1, 2)
    assert [text.get_text() for text in panel.texts] == ["1 sectors\n50% used", "2 sectors\n12% used"]
    assert [patch.get_x() for patch in panel.patches if patch.get_gid() == "asked wide"] == [0, 64]


def test_packed_rows_and_padding():
    panels = plot_packing((1, 3)).axes
    for panel, group in zip(panels, (1, 3), strict=True):
        hatched = [bool(patch.get_hatch()) for patch in panel.patches]
        assert hatched == [False] * group + [True] * (16 - group)
    assert "19% of the rows" in panels[1].get_title()


@pytest.mark.parametrize("count", [0, 8, 132, 133, 500])
def test_every_program_is_given_to_a_processor(count):
    panel = plot_busy({"now": count}, H100).axes[0]
    assert sum(given(panel)) == count
    assert len(given(panel)) == min(count, 132)
    assert not given(panel) or max(given(panel)) - min(given(panel)) <= 1 or count < 132
    assert f"{min(count, 132)} of 132 busy" in panel.get_title()


@pytest.mark.parametrize(
    ("kv_heads", "batch", "keys", "splits"),
    [(8, 1, 65_536, 64), (8, 2, 32_768, 33), (2, 1, 300, 1), (8, 128, 65_536, 1), (1, 1, 1024, 4)],
)
def test_splits_are_drawn_as_the_kernel_makes_them(kv_heads, batch, keys, splits):
    whole, split = plot_splits(kv_heads, batch, keys).axes
    assert sum(given(whole)) == kv_heads * batch
    assert sum(given(split)) == kv_heads * batch * splits
    assert f"{splits} splits" in split.get_title()


def test_what_cannot_be_split_is_refused():
    with pytest.raises(InvalidRequestError, match="A100, H100"):
        plot_splits(gpu="abacus")
    with pytest.raises(InvalidRequestError, match="batch=0"):
        plot_splits(batch=0)


def test_the_explorer_obeys_each_control():
    explorer = explore_splits()
    controls, image = explorer.controls, explorer.image
    assert isinstance(image, ipywidgets.Image)
    seen = {bytes(image.value)}
    for control, value in zip(controls, (2, 16, 512, "A100"), strict=True):
        control.value = value
        assert bytes(image.value).startswith(PNG)
        seen.add(bytes(image.value))
    assert len(seen) == 5
    assert not plt.get_fignums()


def test_programs_that_fit():
    """By hand: 162 registers are 5,184 a warp, given as 5,376; 65,536 // (4 · 5,376) = 3."""
    fits = programs_that_fit(registers=162, shared=73_728, num_warps=4, gpu=H100)
    assert fits == {"registers": 3, "shared memory": 3, "warps": 16, "programs": 32}
    assert programs_that_fit(162, 73_728, 4, GPUS["A100"])["shared memory"] == 2
    assert programs_that_fit(32, 0, 1, H100)["programs"] == 32
    assert programs_that_fit(64, H100.shared - 1024, 4, H100)["shared memory"] == 1
    assert programs_that_fit(64, H100.shared, 4, H100)["shared memory"] == 0
    assert programs_that_fit(96, 0, 4, replace(H100, registers=2 * 65_536))["registers"] == 10


def test_occupancy_marks_the_scarcest():
    fits = {
        "a": {"registers": 3, "shared memory": 5, "warps": 16},
        "b": {"registers": 4, "shared memory": 2, "warps": 8},
    }
    panel = plot_occupancy(fits).axes[0]
    assert [bar.get_width() for bar in panel.patches] == [3, 4, 5, 2, 16, 8]
    assert [text.get_text() for text in panel.texts if "limit" in text.get_text()] == [
        "3  ← the limit",
        "2  ← the limit",
    ]


def test_the_kernel_is_compiled_without_a_gpu_and_without_the_interpreter(monkeypatch):
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    decode, prompt = compile_attention([(90, 4, 128, 1), (80, 3, 64, 500)])
    assert (decode.rows, decode.max_query_len, decode.spills) == (16, 1, 0)
    assert "sm_90" in decode.ptx
    assert "sm_80" in prompt.ptx
    assert prompt.rows > decode.rows
    assert 0 < decode.registers <= 255


def test_what_cannot_be_compiled_says_why():
    with pytest.raises(InvalidRequestError, match="cannot be compiled for"):
        compile_attention([(90, 0, 64, 1)])  # a group of no heads


def test_shipped_measurements_are_whole():
    rows = load_gpu_attention().rows
    assert len({row[:5] for row in rows}) == len(rows) > 20
    for row in rows:
        assert row.kv_bytes == 2 * row.batch * row.context * row.kv_heads * row.head_dim * 2
        assert row.bytes_per_second == pytest.approx(row.kv_bytes / row.microseconds * 1e6, rel=0.01)
        assert 0 < row.share_of_copy < 1.2


def test_measurements_are_read_and_drawn(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(f"# on a card\n# in May\n{HEADER}\n{LINE}\n{LINE.replace('32,8,', '9,3,')}1.5e12\n")
    origin, rows = load_gpu_attention(file)
    assert origin == "on a card in May"
    assert rows[0].share_of_copy == pytest.approx(0.9)
    assert [row.sdpa_bytes_per_second for row in rows] == [None, 1.5e12]
    panel = plot_measured(rows, origin=origin).axes[0]
    first, second, copy = panel.lines
    assert first.get_label() == "32/8 heads of 128"
    assert second.get_label() == "9/3 heads of 128"
    assert (first.get_xdata()[0], first.get_ydata()[0]) == (128, pytest.approx(0.9))
    assert list(copy.get_ydata()) == [1, 1]
    assert "on a card in May" in panel.get_xlabel()


@pytest.mark.parametrize(
    "text", [f"{HEADER}\n", f"{HEADER}\n{LINE.replace('128', 'many')}\n", "heads,batch\n3,4\n", f"{HEADER}\n32,8\n"]
)
def test_another_file_is_refused(tmp_path, text):
    file = tmp_path / "rows.csv"
    file.write_text(text)
    with pytest.raises(InvalidRequestError, match=r"rows\.csv"):
        load_gpu_attention(file)
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        load_gpu_attention(tmp_path / "none.csv")


def test_pairs_are_drawn_beside_each_other():
    panel = plot_pairs({"a": (0.5, 0.75), "b": (1, 2)}, ("one", "two"), xlabel="x", number_format=".0%").axes[0]
    assert [bar.get_width() for bar in panel.patches] == [0.5, 1, 0.75, 2]
    assert [text.get_text() for text in panel.texts] == ["50%", "100%", "75%", "200%"]
