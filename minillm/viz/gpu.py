"""How a GPU runs a kernel: the chip in numbers, what a warp's loads fetch, how programs fill the multiprocessors, what
compiled code leaves room for, and what was measured; its figures and its explorer."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from minillm.errors import InvalidRequestError
from minillm.viz.explorer import Explorer, choice, number_slider
from minillm.viz.memory import Machine
from minillm.viz.style import BLUE, COLOURS, GREY, LIGHT, MARKERS, ORANGE, SKY, ink_on

SECTOR = 32
"""Bytes that memory gives at the least (NVIDIA, Nsight Compute documentation: "sector")."""
WARP = 32
"""Threads that do the same instruction at the same time."""
REGISTER_UNIT = 256
"""Registers are given to a warp in pieces of so many."""
RESERVED_SHARED = 1024
"""Bytes of shared memory that each program costs beside what it asked for."""
COLUMNS = 12
"""Of a chip's multiprocessors, as they are drawn."""

MEASURED = Path(__file__).resolve().parents[1] / "assets" / "benchmarks" / "gpu_attention_h100.csv"
"""What `minillm.bench.gpu_attention` measured on one H100; its first lines say when and with what."""


@dataclass(frozen=True)
class Gpu(Machine):
    """A GPU in numbers, beside what every machine has.

    Attributes:
        memory: bytes of its large memory.
        level2: bytes of the cache that all multiprocessors share.
        processors: multiprocessors.
        registers: of 4 bytes, of one multiprocessor.
        shared: bytes of shared memory of one multiprocessor.
        warps: that one multiprocessor holds at a time.
        programs: that one multiprocessor holds at a time.
    """

    memory: float
    level2: float
    processors: int
    registers: int
    shared: int
    warps: int
    programs: int


GPUS: Mapping[str, Gpu] = {
    "A100": Gpu("A100", 312e12, 2.039e12, 80e9, 40 * 2**20, 108, 65_536, 164 * 2**10, 64, 32),
    "H100": Gpu("H100", 989e12, 3.35e12, 80e9, 50 * 2**20, 132, 65_536, 228 * 2**10, 64, 32),
}
"""From NVIDIA's data sheets (SXM, 80 GB; bfloat16 without sparsity) and the CUDA Programming Guide's table of compute
capabilities 8.0 and 9.0."""


def plot_chip(gpu: Gpu, *, title: str = "") -> Figure:
    """A chip's multiprocessors with its memories below, and how much each kind of memory holds."""
    figure, (chip, sizes) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", width_ratios=(1, 1.15))
    rows = -(-gpu.processors // COLUMNS)
    for number in range(gpu.processors):
        corner = (number % COLUMNS + 0.06, number // COLUMNS + 0.06)
        chip.add_patch(Rectangle(corner, 0.88, 0.88, facecolor=BLUE, gid="multiprocessor"))
    below = ((f"level-2 cache: {gpu.level2 / 2**20:.0f} MiB", SKY, 1.1), (_memory_label(gpu), ORANGE, 1.9))
    top = rows + 0.3
    for label, colour, height in below:
        chip.add_patch(Rectangle((0.06, top), COLUMNS - 0.12, height, facecolor=colour))
        chip.text(COLUMNS / 2, top + height / 2, label, ha="center", va="center", fontsize=10)
        top += height + 0.3
    chip.set(xlim=(0, COLUMNS), ylim=(top, 0), aspect="equal")
    chip.set_title(f"{gpu.processors} multiprocessors over one memory", fontsize=10)
    chip.axis("off")
    kinds = {
        "registers, all together": gpu.processors * 4 * gpu.registers,
        "shared memory, all together": gpu.processors * gpu.shared,
        "level-2 cache": gpu.level2,
        "memory": gpu.memory,
    }
    bars = sizes.barh(list(kinds), list(kinds.values()), color=[BLUE, BLUE, SKY, ORANGE])
    sizes.bar_label(bars, [_bytes(size) for size in kinds.values()], padding=4, fontsize=9)
    sizes.invert_yaxis()
    sizes.set(xscale="log", xlim=(1e6, 4e12), xlabel="size (bytes)")
    sizes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure


def _memory_label(gpu: Gpu) -> str:
    return f"memory: {gpu.memory / 1e9:.0f} GB,\n{gpu.bandwidth / 1e12:.2f} TB a second"


def _bytes(size: float) -> str:
    return f"{size / 1e9:.0f} GB" if size >= 1e9 else f"{size / 2**20:.0f} MiB"


def plot_owners(owners: Int[Tensor, "numbers"], *, title: str = "") -> Figure:
    """Which program wrote each number of a vector; −1 means nobody."""
    figure, axes = plt.subplots(figsize=(9, 1.5), layout="constrained")
    for place, owner in enumerate(owners.tolist()):
        colour, hatch = (LIGHT, "///") if owner < 0 else (COLOURS[owner % len(COLOURS)], "")
        axes.add_patch(Rectangle((place, 0), 1, 1, facecolor=colour, hatch=hatch, edgecolor="white"))
        label = "–" if owner < 0 else str(owner)
        axes.text(place + 0.5, 0.5, label, ha="center", va="center", fontsize=9, color=ink_on(colour), weight="bold")
    axes.set(xlim=(0, len(owners)), ylim=(0, 1), xlabel="place in the vector", title=title)
    axes.set_yticks([])
    shown = range(0, len(owners), 4)
    axes.set_xticks([place + 0.5 for place in shown], [str(place) for place in shown])
    axes.spines[:].set_visible(False)
    return figure


def sectors(addresses: Iterable[int], itemsize: int) -> list[int]:
    """Numbers of the 32-byte sectors in which the items at these byte addresses lie, in order.

    A warp's load fetches exactly these, whole, however few of their bytes it asked for.
    """
    return sorted({at // SECTOR for first in addresses for at in (first, first + itemsize - 1)})


def used_share(addresses: Sequence[int], itemsize: int) -> float:
    """Of the bytes that are fetched for these items, how many were asked for."""
    return len(set(addresses)) * itemsize / (SECTOR * len(sectors(addresses, itemsize)))


def plot_sectors(patterns: Mapping[str, Sequence[int]], itemsize: int, *, title: str = "") -> Figure:
    """The memory that each load of a warp fetches (whole sectors), and in it the items that it asked for.

    Args:
        patterns: name → the byte address of each thread's item.
    """
    figure, axes = plt.subplots(figsize=(10, 0.8 * len(patterns) + 1.5), layout="constrained")
    end = max(SECTOR * (sectors(addresses, itemsize)[-1] + 1) for addresses in patterns.values())
    for row, (name, addresses) in enumerate(patterns.items()):
        fetched = sectors(addresses, itemsize)
        for sector in range(end // SECTOR):
            colour, name_of_it = (SKY, f"fetched {name}") if sector in fetched else ("white", "")
            corner = (sector * SECTOR, row - 0.3)
            box = Rectangle(corner, SECTOR, 0.6, facecolor=colour, edgecolor=GREY, linewidth=0.6, gid=name_of_it)
            axes.add_patch(box)
        for address in sorted(set(addresses)):
            axes.add_patch(Rectangle((address, row - 0.3), itemsize, 0.6, facecolor=BLUE, gid=f"asked {name}"))
        said = f"{len(fetched)} sectors\n{used_share(addresses, itemsize):.0%} used"
        axes.text(end * 1.01, row, said, va="center", fontsize=10)
    axes.set(xlim=(0, end), ylim=(len(patterns) - 0.5, -0.5), xlabel="address (bytes; each box is one sector of 32)")
    axes.set_yticks(range(len(patterns)), list(patterns))
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    handles = [Rectangle((0, 0), 1, 1, color=BLUE), Rectangle((0, 0), 1, 1, color=SKY)]
    labels = ["asked for by a thread", "fetched with it, not asked for"]
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    return figure


def plot_packing(groups: Sequence[int], rows: int = 16, *, title: str = "") -> Figure:
    """Single queries as rows of the tile that `tl.dot` takes, one panel a group size: query heads, then padding."""
    figure, axes = plt.subplots(1, len(groups), figsize=(2.3 * len(groups), 3.8), layout="constrained", squeeze=False)
    for panel, group in zip(axes[0], groups, strict=True):
        for row in range(rows):
            colour, hatch = (BLUE, "") if row < group else (LIGHT, "///")
            panel.add_patch(Rectangle((0, row), 1, 1, facecolor=colour, hatch=hatch, edgecolor="white"))
            label = f"query head {row}" if row < group else ""
            panel.text(0.5, row + 0.5, label, ha="center", va="center", color=ink_on(colour), fontsize=8)
        panel.set(xlim=(0, 1), ylim=(rows, 0), xticks=[], xlabel="channels", ylabel="row of the tile")
        panel.set_yticks([row + 0.5 for row in range(0, rows, 5)], [str(row) for row in range(0, rows, 5)])
        panel.set_title(f"groups of {group}:\n{group / rows:.0%} of the rows", fontsize=10)
    axes[0, 0].set_ylabel("row of the tile")
    figure.suptitle(title)
    return figure


def plot_busy(programs: Mapping[str, int], gpu: Gpu, *, title: str = "") -> Figure:
    """How many programs each multiprocessor is given, for several numbers of programs; hatched: none."""
    figure, axes = plt.subplots(1, len(programs), figsize=(3.8 * len(programs), 4.5), layout="constrained")
    for panel, (name, count) in zip(axes if len(programs) > 1 else [axes], programs.items(), strict=True):
        _draw_busy(panel, count, gpu)
        panel.set_title(f"{name}:\n{min(count, gpu.processors)} of {gpu.processors} busy", fontsize=10)
    figure.suptitle(title)
    return figure


def _draw_busy(axes: Axes, programs: int, gpu: Gpu) -> None:
    for number in range(gpu.processors):
        given = programs // gpu.processors + (number < programs % gpu.processors)
        left, top = number % COLUMNS, number // COLUMNS
        colour, hatch = (BLUE, "") if given else (LIGHT, "///")
        box = Rectangle((left + 0.05, top + 0.05), 0.9, 0.9, facecolor=colour, hatch=hatch, edgecolor="white")
        axes.add_patch(box)
        if given:
            axes.text(left + 0.5, top + 0.52, f"{given}", ha="center", va="center", fontsize=8, color="white")
    axes.set(xlim=(0, COLUMNS), ylim=(-(-gpu.processors // COLUMNS), 0), aspect="equal")
    axes.axis("off")


EXPLORED_KV_HEADS = (1, 2, 3, 4, 8, 32)
EXPLORED_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
EXPLORED_KEYS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


def plot_splits(kv_heads: int = 8, batch: int = 1, keys: int = 65_536, gpu: str = "H100", *, title: str = "") -> Figure:
    """The multiprocessors that decode attention keeps busy, one program a sequence and key/value head, and split.

    Args:
        kv_heads: key/value heads of the model.
        batch: sequences.
        keys: of each sequence.
        gpu: one of `GPUS`.

    Raises:
        InvalidRequestError: for another GPU, or where there is nothing to do.
    """
    if gpu not in GPUS:
        raise InvalidRequestError(f"{gpu!r} is not one of {', '.join(GPUS)}")
    if min(kv_heads, batch, keys) < 1:
        raise InvalidRequestError(f"kv_heads={kv_heads}, batch={batch}, keys={keys}: each must be at least 1")
    from minillm.kernels.gpu.paged_attention import num_splits  # Triton exists on Linux only

    programs = batch * kv_heads
    splits = num_splits(programs, keys, GPUS[gpu].processors)
    drawn = {
        f"not split, {programs:,} programs of {keys:,} keys": programs,
        f"{splits} splits, {programs * splits:,} programs of {-(-keys // splits):,} keys": programs * splits,
    }
    said = f"{gpu}: {batch} × {keys:,} tokens, {kv_heads} key/value heads"
    return plot_busy(drawn, GPUS[gpu], title=title or said)


def explore_splits(kv_heads: int = 8, batch: int = 1, keys: int = 65_536, gpu: str = "H100") -> Explorer:
    """`plot_splits` with a control for each of its arguments; needs a running kernel to move."""
    controls = (
        number_slider("key/value heads", EXPLORED_KV_HEADS, kv_heads),
        number_slider("sequences", EXPLORED_BATCHES, batch),
        number_slider("tokens each", EXPLORED_KEYS, keys),
        choice("GPU", GPUS, gpu),
    )
    return Explorer(controls, plot_splits)


class AttentionTile(NamedTuple):
    """The attention kernel as it was compiled for one GPU and one kind of tile.

    Attributes:
        capability: 80 for the A100, 90 for the H100.
        group, head_dim, max_query_len: what it was compiled for; 1 is decode.
        rows, keys, num_warps, num_stages: the tile, as `tile_of` chose it.
        registers: of each thread.
        spills: bytes that each thread stores in slow memory, since registers did not suffice.
        shared: bytes of shared memory of a program.
        ptx: NVIDIA's portable assembly.
    """

    capability: int
    group: int
    head_dim: int
    max_query_len: int
    rows: int
    keys: int
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    shared: int
    ptx: str


COMPILE = """
import json, sys
import torch
from minillm.kernels.gpu import paged_attention as attention
from minillm.kernels.gpu.compiled import compile_ahead

for capability, group, head_dim, max_query_len in json.loads(sys.argv[1]):
    tile = attention.tile_of(torch.bfloat16, head_dim, group, max_query_len)
    split = max_query_len == 1
    found = compile_ahead(
        attention._attend,
        attention.argument_types("bf16", split=split),
        attention.constants(tile, group, head_dim, 16, split=split),
        capability=capability, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )
    print(json.dumps([*tile, *found]))
"""


def compile_attention(cases: Sequence[tuple[int, int, int, int]]) -> list[AttentionTile]:
    """The attention kernel in bfloat16, compiled for GPUs that need not be here.

    In a process of its own, without TRITON_INTERPRET: where Triton's interpreter is on, nothing is compiled.

    Args:
        cases: (capability, group, head_dim, max_query_len) each.

    Raises:
        InvalidRequestError: it cannot be compiled here, or not for such a case.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InvalidRequestError(f"the kernel cannot be compiled for {cases}: {why}")
    lines = done.stdout.splitlines()
    return [AttentionTile(*case, *json.loads(line)) for case, line in zip(cases, lines, strict=True)]


def programs_that_fit(registers: int, shared: int, num_warps: int, gpu: Gpu) -> dict[str, int]:
    """How many programs one multiprocessor holds at a time, by each thing of which it has only so much.

    The least of these is what happens (CUDA Programming Guide, "Multiprocessor Level"; registers are given to a warp
    256 at a time, and a program costs 1 KiB of shared memory more than it asks for).
    """
    a_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    return {
        "registers": gpu.registers // (a_warp * num_warps),
        "shared memory": gpu.shared // (shared + RESERVED_SHARED),
        "warps": gpu.warps // num_warps,
        "programs": gpu.programs,
    }


def plot_occupancy(kernels: Mapping[str, Mapping[str, int]], *, title: str = "") -> Figure:
    """Programs that fit on a multiprocessor by each limit (`programs_that_fit`); the least is marked."""
    figure, axes = plt.subplots(figsize=(9, 0.95 * len(kernels) + 1.6), layout="constrained")
    limits = ("registers", "shared memory", "warps")
    styles = ((BLUE, ""), (ORANGE, "///"), (LIGHT, "..."))
    for number, (limit, (colour, hatch)) in enumerate(zip(limits, styles, strict=True)):
        counts = [fits[limit] for fits in kernels.values()]
        least = [min(fits.values()) for fits in kernels.values()]
        places = [row + 0.26 * (number - 1) for row in range(len(kernels))]
        bars = axes.barh(places, counts, 0.24, color=colour, hatch=hatch, edgecolor="white", label=f"by {limit}")
        labels = [f"{count}{'  ← the limit' if count == low else ''}" for count, low in zip(counts, least, strict=True)]
        axes.bar_label(bars, labels, padding=4, fontsize=9)
    axes.set_yticks(range(len(kernels)), list(kernels))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="programs that a multiprocessor holds at a time", title=title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


class Measurement(NamedTuple):
    """Decode attention of one size, measured.

    Attributes:
        kv_bytes: keys and values that are read.
        bytes_per_second: of ours.
        copy_bytes_per_second: what a plain copy reads and writes on the same card.
        sdpa_bytes_per_second: PyTorch's attention over the same keys in one stretch; None where not measured.
    """

    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    context: int
    kv_bytes: int
    microseconds: float
    bytes_per_second: float
    copy_bytes_per_second: float
    sdpa_bytes_per_second: float | None

    @property
    def shape(self) -> str:
        """Query heads, key/value heads and channels, as figures name them."""
        return f"{self.heads}/{self.kv_heads} heads of {self.head_dim}"

    @property
    def share_of_copy(self) -> float:
        """Bytes a second, of those of a copy."""
        return self.bytes_per_second / self.copy_bytes_per_second


class Measured(NamedTuple):
    """A table of measurements, and what its comment lines say of where it is from."""

    origin: str
    rows: list[Measurement]


def load_gpu_attention(path: str | Path = MEASURED) -> Measured:
    """Measurements of decode attention from a CSV file with the fields of `Measurement`; by default those that ship.

    Raises:
        InvalidRequestError: a file that cannot be read, or of another form.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}") from error
    origin = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    try:
        rows = [_measurement(row) for row in csv.DictReader(line for line in lines if not line.startswith("#"))]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequestError(
            f"{path} is not a CSV file with the columns {', '.join(Measurement._fields)}: {error!r}"
        ) from error
    if not rows:
        raise InvalidRequestError(f"{path} has no measurements")
    return Measured(origin, rows)


def _measurement(row: Mapping[str, str]) -> Measurement:
    heads, kv_heads, head_dim, batch, context, kv_bytes = (int(row[name]) for name in Measurement._fields[:6])
    microseconds, ours, copy = (float(row[name]) for name in Measurement._fields[6:9])
    sdpa = float(row["sdpa_bytes_per_second"]) if row["sdpa_bytes_per_second"] else None
    return Measurement(heads, kv_heads, head_dim, batch, context, kv_bytes, microseconds, ours, copy, sdpa)


def plot_measured(rows: Sequence[Measurement], *, origin: str = "", title: str = "") -> Figure:
    """Share of a copy's bytes a second, against the bytes of keys and values, one mark a measurement.

    Args:
        origin: where the numbers are from, written below.
    """
    figure, axes = plt.subplots(figsize=(9, 4.4), layout="constrained")
    for number, shape in enumerate(dict.fromkeys(row.shape for row in rows)):
        chosen = [row for row in rows if row.shape == shape]
        marker, colour = MARKERS[number % len(MARKERS)], COLOURS[number % len(COLOURS)]
        sizes, shares = [row.kv_bytes / 2**20 for row in chosen], [row.share_of_copy for row in chosen]
        axes.plot(sizes, shares, marker, color=colour, markersize=8, fillstyle="none", label=shape)
    axes.axhline(1, color=GREY, linestyle=":")
    axes.annotate("a copy", (1, 1), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                  va="center", fontsize=9, color="#555555")  # fmt: skip
    axes.set(xscale="log", ylim=(0, 1.15), title=title)
    axes.set_xlabel(f"keys and values that one step reads (MiB)\n{textwrap.fill(origin, 110)}".strip())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("bytes a second, of a copy's")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def plot_pairs(
    pairs: Mapping[str, tuple[float, float]],
    kinds: tuple[str, str],
    *,
    xlabel: str,
    number_format: str,
    title: str = "",
) -> Figure:
    """Two bars for each name: a number of the first kind, hatched, and one of the second.

    Args:
        number_format: of the numbers beside the bars and on the axis, as `format` takes it.
    """
    figure, axes = plt.subplots(figsize=(9, 0.8 * len(pairs) + 1.5), layout="constrained")
    for number, (kind, colour, hatch) in enumerate(zip(kinds, (ORANGE, BLUE), ("///", ""), strict=True)):
        values = [pair[number] for pair in pairs.values()]
        places = [row + (-0.2, 0.2)[number] for row in range(len(pairs))]
        bars = axes.barh(places, values, 0.38, color=colour, hatch=hatch, edgecolor="white", label=kind)
        axes.bar_label(bars, [format(value, number_format) for value in values], padding=4, fontsize=9)
    axes.set_yticks(range(len(pairs)), list(pairs))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.xaxis.set_major_formatter(lambda value, _: format(value, number_format))
    axes.set(xlabel=xlabel, title=title)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
