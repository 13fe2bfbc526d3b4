"""Paged attention drawn: the online softmax, what gathering copies, which thread or program reads which block."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise, product
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from torch import Tensor

from minillm.errors import InvalidRequestError
from minillm.viz.explorer import Explorer, choice, number_slider, slider
from minillm.viz.style import BLUE, COLOURS, GREY, LIGHT, LINE_STYLES, MARKERS, ORANGE

if TYPE_CHECKING:
    from minillm.kernels.gpu.paged_attention import Launch

HATCHES = ("", "///", "...", "xx", "\\\\\\", "++")
"""A sequence's, beside its colour."""
MOST_CELLS = 2400
"""Programs × blocks that can be drawn."""


def _look(number: int) -> dict[str, Any]:
    """How something of this number is filled, told apart with colours and without."""
    colour, hatch = COLOURS[number % len(COLOURS)], HATCHES[number % len(HATCHES)]
    return {"facecolor": colour, "hatch": hatch, "edgecolor": "white"}


def plot_online(
    scores: Sequence[Float[Tensor, "keys"]],
    largest: Sequence[float],
    total: Sequence[float],
    outputs: Sequence[Float[Tensor, "head_dim"]],
    names: Sequence[str],
    *,
    title: str = "",
) -> Figure:
    """One query's online softmax, block by block (Milakov & Gimelshein 2018, §3).

    Args:
        scores: of each block's keys.
        largest: the running maximum after each block.
        total: the running sum of exponentials after each block, relative to that maximum.
        outputs: running mean / running sum after each block; the last one is the result.
        names: what each block is called.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    start = 0
    for number, (block, best) in enumerate(zip(scores, largest, strict=True)):
        x = range(start, start + len(block))
        left.bar(x, block, **_look(number))
        label = {"label": "largest so far"} if number == 0 else {}
        left.plot([start - 0.5, start + len(block) - 0.5], [best, best], color="black", linewidth=2, **label)
        start += len(block)
    left.axhline(0, color=GREY, linewidth=0.8)
    left.margins(y=0.18)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(xlabel="key, in order of reading (colour: its block)", ylabel="score", title="scores and their maximum")
    left.legend(frameon=False, loc="upper left", fontsize=9)
    places = range(len(names))
    looks = [_look(number) for number in places]
    colours, hatches = [look["facecolor"] for look in looks], [look["hatch"] for look in looks]
    bars = middle.bar(places, total, 0.6, color=colours, hatch=hatches, edgecolor="white")
    factors = [""] + [f"\nold × {_shrink(a, b):.2f}" for a, b in pairwise(largest)]
    middle.bar_label(bars, [f"{value:.2f}{factor}" for value, factor in zip(total, factors, strict=True)], fontsize=9)
    middle.set_ylim(0, 1.3 * max(total))
    middle.set(ylabel="running sum", title="sum of exponentials")
    for channel, values in enumerate(torch.stack(list(outputs)).T):
        style = LINE_STYLES[channel % len(LINE_STYLES)], MARKERS[channel % len(MARKERS)]
        right.plot(places, values, style[0], marker=style[1], color=COLOURS[channel % len(COLOURS)], label=str(channel))
    right.set(ylabel="mean / sum so far", title="the output, by channel")
    right.legend(
        title="channel", frameon=False, fontsize=8, title_fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    for panel in (middle, right):
        panel.set_xticks(places, names)
        panel.set_xlabel("after reading")
    right.margins(x=0.1)
    for panel in (left, middle, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure


def _shrink(before: float, after: float) -> float:
    return float(torch.exp(torch.tensor(before - after)))


class Gathered(NamedTuple):
    """Slots that gathering a batch of single queries copies, a number a sequence.

    Attributes:
        needed: hold a token.
        last_block: empty slots of the last block.
        padding: up to the longest sequence's blocks.
    """

    needed: list[int]
    last_block: list[int]
    padding: list[int]

    @classmethod
    def of(cls, lengths: Sequence[int], block_size: int) -> Gathered:
        """For sequences of these lengths in tokens."""
        held = [-(-length // block_size) * block_size for length in lengths]
        empty = [slots - length for slots, length in zip(held, lengths, strict=True)]
        return cls(list(lengths), empty, [max(held) - slots for slots in held])


def plot_gather(lengths: Sequence[int], block_size: int, *, title: str = "") -> Figure:
    """What the gather copies for each sequence, in slots: its tokens, the rest of its last block, padding."""
    figure, axes = plt.subplots(figsize=(9, 0.3 * len(lengths) + 1.7), layout="constrained")
    kinds = zip(
        ("tokens", "rest of the last block", "padding to the longest"),
        Gathered.of(lengths, block_size),
        (BLUE, ORANGE, LIGHT),
        ("", "xx", "///"),
        strict=True,
    )
    left = [0] * len(lengths)
    for name, sizes, colour, hatch in kinds:
        edge = GREY if colour == LIGHT else "white"
        axes.barh(range(len(lengths)), sizes, 0.8, left, color=colour, hatch=hatch, edgecolor=edge, label=name)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.set(xlabel="slots copied", ylabel="sequence", title=title)
    axes.set_yticks(range(len(lengths)))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


class Share(NamedTuple):
    """A piece of a thread's work: blocks begin … end - 1 of a sequence."""

    seq: int
    begin: int
    end: int


def shares_by_sequence(lengths: Sequence[int], block_size: int, threads: int) -> list[list[Share]]:
    """Each thread's work if whole sequences were divided, as many to each thread as to the next."""
    whole = [Share(seq, 0, -(-length // block_size)) for seq, length in enumerate(lengths)]
    return [whole[len(whole) * t // threads : len(whole) * (t + 1) // threads] for t in range(threads)]


def shares_by_block(lengths: Sequence[int], block_size: int, threads: int) -> list[list[Share]]:
    """Each thread's work as the CPU kernel divides it, one query a sequence: all blocks in a row, cut into equal parts.

    (The idea of Osama et al. 2023, "Stream-K".)
    """
    ends = [0, *accumulate(-(-length // block_size) for length in lengths)]
    shares = []
    for thread in range(threads):
        at, stop = ends[-1] * thread // threads, ends[-1] * (thread + 1) // threads
        mine = []
        while at < stop:
            seq = bisect_right(ends, at) - 1
            until = min(ends[seq + 1], stop)
            mine.append(Share(seq, at - ends[seq], until - ends[seq]))
            at = until
        shares.append(mine)
    return shares


def plot_shares(lengths: Sequence[int], block_size: int, threads: int, *, title: str = "") -> Figure:
    """Blocks that each thread reads one after the other, if sequences are divided and if blocks are."""
    figure, axes = plt.subplots(2, 1, figsize=(10, 0.8 * threads + 1.6), sharex=True, layout="constrained")
    ways = (("whole sequences divided", shares_by_sequence), ("blocks divided", shares_by_block))
    for panel, (name, divide) in zip(axes, ways, strict=True):
        shares = divide(lengths, block_size, threads)
        for thread, mine in enumerate(shares):
            left = 0
            for seq, begin, end in mine:
                size = end - begin
                panel.barh(thread, size, 0.75, left, **_look(seq), gid=f"{seq}")
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                panel.text(left + size / 2, thread, str(seq), ha="center", va="center", fontsize=9, bbox=box)
                left += size
        longest = max(sum(end - begin for _, begin, end in mine) for mine in shares)
        panel.set_title(f"{name}: done when {longest} blocks are read", fontsize=11)
        panel.set_yticks(range(threads))
        panel.set_ylabel("thread")
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
    axes[1].set_xlabel("blocks read, one after the other (number, colour and hatch: the sequence)")
    figure.suptitle(title)
    return figure


class Program(NamedTuple):
    """One program of the GPU kernel's grid.

    Attributes:
        launch: which launch of the kernel it belongs to.
        tile, kv_head, split: its place in the grid.
        seq: the sequence that it works for; None where the grid is larger than the work.
        queries: rows of `q` that are its own.
        keys: positions that it reads.
        first_block: the logical number of the first block that it reads.
        blocks: physical blocks that it reads, in order.
    """

    launch: int
    tile: int
    kv_head: int
    split: int
    seq: int | None
    queries: range
    keys: range
    first_block: int
    blocks: tuple[int, ...]


def program_grid(
    block_tables: Int[Tensor, "seqs max_blocks"],
    query_starts: Int[Tensor, "seqs_and_one"],
    seq_lens: Int[Tensor, "seqs"],
    *,
    block_size: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    processors: int | None = None,
) -> list[Program]:
    """Every program that `minillm.kernels.gpu.paged_attention` launches for a batch, and what it reads.

    Args:
        group: query heads that share a key/value head.
        processors: multiprocessors of the GPU; as many as the kernel assumes in Triton's interpreter when None.
    """
    from minillm.kernels.gpu import paged_attention as kernel  # not before somebody has chosen the interpreter

    starts, lengths = query_starts.tolist(), seq_lens.tolist()
    longest = max(end - start for start, end in pairwise(starts))
    splits = 1
    if longest == 1:
        processors = kernel._processors(torch.device("cpu")) if processors is None else processors
        splits = kernel.num_splits(len(lengths) * kv_heads, block_tables.shape[1] * block_size, processors)
    programs = []
    launches = kernel.launches(dtype, head_dim, group, starts[-1], len(lengths), longest)
    for number, launch in enumerate(launches):
        for tile in range(launch.num_tiles):
            seq, mine = _queries_of(launch, tile, starts, group)
            for kv_head, split in product(range(kv_heads), range(splits)):
                place = (number, tile, kv_head, split)
                if not mine:
                    programs.append(Program(*place, None, mine, range(0), 0, ()))
                    continue
                behind = lengths[seq] - starts[seq + 1]  # a query's position is its row of q plus this
                step = launch.tile.keys
                since = 0 if window is None else max(mine.start + behind - window + 1, 0) // step * step
                keys = _split_of(since, mine.stop + behind, step, split, splits)
                numbers = range(keys.start // block_size, -(-keys.stop // block_size)) if keys else range(0)
                blocks = tuple(int(block_tables[seq, number]) for number in numbers)
                programs.append(Program(*place, seq, mine, keys, numbers.start, blocks))
    return programs


def _queries_of(launch: Launch, tile: int, starts: Sequence[int], group: int) -> tuple[int, range]:
    """A tile's sequence, and the rows of `q` that are its own; none where the program returns at once."""
    queries = launch.tile.rows // group
    if launch.most <= queries:
        seq, first = tile, starts[tile]
    else:
        first_tiles = [start // queries + seq for seq, start in enumerate(starts[:-1])]
        seq = bisect_right(first_tiles, tile) - 1
        first = starts[seq] + (tile - first_tiles[seq]) * queries
    if not launch.fewest <= starts[seq + 1] - starts[seq] <= launch.most:
        return seq, range(0)
    return seq, range(first, min(first + queries, starts[seq + 1]))


def _split_of(since: int, to: int, step: int, split: int, splits: int) -> range:
    """One split's part of the keys since … to - 1, in whole steps."""
    share = ceil(ceil((to - since) / step) / splits) * step
    begin = since + split * share
    return range(begin, max(begin, min(to, begin + share)))


def plot_programs(programs: Sequence[Program], num_blocks: int, *, title: str = "") -> Figure:
    """One row a program, one column a physical block; coloured where the program reads it, with the logical number.

    Raises:
        InvalidRequestError: too many programs and blocks to be told apart.
    """
    if len(programs) * num_blocks > MOST_CELLS:
        raise InvalidRequestError(
            f"{len(programs)} programs × {num_blocks} blocks cannot be told apart: draw a smaller batch"
        )
    figure, axes = plt.subplots(figsize=(11, 0.25 * len(programs) + 1.9), layout="constrained")
    for row, program in enumerate(programs):
        if program.seq is None or not program.blocks:
            axes.add_patch(Rectangle((-0.5, row - 0.5), num_blocks, 1, facecolor=LIGHT, edgecolor="white"))
            text = (
                "has nothing to read and returns"
                if program.seq is not None
                else "has no queries of its own and returns"
            )
            axes.text((num_blocks - 1) / 2, row, text, ha="center", va="center", fontsize=8, color="#444444")
            continue
        for number, block in enumerate(program.blocks, start=program.first_block):
            patch = Rectangle((block - 0.46, row - 0.42), 0.92, 0.84, **_look(program.seq))
            patch.set_gid(f"{row} {block} {number}")
            axes.add_patch(patch)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            axes.text(block, row, str(number), ha="center", va="center", fontsize=7, bbox=box)
    axes.set_xlim(-0.5, num_blocks - 0.5)
    axes.set_ylim(len(programs) - 0.5, -0.5)
    axes.set_yticks(range(len(programs)), [_label(program) for program in programs], fontsize=8, family="monospace")
    axes.set_xticks(range(0, num_blocks, 1 if num_blocks <= 30 else 2))
    axes.set_xlabel("physical block (the number in a cell: which block of its sequence it is)")
    axes.set_ylabel("program")
    axes.set_title("launch: (tile, KV head, split), its queries", loc="left", x=-0.1, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)
    seqs = sorted({program.seq for program in programs if program.seq is not None})
    handles = [Patch(**_look(seq), label=f"sequence {seq}") for seq in seqs]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
    figure.suptitle(title)
    return figure


def _label(program: Program) -> str:
    place = f"{program.launch}: ({program.tile}, {program.kv_head}, {program.split})"
    mine = program.queries
    own = "-" if not mine else f"q {mine.start}" if len(mine) == 1 else f"q {mine.start}–{mine.stop - 1}"
    return f"{place} {own:>7}"


class ExploredBatch(NamedTuple):
    """A batch of `explore_programs`: new tokens and all tokens of each sequence, and how large the blocks are."""

    queries: tuple[int, ...]
    lengths: tuple[int, ...]
    block_size: int


EXPLORED_BATCHES: Mapping[str, ExploredBatch] = {
    "three decodes": ExploredBatch((1, 1, 1), (600, 40, 200), 32),
    "one long decode": ExploredBatch((1,), (1000,), 32),
    "a prompt's piece and two decodes": ExploredBatch((16, 1, 1), (96, 60, 130), 16),
    "a whole prompt": ExploredBatch((40,), (40,), 4),
}
"""Name → batch, for `explore_programs`."""


NO_WINDOW_OR: tuple[str | int, ...] = ("none", 32, 128)
"""Sliding windows of `explore_programs`, in tokens. (A menu shows None as if nothing were chosen.)"""


def scattered_tables(lengths: Sequence[int], block_size: int, seed: int = 0) -> Int[Tensor, "seqs max_blocks"]:
    """Block tables in which each sequence's blocks lie anywhere; no block is in two of them."""
    counts = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed))
    tables = torch.zeros((len(lengths), max(counts)), dtype=torch.long)
    for row, blocks in enumerate(order.split(counts)):
        tables[row, : len(blocks)] = blocks
    return tables


def plot_explored_programs(
    batch: str = "three decodes",
    group: int = 3,
    kv_heads: int = 1,
    processors: int = 4,
    window: int | None = None,
) -> Figure:
    """`plot_programs` of one of `EXPLORED_BATCHES`, heads of 64 channels in float32.

    Args:
        group: query heads that share a key/value head.
        processors: multiprocessors of the GPU.
        window: of a sliding window, in tokens.

    Raises:
        InvalidRequestError: another name.
    """
    if batch not in EXPLORED_BATCHES:
        raise InvalidRequestError(f"{batch!r} is not one of {', '.join(EXPLORED_BATCHES)}")
    queries, lengths, block_size = EXPLORED_BATCHES[batch]
    tables = scattered_tables(lengths, block_size)
    programs = program_grid(
        tables,
        torch.tensor([0, *accumulate(queries)]),
        torch.tensor(lengths),
        block_size=block_size,
        kv_heads=kv_heads,
        group=group,
        head_dim=64,
        window=window,
        processors=processors,
    )
    busy = sum(bool(program.blocks) for program in programs)
    splits = 1 + max(program.split for program in programs)
    parts = f"{len(programs)} programs, {busy} of them busy; keys in {splits} {'splits' if splits > 1 else 'piece'}"
    return plot_programs(programs, sum(-(-length // block_size) for length in lengths), title=f"{batch}: {parts}")


def explore_programs(
    batch: str = "three decodes",
    group: int = 3,
    kv_heads: int = 1,
    processors: int = 4,
    window: int | None = None,
) -> Explorer:
    """`plot_explored_programs` with a control for each of its arguments; needs a running kernel to move."""
    controls = (
        choice("batch", EXPLORED_BATCHES, batch),
        slider("query heads per KV head", group, 1, 8),
        slider("KV heads", kv_heads, 1, 3),
        number_slider("multiprocessors", (1, 2, 4, 8), processors),
        choice("sliding window (tokens)", NO_WINDOW_OR, window or NO_WINDOW_OR[0]),
    )

    def draw(batch: str, group: int, kv_heads: int, processors: int, window: int | str) -> Figure:
        return plot_explored_programs(batch, group, kv_heads, processors, window if isinstance(window, int) else None)

    return Explorer(controls, draw)


def plot_times(milliseconds: Mapping[str, float], *, title: str = "") -> Figure:
    """One bar a way of doing the same thing, on a logarithmic axis, with its time."""
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(milliseconds) + 1.2), layout="constrained")
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(milliseconds))]
    bars = axes.barh(range(len(milliseconds)), list(milliseconds.values()), 0.6, color=colours)
    axes.bar_label(bars, [f"{value:,.1f} ms" for value in milliseconds.values()], padding=4, fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(min(milliseconds.values()) / 3, 4 * max(milliseconds.values()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(milliseconds)), list(milliseconds))
    axes.invert_yaxis()
    axes.set(xlabel="time (ms, logarithmic)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
