"""Figures of pieces and embeddings: texts cut into tokens, merges at work, lookups, and tables of vectors as maps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import regex
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox
from torch import Tensor

from minillm.tokenizers.bpe import GPT2_PATTERN, cut, encode_word, letter_bytes, to_letters
from minillm.viz.explorer import Explorer, slider, text_field
from minillm.viz.style import COLOURS, GREY, MARKERS

TINTS = ("#cfe3f1", "#fbe7bf", "#c9e9df", "#f4d9e6")
"""Backgrounds of pieces that follow each other: light, so that black text is read on each."""

SPACE, NEWLINE = "␣", "↵"
MONOSPACE = "DejaVu Sans Mono"
LABEL_PLACES = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))
LABEL_DISTANCES = (5, 11, 18, 26, 36, 48)


# Pieces.


def readable(piece: str) -> str:
    r"""A piece of a byte-level vocabulary as one reads it.

    Its letters are turned back into bytes and these into text; a space is ␣, the end of a line ↵, and bytes that are no
    whole character are written ``\xe4``, as Python does.
    """
    letters = letter_bytes()
    if any(letter not in letters for letter in piece):
        return piece
    text = bytes(letters[letter] for letter in piece).decode(errors="backslashreplace")
    return text.replace(" ", SPACE).replace("\n", NEWLINE)


def pieces_after(text: str, merges: Sequence[tuple[str, str]], count: int, pattern: str = GPT2_PATTERN) -> list[str]:
    """The pieces that a text has after the first `count` merges; after none, they are its bytes."""
    ranks = {pair: rank for rank, pair in enumerate(merges[:count])}
    words = (word for word, _ in cut(text, regex.compile(pattern)))
    return [piece for word in words for piece in encode_word(to_letters(word), ranks)]


def plot_pieces(
    rows: Mapping[str, Sequence[str]], *, special: Collection[str] = (), width: int = 84, title: str = ""
) -> Figure:
    """Texts cut into pieces, one coloured box a piece.

    Args:
        rows: what stands on the left, and the pieces as the vocabulary has them.
        special: pieces that are drawn dark.
        width: characters after which a row goes on in the next line.
    """
    boxes, starts, height = _place_pieces(rows, special, width)
    margin = max((len(label) for label in rows), default=0) + 1.5
    units = margin + max([60.0, *(box.x + box.width for box in boxes)])
    size = 10 * 72 / units / 0.64
    figure, axes = plt.subplots(figsize=(10, 0.025 * size * height + (0.4 if title else 0)), layout="constrained")
    text: dict[str, Any] = {"family": MONOSPACE, "fontsize": size, "ha": "center", "va": "center"}
    for box in boxes:
        corner = (box.x, box.line - 0.4)
        axes.add_patch(Rectangle(corner, box.width, 0.8, facecolor=box.colour, edgecolor="white"))
        colour = "white" if box.colour == GREY else "black"
        axes.text(box.x + box.width / 2, box.line, box.text, color=colour, **text)
    for label, line in zip(rows, starts, strict=True):
        axes.text(-1, line, label, fontsize=size, ha="right", va="center")
    axes.set(xlim=(-margin, units - margin), ylim=(height - 0.4, -0.6), title=title)
    axes.set_axis_off()
    return figure


def plot_merges(
    text: str, merges: Sequence[tuple[str, str]], counts: Sequence[int], *, title: str = "", pattern: str = GPT2_PATTERN
) -> Figure:
    """One text after several numbers of merges: the boxes grow from bytes to words."""
    rows = {}
    for count in counts:
        pieces = pieces_after(text, merges, count, pattern)
        rows[f"{count} merges: {len(pieces)} tokens"] = pieces
    return plot_pieces(rows, title=title)


def explore_merges(text: str, merges: Sequence[tuple[str, str]], count: int = 50) -> Explorer:
    """`plot_merges` of a text of one's own, with a slider for the number of merges; needs a running kernel to move."""
    box = text_field("text", text)
    merged = slider("merges", count, 0, len(merges))
    return Explorer((box, merged), lambda text, count: plot_merges(text, merges, [count]))


def plot_tokens_per_word(
    sizes: Sequence[int], curves: Mapping[str, Sequence[float]], *, title: str = "", label: str = "tokens per word"
) -> Figure:
    """How many tokens texts need, against the size of the vocabulary."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for number, (name, values) in enumerate(curves.items()):
        axes.plot(sizes, values, f"{MARKERS[number]}-", color=COLOURS[number], markersize=5, label=name)
    axes.axhline(1, color=GREY, linestyle=":", linewidth=1)
    axes.text(sizes[0], 0.93, "one token a word", va="top", color=GREY)
    axes.set(xlabel="size of the vocabulary (tokens)", ylabel=label, ylim=(0, None), title=title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


@cache
def _drawable() -> frozenset[int]:
    """The characters that the figures' font has."""
    return frozenset(font_manager.get_font(font_manager.findfont(MONOSPACE)).get_charmap())


def _drawn(piece: str) -> str:
    text = readable(piece)
    return text if all(ord(letter) in _drawable() for letter in text) else ascii(text)[1:-1]


class _Box(NamedTuple):
    """A piece in its place; x and width are counted in characters."""

    text: str
    x: float
    line: int
    width: float
    colour: str


def _place_pieces(
    rows: Mapping[str, Sequence[str]], special: Collection[str], width: int
) -> tuple[list[_Box], list[int], int]:
    """The boxes of all rows, the line in which each row begins, and how many lines there are."""
    boxes, starts, line = [], [], 0
    for pieces in rows.values():
        x = 0.0
        starts.append(line)
        for number, piece in enumerate(pieces):
            text = _drawn(piece)
            wide = len(text) + 0.6
            if x and x + wide > width:
                x, line = 0.0, line + 1
            boxes.append(_Box(text, x, line, wide, GREY if piece in special else TINTS[number % len(TINTS)]))
            x += wide
            if text.endswith(NEWLINE) and number + 1 < len(pieces):
                x, line = 0.0, line + 1
        line += 1
    return boxes, starts, line


# Embeddings.


def plot_one_hot(
    tokens: Int[Tensor, "seq"], table: Float[Tensor, "vocab hidden"], names: Sequence[str], *, title: str = ""
) -> Figure:
    """One-hot rows times the table gives the table's rows: three heat maps. `names` are the table's, row by row."""
    one_hot = F.one_hot(tokens, len(table)).to(table.dtype)
    text = [names[token] for token in tokens.tolist()]
    shapes = [(len(text), len(table)), tuple(table.shape), (len(text), table.shape[1])]
    figure, axes = plt.subplots(
        1, 3, figsize=(10, 3.6), width_ratios=[columns + 2 for _, columns in shapes], layout="constrained"
    )
    largest = float(table.abs().max())
    panels = (
        ("one-hot rows", one_hot, text, "token id", "Greys"),
        ("× table", table, list(names), "channel", "PuOr"),
        ("= embeddings", one_hot @ table, text, "channel", "PuOr"),
    )
    for panel, (name, values, labels, below, colours) in zip(axes, panels, strict=True):
        low = 0 if colours == "Greys" else -largest
        image = panel.imshow(values.detach(), cmap=colours, vmin=low, vmax=largest if low else 1)
        panel.set_yticks(range(len(labels)), labels)
        panel.set_xticks(range(values.shape[1]))
        panel.set(title=name, xlabel=below, ylabel="token")
        panel.set_xticks([x - 0.5 for x in range(1, values.shape[1])], minor=True)
        panel.set_yticks([y - 0.5 for y in range(1, len(labels))], minor=True)
        panel.grid(which="minor", color=GREY, linewidth=0.4)
        panel.tick_params(which="minor", length=0)
    figure.colorbar(image, ax=axes, label="value", shrink=0.8)
    figure.suptitle(title)
    return figure


def nearest(table: Float[Tensor, "vocab hidden"], token: int, count: int = 5) -> list[tuple[int, float]]:
    """The tokens whose rows have the largest cosine with the row of `token`, and these cosines; itself left out."""
    cosines = F.cosine_similarity(table, table[token], dim=-1)
    cosines[token] = -torch.inf
    best = cosines.topk(count)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def principal_plane(points: Float[Tensor, "tokens hidden"]) -> tuple[Float[Tensor, "tokens 2"], float]:
    """The points seen along the two directions in which they are spread most, and the share of the spread that is left.

    Principal components by the singular value decomposition of the centred points. A direction may point either way:
    here its largest entry is positive.
    """
    centred = points.float() - points.float().mean(dim=0)
    _, spread, directions = torch.linalg.svd(centred, full_matrices=False)
    plane = directions[:2]
    plane = plane * plane.gather(1, plane.abs().argmax(dim=1, keepdim=True)).sign()
    return centred @ plane.T, float((spread[:2] ** 2).sum() / (spread**2).sum())


def plot_word_maps(
    maps: Mapping[str, Float[Tensor, "tokens 2"]], words: Sequence[str], kinds: Sequence[str], *, title: str = ""
) -> Figure:
    """Maps of words side by side, a colour and a mark a kind; labels keep out of each other's way."""
    names = list(dict.fromkeys(kinds))
    figure, axes = plt.subplots(1, len(maps), figsize=(max(7.5, 5.6 * len(maps)), 5.8), squeeze=False)
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.13, top=0.86, wspace=0.03)
    axes[0, 0].set_ylabel("direction of the second largest spread")
    for panel, (name, points) in zip(axes[0], maps.items(), strict=True):
        for number, kind in enumerate(names):
            chosen = points[[found == kind for found in kinds]].detach()
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            panel.scatter(chosen[:, 0], chosen[:, 1], s=22, color=colour, marker=marker, label=kind)
        panel.set(title=name, xticks=[], yticks=[], xlabel="direction of the largest spread")
        panel.margins(0.09)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=len(names), frameon=False)
    figure.suptitle(title)
    figure.draw_without_rendering()
    for panel, points in zip(axes[0], maps.values(), strict=True):
        _label_points(panel, points.detach(), words)
    return figure


def _label_points(axes: Axes, points: Float[Tensor, "tokens 2"], words: Sequence[str]) -> None:
    """Each word beside its point, at the first place near it where no other label or point is."""
    pixels = axes.transData.transform(points.numpy())
    point = axes.figure.dpi / 72
    marks = [Bbox.from_bounds(x - 3 * point, y - 3 * point, 6 * point, 6 * point) for x, y in pixels]
    taken: list[Bbox] = []
    for number, word in enumerate(words):
        wide, high = (5 * len(word) + 1) * point, 8.5 * point
        best: tuple[float, float, float, Bbox] | None = None
        for distance in LABEL_DISTANCES:
            for across, up in LABEL_PLACES:
                x = pixels[number][0] + across * (distance * point + wide / 2)
                y = pixels[number][1] + up * (distance * point + high / 2)
                box = Bbox.from_bounds(x - wide / 2, y - high / 2, wide, high)
                others = [mark for at, mark in enumerate(marks) if at != number]
                covered = 10 * sum(map(box.overlaps, taken)) + sum(map(box.overlaps, others))
                covered += 100 * (not axes.bbox.contains(*box.p0) or not axes.bbox.contains(*box.p1))
                if best is None or covered < best[0]:
                    best = covered, x, y, box
            if best and best[0] == 0:
                break
        assert best is not None, "there are places to try"
        taken.append(best[3])
        x, y = axes.transData.inverted().transform(best[1:3]).tolist()
        mark: tuple[float, float] = (float(points[number, 0]), float(points[number, 1]))
        away = abs(best[2] - pixels[number][1]) > 12 * point or abs(best[1] - pixels[number][0]) > wide / 2 + 8 * point
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2} if away else None
        axes.annotate(word, mark, (x, y), fontsize=8, ha="center", va="center", arrowprops=line)
