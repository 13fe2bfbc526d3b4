"""Attention made visible: stores that record and silence heads, scores that find them, figures, and the explorer."""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minillm.errors import InvalidRequestError
from minillm.llm import LLM
from minillm.transformer.attention import dot_product_attention
from minillm.transformer.decoder import Decoder
from minillm.transformer.kv import AttentionSpec, KVStore, NoCache, PaddedBatch, pad_right
from minillm.viz.explorer import Explorer, reader_of, slider, text_field
from minillm.viz.style import BLUE, COLOURS, GREY, LINE_STYLES, ORANGE, RED, SKY, arrow, ink, ink_on

WEIGHTS = LinearSegmentedColormap.from_list("weights", ["white", SKY, BLUE, "#002b45"])
"""From no weight to all of it."""
CHANGES = LinearSegmentedColormap.from_list("changes", [RED, "white", BLUE])
MOST_NAMED = 48
"""With more tokens than this, a map's axes show numbers instead of every token."""


class RecordingStore:
    """The store that keeps nothing of the text, but keeps what every head did: weights, values, outputs.

    Attention is a weighted mean of the values, so values that are one-hot vectors come back as the weights
    themselves. The inner store is asked once more with these, as many at a time as fit into a head, and so the weights
    have passed through the same mask, scale and softmax as the model's own.

    Attributes:
        weights, values, outputs: a tensor for each layer that has attended; heads before tokens.
    """

    remembers = False

    def __init__(self, specs: Sequence[AttentionSpec]) -> None:
        self.inner = NoCache(specs)
        self.weights: dict[int, Float[Tensor, "batch heads queries keys"]] = {}
        self.values: dict[int, Float[Tensor, "batch kv_heads keys head_dim"]] = {}
        self.outputs: dict[int, Float[Tensor, "batch heads queries head_dim"]] = {}

    def begin(self, batch: PaddedBatch) -> None:
        self.inner.begin(batch)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "batch seq heads head_dim"],
        k: Float[Tensor, "batch seq kv_heads head_dim"],
        v: Float[Tensor, "batch seq kv_heads head_dim"],
    ) -> Float[Tensor, "batch seq heads head_dim"]:
        seq, head_dim = v.shape[1], v.shape[-1]
        one_hot = F.pad(torch.eye(seq, dtype=v.dtype, device=v.device), (0, -seq % head_dim))
        pieces = [piece[None, :, None].expand_as(v) for piece in one_hot.split(head_dim, dim=-1)]
        weights = torch.cat([self.inner.attend(layer, q, k, piece) for piece in pieces], dim=-1)[..., :seq]
        out = self.inner.attend(layer, q, k, v)
        self.weights[layer], self.values[layer], self.outputs[layer] = (x.transpose(1, 2) for x in (weights, v, out))
        return out


class SilencingStore:
    """Any other store, with some heads' outputs set to zero: what would the model do without them?

    Args:
        heads: (layer, head) of each head to silence.
    """

    def __init__(self, inner: KVStore, heads: Collection[tuple[int, int]]) -> None:
        self.inner = inner
        self.heads = heads
        self.remembers = inner.remembers

    def begin(self, batch: Any) -> None:
        self.inner.begin(batch)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "*tokens heads head_dim"],
        k: Float[Tensor, "*tokens kv_heads head_dim"],
        v: Float[Tensor, "*tokens kv_heads head_dim"],
    ) -> Float[Tensor, "*tokens heads head_dim"]:
        out = self.inner.attend(layer, q, k, v)
        silent = [head for at, head in self.heads if at == layer]
        return out.index_fill(-2, torch.tensor(silent, device=out.device), 0) if silent else out


def padded_rows(rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch seq"], PaddedBatch]:
    """Sequences as one batch, padded on the right."""
    batch = PaddedBatch((0,) * len(rows), tuple(map(len, rows)))
    return pad_right(rows), batch


@torch.inference_mode()
def attention_maps(model: Decoder, tokens: Sequence[int]) -> Float[Tensor, "layers heads seq seq"]:
    """The weights of every head while the model reads one text: row i is what token i looks at."""
    store = RecordingStore(model.config.attention_specs)
    rows, batch = padded_rows([tokens])
    store.begin(batch)
    model.hidden(rows.to(model.device), batch.positions(model.device), store)
    return torch.cat([store.weights[layer] for layer in range(model.config.num_layers)])


@torch.inference_mode()
def next_token_probabilities(
    model: Decoder, rows: Sequence[Sequence[int]], silenced: Collection[tuple[int, int]] = ()
) -> Float[Tensor, "batch vocab"]:
    """What the model expects after each text, with some heads' outputs set to zero."""
    tokens, batch = padded_rows(rows)
    store = SilencingStore(NoCache(model.config.attention_specs), silenced)
    store.begin(batch)
    hidden = model.hidden(tokens.to(model.device), batch.positions(model.device), store)
    last = torch.tensor(batch.lengths, device=model.device) - 1
    return model.logits(hidden[torch.arange(len(rows), device=model.device), last]).softmax(dim=-1)


def token_names(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """Each token as a label: ␣ for the space before a word, ↵ for a new line."""
    names = [str(tokenizer.decode([token])) for token in tokens]
    return [name.replace(" ", "␣").replace("\n", "↵").replace("$", r"\$") for name in names]


def plot_lookup(
    query: Float[Tensor, "2"],
    keys: Float[Tensor, "keys 2"],
    values: Float[Tensor, "keys 2"],
    names: Sequence[str],
    *,
    title: str = "",
) -> Figure:
    """One query's soft look-up in the plane: keys by their direction, weights as bars, the mean of the values.

    The weights are `dot_product_attention`'s, unscaled as the vectors are drawn.
    """
    q, k, v = query[None, None, None], keys[None, None], values[None, None]
    weights = (query @ keys.T).softmax(dim=-1)
    result = dot_product_attention(q, k, v, scale=1.0)[0, 0, 0]
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(10, 3.7), width_ratios=(1, 0.85, 1), layout="constrained"
    )
    limit = 1.25 * max(float(x.abs().max()) for x in (query, keys, values))
    for panel, vectors, heading in ((left, keys, "query and keys"), (right, values, "values and their mean")):
        for name, vector, colour in zip(names, vectors.tolist(), COLOURS, strict=False):
            _named_arrow(panel, vector, colour, name)
        panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", title=heading)
        panel.set(xlabel="channel 0", ylabel="channel 1")
        panel.axhline(0, color=GREY, linewidth=0.6)
        panel.axvline(0, color=GREY, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    _named_arrow(left, query.tolist(), "black", "query", width=3, above=bool(query[1] > 0))
    _named_arrow(right, result.tolist(), "black", "output", width=3, above=bool(result[1] > 0))
    bars = middle.bar(list(names), weights.tolist(), color=COLOURS[: len(names)])
    middle.bar_label(bars, fmt="{:.2f}", padding=2)
    middle.set(ylim=(0, 1.1), xlabel="key", ylabel="weight", title="softmax of the products")
    middle.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure


def plot_scale(
    dims: Sequence[int],
    spreads: Mapping[str, Sequence[float]],
    largest: Mapping[str, Sequence[float]],
    *,
    title: str = "",
) -> Figure:
    """How far scores spread, and how much the largest weight of a softmax over them takes, against the head's width.

    Args:
        spreads: variance of the scores, one value a width, by label.
        largest: mean of the largest weight, by the same labels.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for panel, curves in ((left, spreads), (right, largest)):
        for number, (label, values) in enumerate(curves.items()):
            style = LINE_STYLES[number % len(LINE_STYLES)]
            panel.plot(dims, values, style, marker="o", color=COLOURS[number], label=label)
        panel.set_xscale("log", base=2)
        panel.set_xticks(dims, [str(dim) for dim in dims])
        panel.set_xlabel("channels of a head, d")
        panel.spines[["top", "right"]].set_visible(False)
    left.set_yscale("log", base=2)
    left.set(ylabel="variance of the scores", title="scores grow with d …")
    right.set(ylim=(0, 1.02), ylabel="largest weight (mean)", title="… and softmax saturates")
    left.legend(frameon=False)
    figure.suptitle(title)
    return figure


def plot_masks(masks: Mapping[str, Bool[Tensor, "queries keys"]], *, title: str = "") -> Figure:
    """Grids of who may see whom: a row is a query, a column a key, coloured where it may be seen."""
    figure, panels = plt.subplots(
        1, len(masks), figsize=(2.55 * len(masks) + 0.4, 3.3), squeeze=False, layout="constrained"
    )
    for number, (panel, (name, mask)) in enumerate(zip(panels[0], masks.items(), strict=True)):
        colours = LinearSegmentedColormap.from_list("mask", ["#ececec", COLOURS[number % len(COLOURS)]])
        _grid(panel, mask.int(), cmap=colours, vmin=0, vmax=1)
        panel.set(title=name, xlabel="key (position)")
        panel.set_xticks(range(mask.shape[1]))
        panel.set_yticks(range(mask.shape[0]))
        panel.tick_params(length=0, labelsize=8)
    panels[0, 0].set_ylabel("query (position)")
    figure.suptitle(title)
    return figure


def plot_groups(kinds: Mapping[str, tuple[int, int]], *, title: str = "") -> Figure:
    """Which query heads share which key/value head.

    Args:
        kinds: name → (query heads, key/value heads).
    """
    figure, panels = plt.subplots(1, len(kinds), figsize=(10, 2.6), squeeze=False, layout="constrained")
    for panel, (name, (heads, kv_heads)) in zip(panels[0], kinds.items(), strict=True):
        group = heads // kv_heads
        for head in range(heads):
            colour, kv_head = COLOURS[head // group % len(COLOURS)], head // group
            place = (kv_head + 0.5) * group - 0.5
            panel.plot([head, place], [0.77, 0.23], color=colour, linewidth=1.5, zorder=0)
            _head(panel, head, 1, f"q{head}", colour, filled=False)
            if head % group == 0:
                _head(panel, place, 0, f"k{kv_head}\nv{kv_head}", colour, filled=True)
        one = "" if kv_heads == 1 else "s"
        panel.set_title(f"{name}\n{heads} query heads, {kv_heads} KV head{one}", fontsize=10)
        panel.set(xlim=(-0.7, heads - 0.3), ylim=(-0.45, 1.35))
        panel.set_axis_off()
    figure.suptitle(title)
    return figure


def plot_heads(maps: Float[Tensor, "layers heads queries keys"], *, title: str = "") -> Figure:
    """Every head's weights as a small map: a row of maps a layer, a column a head; darker is more weight."""
    layers, heads = maps.shape[:2]
    figure, panels = plt.subplots(
        layers, heads, figsize=(1.45 * heads + 0.8, 1.45 * layers + 0.9), squeeze=False, layout="constrained"
    )
    for layer in range(layers):
        for head in range(heads):
            panel = panels[layer, head]
            # Colour stands for the square root of a weight: a tenth is seen beside a whole.
            image = panel.imshow(maps[layer, head].sqrt(), cmap=WEIGHTS, vmin=0, vmax=1, interpolation="antialiased")
            panel.set_xticks([])
            panel.set_yticks([])
            if layer == 0:
                panel.set_title(f"head {head}", fontsize=10)
        panels[layer, 0].set_ylabel(f"layer {layer}", fontsize=10)
    bar = figure.colorbar(image, ax=panels, shrink=0.5, label="attention weight")
    ticks = (0, 0.05, 0.2, 0.5, 1)
    bar.set_ticks([math.sqrt(tick) for tick in ticks], labels=[f"{tick:g}" for tick in ticks])
    figure.supxlabel("token that is looked at →", fontsize=10)
    figure.supylabel("← token that looks", fontsize=10)
    figure.suptitle(title)
    return figure


def plot_head(
    weights: Float[Tensor, "queries keys"], tokens: Sequence[str], *, distance: int | None = None, title: str = ""
) -> Figure:
    """One head's weights, tokens along both axes; the queries are the last tokens where there are more keys.

    Args:
        tokens: a name for each key.
        distance: a dotted line goes where a head would look that looks so far back.
    """
    queries, keys = weights.shape
    size = min(9.0, max(4.5, 0.21 * keys + 1.6))
    figure, axes = plt.subplots(figsize=(size + 0.8, max(2.2, size * queries / keys)), layout="constrained")
    first = keys - queries
    edges = (-0.5, keys - 0.5, keys - 0.5, first - 0.5)
    image = axes.imshow(weights, cmap=WEIGHTS, vmin=0, vmax=1, interpolation="none", extent=edges)
    if distance is not None:
        looking = [max(first, distance), keys - 1]
        looked_at = [position - distance for position in looking]
        axes.plot(
            looked_at, looking, ":", color=RED, label="1 token back" if distance == 1 else f"{distance} tokens back"
        )
        axes.legend(loc="upper right")
    if keys <= MOST_NAMED:
        axes.set_xticks(range(keys), tokens, rotation=90, fontsize=8)
        axes.set_yticks(range(first, keys), tokens[first:], fontsize=8)
    axes.set(xlabel="token that is looked at", ylabel="token that looks", title=title)
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.7)
    return figure


def plot_look_back(
    rows: Mapping[str, Float[Tensor, "keys"]], tokens: Sequence[str], *, marked: Collection[int] = (), title: str = ""
) -> Figure:
    """What one token looks at: the text in lines, each token shaded by its weight (as in `plot_heads`), one a label.

    Args:
        marked: tokens to frame.
    """
    places, lines = _lines(tokens)
    height = 0.26 * lines + 0.55
    figure, panels = plt.subplots(len(rows), 1, figsize=(10, height * len(rows) + 0.3), squeeze=False)
    for panel, (name, weights) in zip(panels[:, 0], rows.items(), strict=True):
        for number, (token, (line, column), weight) in enumerate(zip(tokens, places, weights.tolist(), strict=True)):
            ground = WEIGHTS(math.sqrt(weight))
            box = {"facecolor": ground, "edgecolor": RED if number in marked else "none"}
            panel.text(
                *(column, -line),
                token.lstrip("␣") or "␣",
                family="monospace",
                fontsize=8.5,
                va="center",
                color=ink_on(ground),
                bbox={**box, "boxstyle": "square,pad=0.12", "linewidth": 1.2},
            )
        panel.set(xlim=(-1, LINE_WIDTH), ylim=(-lines + 0.4, 0.7))
        panel.set_title(name, fontsize=10, loc="left")
        panel.set_axis_off()
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def plot_head_scores(
    tables: Mapping[str, Float[Tensor, "layers heads"]], *, percent: bool = True, title: str = ""
) -> Figure:
    """One number a head, as layers × heads; the largest of each table is framed.

    Args:
        percent: the numbers are shares of 1 from 0 on; otherwise they are changes, in points, of either sign.
    """
    columns = min(2, len(tables))
    rows = -(-len(tables) // columns)
    layers, heads = next(iter(tables.values())).shape
    size = (0.62 * heads + 1.2) * columns, (0.42 * layers + 1.0) * rows + 0.4
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for panel in panels.flat[len(tables) :]:
        panel.set_axis_off()
    for panel, (name, table) in zip(panels.flat, tables.items(), strict=False):
        most = 1.0 if percent else float(table.abs().max())
        if percent:
            _grid(panel, table.sqrt(), cmap=WEIGHTS, vmin=0, vmax=1)  # as in `plot_heads`
        else:
            _grid(panel, table, cmap=CHANGES, vmin=-most, vmax=most)
        for layer in range(layers):
            for head in range(heads):
                value = float(table[layer, head])
                ground = WEIGHTS(math.sqrt(value)) if percent else CHANGES(0.5 + value / most / 2)
                text = f"{100 * value:.0f}" if percent else f"{round(100 * value):+d}".replace("-", "−")
                panel.text(head, layer, text, ha="center", va="center", fontsize=8, color=ink_on(ground))
        layer, head = best_head(table if percent else table.abs())
        panel.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, color=ORANGE, linewidth=3))
        panel.set(title=name, xlabel="head", ylabel="layer")
        panel.set_xticks(range(heads))
        panel.set_yticks(range(layers))
        panel.tick_params(length=0)
    figure.suptitle(title)
    return figure


def best_head(table: Float[Tensor, "layers heads"]) -> tuple[int, int]:
    """(layer, head) of the largest number."""
    layer, head = divmod(int(table.argmax()), table.shape[1])
    return layer, head


def plot_cost(
    lengths: Sequence[int],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    ylabel: str,
    marks: Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    """Costs against the length of the text on logarithmic axes, one panel a label, one line a kind of cost.

    Args:
        marks: panel → a length where a vertical line is drawn.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.9), squeeze=False, layout="constrained")
    for panel, (name, curves) in zip(axes[0], panels.items(), strict=True):
        for number, (label, values) in enumerate(curves.items()):
            panel.plot(lengths, values, LINE_STYLES[number], color=COLOURS[number], linewidth=2, label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        if marks and name in marks:
            panel.axvline(marks[name], color=GREY, linestyle=":", label=f"equal at {marks[name]:,.0f} tokens")
        ticks = lengths if len(lengths) < 7 else lengths[:: -(-len(lengths) // 6)]
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        panel.set(xlabel="length of the text (tokens)", title=name)
        panel.legend(frameon=False, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(ylabel)
    figure.suptitle(title)
    return figure


def explore_attention(
    model: Decoder | LLM | str,
    text: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    layer: int = 0,
    head: int = 0,
) -> Explorer:
    """`plot_head` for a text of your own, with sliders for layer and head, above it the text: point at a token there,
    and all are shaded by how much it looks at them.

    Args:
        model: a decoder with its tokenizer, an LLM, or the name of a model ("tiny").

    Raises:
        InvalidRequestError: a decoder without a tokenizer, no such layer or head, or an empty text.
    """
    reader = reader_of(model, tokenizer)
    config = reader.model.config
    controls = (
        text_field("text", text),
        slider("layer", layer, 0, config.num_layers - 1),
        slider("head", head, 0, config.num_heads - 1),
    )

    @lru_cache(maxsize=1)
    def read(text: str) -> tuple[list[str], Float[Tensor, "layers heads seq seq"], int]:
        tokens = reader.tokenizer(text).input_ids
        if not tokens:
            raise InvalidRequestError("Write something to read.")
        shown = tokens[:MOST_NAMED]
        return token_names(reader.tokenizer, shown), attention_maps(reader.model, shown).float().cpu(), len(tokens)

    def draw(text: str, layer: int, head: int) -> Figure:
        names, maps, _ = read(text)
        return plot_head(maps[layer, head], names, title=f"layer {layer}, head {head}")

    def tell(text: str, layer: int, head: int) -> str:
        names, maps, count = read(text)
        cut = f" The first {MOST_NAMED} of {count} tokens are drawn." if count > MOST_NAMED else ""
        hint = (
            f"Layer {layer}, head {head}: point at a token to see where it looks; until then the last one looks.{cut}"
        )
        return hint + look_back_html(names, maps[layer, head])

    return Explorer(controls, draw, tell)


def look_back_html(tokens: Sequence[str], weights: Float[Tensor, "seq seq"]) -> str:
    """The text as HTML: the token that is pointed at looks, and each is shaded by its weight (as in `plot_heads`).

    Styles alone do it, so that it works where no kernel runs. The token's tooltip tells the largest weights in numbers.
    """
    roots = weights.sqrt().tolist()
    shades = [";".join(f"--k{key}:{shade:.2f}" for key, shade in enumerate(row)) for row in roots]
    name = "look-" + blake2b("".join([*tokens, *shades]).encode(), digest_size=8).hexdigest()
    spans = [_looking_token(number, tokens, row) for number, row in enumerate(weights)]
    rules = [f".{name}:has(.q{number}:hover){{{shade}}}" for number, shade in enumerate(shades)]
    nobody, last = f".{name}:not(:has(span:hover))", len(tokens) - 1
    looks = f"outline:2px solid {RED}"
    rules += [f"{nobody}{{{shades[last]}}}", f"{nobody} .q{last}{{{looks}}}", f".{name} span:hover{{{looks}}}"]
    page = "background:white;color:black;padding:6px 10px;line-height:1.9;font-family:monospace"
    return f"<style>{''.join(rules)}</style><div class='{name}' style='{page}'>{''.join(spans)}</div>"


def _looking_token(number: int, tokens: Sequence[str], row: Float[Tensor, "seq"]) -> str:
    """One token of `look_back_html`; its own shade is a variable that the rules set."""
    names = [token.replace(r"\$", "$") for token in tokens]
    best = row.topk(min(3, number + 1)).indices.tolist()
    most = [f"{names[key]} {float(row[key]):.0%}" for key in best]
    tip = html.escape(f"{names[number]} looks at: {', '.join(most)}")
    style = f"background:rgb(86 180 233 / var(--k{number},0));padding:2px 1px"  # SKY: black is readable on all of it
    shown = f"<span class='q{number}' title='{tip}' style='{style}'>{html.escape(names[number])}</span>"
    return shown + ("<br>" if names[number].endswith("↵") else "<wbr>")


LINE_WIDTH = 122
"""Characters a line of `plot_look_back`."""


def _lines(tokens: Sequence[str]) -> tuple[list[tuple[int, float]], int]:
    """Line and column of each token when they are written one after the other; and how many lines there are."""
    line, column, places = 0, 0.0, []
    for number, token in enumerate(tokens):
        column += token.startswith("␣") and column > 0
        if column + len(token) > LINE_WIDTH:
            line, column = line + 1, 0.0
        places.append((line, column))
        column += len(token.lstrip("␣")) + 0.2
        if token.endswith("↵") and tokens[number + 1 : number + 2] != ["↵"]:
            line, column = line + 1, 0.0
    return places, line + (column > 0)


def _grid(axes: Axes, table: Tensor, **style: Any) -> None:
    """Cells with white lines between them."""
    axes.imshow(table, interpolation="none", **style)
    axes.set_xticks([x - 0.5 for x in range(1, table.shape[1])], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, table.shape[0])], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)


def _named_arrow(
    axes: Axes, vector: Sequence[float], colour: str, name: str, *, width: float = 2, above: bool = False
) -> None:
    """From the origin; its name stands beyond the tip, or above it."""
    x, y = vector
    arrow(axes, (0, 0), (x, y), colour, width=width)
    length = math.hypot(x, y) or 1.0
    dx, dy = (0.0, 1.0) if above else (x / length, y / length)
    sides = "left" if dx > 0.3 else "right" if dx < -0.3 else "center"
    heights = "bottom" if dy > 0.3 else "top" if dy < -0.3 else "center"
    offset = (5 * dx, 5 * dy)
    axes.annotate(
        name, (x, y), offset, textcoords="offset points", color=ink(colour), weight="bold", ha=sides, va=heights
    )


def _head(axes: Axes, x: float, y: float, name: str, colour: str, *, filled: bool) -> None:
    face = colour if filled else "white"
    axes.add_patch(
        FancyBboxPatch((x - 0.3, y - 0.17), 0.6, 0.34, boxstyle="round,pad=0.06", facecolor=face, edgecolor=colour)
    )
    axes.text(x, y, name, ha="center", va="center", fontsize=8, color=ink_on(face))
