"""Blocks that sequences share: how many it saves, counted and by formula; tables, beams and common beginnings drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib.pyplot as plt
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minillm.cache.block_pool import ROOT, BlockPool, block_hash
from minillm.cache.block_table import BlockTable
from minillm.engine.runner import Chunk, ModelRunner
from minillm.engine.trace import TracedStep
from minillm.errors import InvalidRequestError
from minillm.viz.attention import token_names
from minillm.viz.explorer import Explorer, number_slider, slider
from minillm.viz.style import BLUE, COLOURS, GREY, LINE_STYLES, MARKERS, ORANGE, SKY

EMPTY = "#f2f2f2"
NUMBERED_COLUMNS = 12
FRAMED_COLUMNS = 60
"""Tables up to this long have their blocks' numbers written into them."""
PANELS_BESIDE = 4
"""Tables up to this long stand beside each other; longer ones below."""
EXPLORED_BLOCK_SIZES = (4, 8, 16, 32, 64)


class TableState(NamedTuple):
    """A sequence's block table at one moment.

    Attributes:
        blocks: in the sequence's order.
        num_tokens: how many tokens they hold; the last block may be partly filled.
    """

    blocks: tuple[int, ...]
    num_tokens: int

    @classmethod
    def of(cls, table: BlockTable) -> TableState:
        return cls(tuple(table.blocks), table.num_tokens)


def traced_tables(step: TracedStep) -> dict[str, TableState]:
    """The tables of the requests that a step computed, by the requests' names."""
    return {part.name: TableState(part.blocks, part.start + part.count) for part in step.parts}


class Sharing(NamedTuple):
    """Blocks of some sequences.

    Attributes:
        held: blocks that they hold; a shared one counts once.
        needed: what they would hold if nothing were shared.
    """

    held: int
    needed: int

    @classmethod
    def of(cls, tables: Iterable[TableState]) -> Sharing:
        blocks = [block for table in tables for block in table.blocks]
        return cls(len(set(blocks)), len(blocks))

    @classmethod
    def total(cls, moments: Iterable[Sharing]) -> Sharing:
        """Of several moments or groups, added up."""
        held, needed = zip(*moments, strict=True)
        return cls(sum(held), sum(needed))

    @property
    def saved(self) -> float:
        """Blocks saved by sharing over blocks needed without it (Kwon et al. 2023, §6.3)."""
        return (self.needed - self.held) / self.needed


def sharing_of_samples(prompt: int, answer: int, n: int, block_size: int) -> Sharing:
    """Of `n` answers to one prompt, by formula: the prompt's full blocks are there once, everything else n times.

    Args:
        prompt: tokens, at least one.
        answer: tokens that each answer has stored so far. Before the first, the partly filled block is shared too.

    Raises:
        InvalidRequestError: for sizes that cannot be.
    """
    _check_sizes(prompt, answer, n, block_size)
    each = -(-(prompt + answer) // block_size)
    shared = prompt // block_size if answer else each
    return Sharing(shared + n * (each - shared), n * each)


def fork_samples(prompt: int, answer: int, n: int, block_size: int) -> list[BlockTable]:
    """The same by deed: a table that holds the prompt is forked, and each of the `n` grows token by token.

    Raises:
        InvalidRequestError: for sizes that cannot be.
    """
    _check_sizes(prompt, answer, n, block_size)
    pool = BlockPool(n * -(-(prompt + answer) // block_size), block_size)
    first = BlockTable(pool)
    first.append(prompt)
    tables = [first, *(first.fork() for _ in range(n - 1))]
    for _ in range(answer):
        for table in tables:
            table.append(1)
    return tables


def _check_sizes(prompt: int, answer: int, n: int, block_size: int) -> None:
    if min(prompt, n, block_size) < 1 or answer < 0:
        raise InvalidRequestError(
            f"prompt ({prompt}), n ({n}) and block_size ({block_size}) must be at least 1, answer ({answer}) at least 0"
        )


@dataclass(frozen=True)
class RecordedStep:
    """One call of the model: a row a sequence, in beam search the best first.

    Attributes:
        tokens: the last token that each row was given.
        tables: each row's, this call's tokens included.
        parents: which row of the call before each one goes on from; empty where they begin.
        num_copies: blocks copied before this call's tokens were written.
    """

    tokens: tuple[int, ...]
    tables: tuple[TableState, ...]
    parents: tuple[int, ...]
    num_copies: int


class RecordingRunner:
    """A runner that beam search can drive like any other, and that notes what it was given."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.steps: list[RecordedStep] = []

    def hidden(self, chunks: Sequence[Chunk]) -> Float[Tensor, "tokens hidden"]:
        tables = [TableState.of(chunk.table) for chunk in chunks]
        parents = [self._parent(chunk) for chunk in chunks if chunk.start]
        copies = sum(len(chunk.copies) for chunk in chunks)
        tokens = [chunk.tokens[-1] for chunk in chunks]
        self.steps.append(RecordedStep(tuple(tokens), tuple(tables), tuple(parents), copies))
        return self.runner.hidden(chunks)

    def logits(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocab"]:
        return self.runner.logits(hidden)

    def _parent(self, chunk: Chunk) -> int:
        """The row that wrote the token before: nobody else's table ended with the block that it is in."""
        block = chunk.table.blocks[(chunk.start - 1) // chunk.table.pool.block_size]
        if chunk.copies:
            block = chunk.copies[0].source
        return [table.blocks[-1] for table in self.steps[-1].tables].index(block)


def block_chain(tokens: Sequence[int], block_size: int) -> list[bytes]:
    """The chained hashes of a text's full blocks: equal up to where two texts part, and never again behind."""
    chain = [ROOT]
    for end in range(block_size, len(tokens) + 1, block_size):
        chain.append(block_hash(chain[-1], tokens[end - block_size : end]))
    return chain[1:]


def plot_tables(moments: Mapping[str, Mapping[str, TableState]], block_size: int, *, title: str = "") -> Figure:
    """Block tables at some moments: a row a sequence, a cell a block with its number, as full as it is drawn."""
    longest = max(len(table.blocks) for tables in moments.values() for table in tables.values())
    rows = max(len(tables) for tables in moments.values())
    count = len(moments)
    if longest <= PANELS_BESIDE:
        shape, size = (1, count), (max(3.3 * count, 5), 0.42 * rows + 1.5)
    else:
        shape, size = (count, 1), (10, count * (0.42 * rows + 0.75) + 0.6)
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for panel, (name, tables) in zip(axes.flat, moments.items(), strict=True):
        _draw_tables(panel, tables, block_size, longest)
        panel.set_ylim(rows - 0.4, -0.5)
        sharing = Sharing.of(tables.values())
        panel.set_title(f"{name}: {sharing.held} blocks", fontsize=11)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    return figure


def _draw_tables(axes: Axes, tables: Mapping[str, TableState], block_size: int, columns: int) -> None:
    holders: dict[int, int] = {}
    for table in tables.values():
        for block in table.blocks:
            holders[block] = holders.get(block, 0) + 1
    for row, table in enumerate(tables.values()):
        for column, block in enumerate(table.blocks):
            share = min(1.0, table.num_tokens / block_size - column)
            shared = holders[block] > 1
            place = (column + 0.04, row - 0.36)
            width = 0.92 if columns <= FRAMED_COLUMNS else 1.0  # gaps would be narrower than a dot
            frame = 0.8 if columns <= FRAMED_COLUMNS else 0.0
            axes.add_patch(Rectangle(place, width, 0.72, facecolor=EMPTY, edgecolor=GREY, linewidth=frame))
            fill = Rectangle(place, width * share, 0.72, facecolor=ORANGE if shared else SKY, edgecolor="white")
            fill.set(hatch="//" if shared else "", linewidth=0)
            axes.add_patch(fill)
            if columns <= NUMBERED_COLUMNS:
                text = f"{block} (×{holders[block]})" if shared else f"{block}"
                box = {"facecolor": "white", "alpha": 0.8, "pad": 1, "linewidth": 0}
                axes.text(column + 0.5, row, text, ha="center", va="center", fontsize=9, bbox=box)
    axes.set_yticks(range(len(tables)), list(tables))
    axes.set(xlim=(0, columns), ylim=(len(tables) - 0.5, -0.5), xlabel=f"block of the sequence ({block_size} tokens)")
    ticks = range(0, columns, 1 if columns <= NUMBERED_COLUMNS else -(-columns // NUMBERED_COLUMNS // 10) * 10)
    axes.set_xticks([column + 0.5 for column in ticks], [str(column) for column in ticks])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _legend(alone: str = "held by one sequence") -> list[Patch]:
    return [
        Patch(facecolor=ORANGE, hatch="//", edgecolor="white", label="shared (by how many)"),
        Patch(facecolor=SKY, label=alone),
    ]


def plot_blocks_over_steps(moments: Sequence[Sharing], *, title: str = "") -> Figure:
    """Blocks held at each step and blocks that would be needed without sharing; between the two is what is saved."""
    figure, axes = plt.subplots(figsize=(8.5, 3.6), layout="constrained")
    steps = range(len(moments))
    _draw_saving(axes, steps, moments)
    axes.set(xlabel="step", ylabel="blocks", title=title)
    axes.legend(frameon=False, loc="upper left")
    return figure


def _draw_saving(axes: Axes, x: Sequence[int], moments: Sequence[Sharing]) -> None:
    held, needed = zip(*moments, moments[-1], strict=True)  # the last one is drawn as wide as the others
    x = [*x, x[-1] + 1]
    axes.plot(x, needed, "--", drawstyle="steps-post", color=GREY, linewidth=2, label="without sharing")
    axes.plot(x, held, "-", drawstyle="steps-post", color=BLUE, linewidth=2, label="with sharing")
    axes.fill_between(
        x, held, needed, step="post", facecolor=EMPTY, hatch="..", edgecolor=GREY, linewidth=0, label="saved"
    )
    axes.set_ylim(0, 1.08 * max(needed))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def plot_saved_share(
    total: int, block_size: int, measured: Mapping[int, Mapping[int, float]], *, title: str = ""
) -> Figure:
    """Share of blocks saved against the prompt's share of a text: the formula as lines, measurements as marks.

    Dotted is what the formula tends to for small blocks, (n - 1) / n times the prompt's share.

    Args:
        total: stored tokens of prompt and answer.
        measured: for each number of answers, prompt tokens → share saved.
    """
    figure, axes = plt.subplots(figsize=(8.5, 4), layout="constrained")
    prompts = range(1, total)
    for number, (n, points) in enumerate(measured.items()):
        colour, style = COLOURS[number % len(COLOURS)], LINE_STYLES[number % len(LINE_STYLES)]
        formula = [sharing_of_samples(prompt, total - prompt, n, block_size).saved for prompt in prompts]
        axes.plot([prompt / total for prompt in prompts], formula, style, color=colour, label=f"n = {n}, formula")
        axes.plot([0, 1], [0, (n - 1) / n], ":", color=colour, linewidth=1)
        x, y = [prompt / total for prompt in points], list(points.values())
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(x, y, marker, color=colour, markersize=9, markeredgecolor="white", label=f"n = {n}, measured")
    axes.set(xlabel="prompt's share of all tokens", ylabel="blocks saved", title=title, xlim=(0, 1), ylim=(0, 1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    approximation = Line2D([], [], linestyle=":", color=GREY, linewidth=1, label="approximation")
    axes.legend(handles=[*axes.get_legend_handles_labels()[0], approximation], frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_beams(steps: Sequence[RecordedStep], tokenizer: PreTrainedTokenizerBase, *, title: str = "") -> Figure:
    """Which beam goes on from which: a column a call of the model, the best beam on top.

    Thick lines lead to the beams of the last call, thin dashed ones to beams that died on the way.
    """
    alive = [set(range(len(steps[-1].tables)))]
    for step in reversed(steps[1:]):
        alive.append({step.parents[row] for row in alive[-1]})
    alive.reverse()
    figure, axes = plt.subplots(figsize=(10.5, 0.55 * len(steps[-1].tables) + 1.3), layout="constrained")
    for column, (step, living) in enumerate(zip(steps, alive, strict=True)):
        names = token_names(tokenizer, step.tokens) if column else ["prompt"]
        for row, name in enumerate(names):
            lives = row in living
            if column:
                colour, style, width = (BLUE, "-", 2.5) if lives else (GREY, "--", 1)
                axes.plot(
                    [column - 1, column], [step.parents[row], row], style, color=colour, linewidth=width, zorder=1
                )
            box = {"boxstyle": "round,pad=0.2", "facecolor": "#d9ecf7" if lives else "white"}
            box["edgecolor"] = BLUE if lives else GREY
            colour = "black" if lives else "#666666"
            axes.text(column, row, name, ha="center", va="center", fontsize=8, color=colour, bbox=box, zorder=2)
    axes.set_yticks(range(len(steps[-1].tables)), [f"beam {row + 1}" for row in range(len(steps[-1].tables))])
    axes.set_xticks(range(len(steps)), ["", *range(1, len(steps))])
    axes.set(xlim=(-0.5, len(steps) - 0.4), xlabel="token of the answer", title=title)
    axes.set_ylim(len(steps[-1].tables) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def plot_prefix_tree(chains: Mapping[str, Sequence[bytes]], *, title: str = "") -> Figure:
    """Texts as a tree of their full blocks: a node is a block with everything before it, shared while texts are equal.

    Args:
        chains: each text's `block_chain`; texts that begin alike stand next to each other.
    """
    rows: dict[bytes, list[int]] = {}
    columns: dict[bytes, int] = {}
    for row, chain in enumerate(chains.values()):
        for column, content in enumerate(chain):
            rows.setdefault(content, []).append(row)
            columns[content] = column
    height = {content: sum(those) / len(those) for content, those in rows.items()}
    figure, axes = plt.subplots(figsize=(10, 0.5 * len(chains) + 1.2), layout="constrained")
    for row, (name, chain) in enumerate(chains.items()):
        ends = [*((columns[content], height[content]) for content in chain), (len(chain) - 0.45, row)]
        axes.plot(*zip(*ends, strict=True), color=GREY, linewidth=1.2, zorder=1)
        axes.text(len(chain) - 0.4, row, name, va="center", fontsize=9)
    for content, those in rows.items():
        shared = len(those) > 1
        place = (columns[content] - 0.32, height[content] - 0.3)
        node = Rectangle(place, 0.64, 0.6, facecolor=ORANGE if shared else SKY, edgecolor="white", zorder=2)
        node.set_hatch("//" if shared else "")
        axes.add_patch(node)
        box = {"facecolor": "white", "alpha": 0.8, "pad": 1, "linewidth": 0}
        if shared:
            axes.text(
                columns[content], height[content], f"×{len(those)}", ha="center", va="center", fontsize=9, bbox=box
            )
    longest = max(map(len, chains.values()))
    axes.set(xlim=(-0.6, 1.35 * longest + 0.5), ylim=(len(chains) - 0.4, -0.6), xlabel="full block of the text")
    axes.set_xticks(range(longest))
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    needed = sum(map(len, chains.values()))
    figure.suptitle(title or f"{needed} full blocks, {len(rows)} different ones")
    figure.legend(handles=_legend("in one text only"), loc="outside lower center", ncols=2, frameon=False)
    return figure


def plot_sharing(prompt: int = 100, answer: int = 60, n: int = 4, block_size: int = 16, *, title: str = "") -> Figure:
    """`n` answers to one prompt: their tables, really forked, and blocks with and without sharing, by formula.

    Args:
        prompt: tokens.
        answer: tokens that each answer has stored.

    Raises:
        InvalidRequestError: for sizes that cannot be.
    """
    tables = {
        f"answer {row}": TableState.of(table) for row, table in enumerate(fork_samples(prompt, answer, n, block_size))
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(1.6, 1), layout="constrained")
    columns = len(tables["answer 0"].blocks)
    _draw_tables(left, tables, block_size, columns)
    moments = [sharing_of_samples(prompt, written, n, block_size) for written in range(answer + 1)]
    _draw_saving(right, range(answer + 1), moments)
    right.set(xlabel="tokens of each answer", ylabel="blocks")
    end = moments[-1]
    left.set_title("the tables", fontsize=11)
    right.set_title(f"{end.held} blocks instead of {end.needed}", fontsize=11)
    curves, labels = right.get_legend_handles_labels()
    marks = _legend()
    names = [*(str(mark.get_label()) for mark in marks), *labels]
    figure.legend([*marks, *curves], names, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(title or f"{n} × ({prompt} + {answer}) tokens in blocks of {block_size}: {end.saved:.1%} saved")
    return figure


def explore_sharing(prompt: int = 100, answer: int = 60, n: int = 4, block_size: int = 16) -> Explorer:
    """`plot_sharing` with a control for each of its arguments; needs a running kernel to move."""
    controls = (
        slider("prompt tokens", prompt, 1, 256),
        slider("answer tokens", answer, 0, 256),
        slider("answers (n)", n, 1, 8),
        number_slider("block size (tokens)", EXPLORED_BLOCK_SIZES, block_size),
    )
    return Explorer(controls, plot_sharing)
