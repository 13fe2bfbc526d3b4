"""Figures of decoder-only models: parameters by part, packed rows, a text coloured by its probabilities, and sampling
with its explorer."""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minillm.cache.contiguous import ContiguousCache
from minillm.errors import InvalidRequestError
from minillm.llm import LLM
from minillm.transformer.decoder import Decoder
from minillm.transformer.generation import generate
from minillm.transformer.sampling import Sampling
from minillm.viz.explorer import Explorer, reader_of, slider
from minillm.viz.style import BLUE, COLOURS, GREEN, GREY, LINE_STYLES, ORANGE, arrow

LIGHT = "#c8c8c8"
SURPRISE = LinearSegmentedColormap.from_list("surprise", ("#ffffff", "#fbe3b0", ORANGE))
"""White where the model was sure, orange where it was surprised; black text is readable on all of it."""

MOST_BITS = 6.0
CHARACTERS_PER_LINE = 96
NEWLINE = "↵"
DRAWN_TOKENS = 40


def plot_what_stays(*, title: str = "") -> Figure:
    """The encoder/decoder of 2017 beside the decoder-only model; what goes is grey, what stays is coloured."""
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    attention, cross, feed = "self-attention", "cross-attention", "feed-forward"
    colours = {attention: BLUE, cross: LIGHT, feed: GREEN}
    stacks = (
        (0.0, "encoder", "source text", (attention, feed), False),
        (2.6, "decoder", "target text", (attention, cross, feed), True),
        (6.2, "decoder-only model", "one text", (attention, feed), True),
    )
    for x, name, below, sublayers, stays in stacks:
        top = 0.95 + 0.85 * len(sublayers)
        outline = Rectangle((x - 0.15, 0.65), 2.1, top - 0.65 + 0.1, fill=False, edgecolor=GREY, linewidth=1.2)
        outline.set_linestyle("-" if stays else "--")
        axes.add_patch(outline)
        axes.text(x + 0.9, top + 0.25, f"{name}, N times", ha="center", color="black" if stays else GREY, weight="bold")
        axes.text(x + 0.9, 0.1, below, ha="center", color="black" if stays else GREY)
        arrow(axes, (x + 0.9, 0.32), (x + 0.9, 0.65))
        for number, sublayer in enumerate(sublayers):
            y = 0.85 + 0.85 * number
            colour = colours[sublayer] if stays else LIGHT
            axes.add_patch(Rectangle((x, y), 1.8, 0.6, facecolor=colour, alpha=0.45, edgecolor=GREY))
            causal = "causal " if stays and sublayer == attention else ""
            goes = not stays or sublayer == cross
            axes.text(
                x + 0.9, y + 0.3, causal + sublayer, ha="center", va="center", color="#444444" if goes else "black"
            )
        if stays:
            axes.text(x + 0.9, top + 1.05, "next token", ha="center")
            arrow(axes, (x + 0.9, top + 0.55), (x + 0.9, top + 0.98))
    arrow(axes, (1.95, 2.0), (2.6, 2.0))
    axes.text(5.25, 2.0, "→", fontsize=28, ha="center", va="center")
    axes.set(xlim=(-0.3, 8.4), ylim=(-0.1, 4.9), title=title)
    axes.set_axis_off()
    return figure


def plot_parameter_parts(models: Mapping[str, Mapping[str, int]], *, title: str = "") -> Figure:
    """One bar a model, cut into its parts by their share of the parameters; the total stands behind the name."""
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(models) + 1.5), layout="constrained")
    names = list(dict.fromkeys(part for parts in models.values() for part in parts))
    colours = dict(zip(names, COLOURS, strict=False))
    for row, parts in enumerate(models.values()):
        total, left = sum(parts.values()), 0.0
        for part, count in parts.items():
            share = 100 * count / total
            axes.barh(row, share, left=left, color=colours[part], alpha=0.6, edgecolor="white", height=0.7)
            if share >= 5:
                axes.text(left + share / 2, row, f"{share:.0f}%", ha="center", va="center", fontsize=9)
            left += share
    labels = [f"{name}: {sum(parts.values()) / 1e6:,.1f} M" for name, parts in models.items()]
    axes.set_yticks(range(len(models)), labels)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="share of all parameters (%)", title=title)
    handles = [Patch(color=colours[name], alpha=0.6, label=name.replace("_", " ")) for name in names]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_packed_rows(weight: Float[Tensor, "rows columns"], parts: Mapping[str, int], *, title: str = "") -> Figure:
    """A packed matrix as a heat map, with the published matrix that fills each stretch of its rows.

    Args:
        parts: published name → how many rows it fills, from the top.
    """
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    largest = float(weight.detach().abs().quantile(0.99))
    image = axes.imshow(weight.detach(), cmap="PuOr", vmin=-largest, vmax=largest, aspect="auto", interpolation="none")
    first, middles = 0, []
    for count in parts.values():
        if first:
            axes.axhline(first - 0.5, color="black", linewidth=1.5)
        middles.append(first + count / 2 - 0.5)
        first += count
    starts = [sum(list(parts.values())[:number]) for number in range(len(parts))]
    labels = [
        f"{name}\nrows {start}–{start + count - 1}" for (name, count), start in zip(parts.items(), starts, strict=True)
    ]
    axes.set_yticks(middles, labels)
    axes.set(xlabel="column (channel of the input)", title=title)
    figure.colorbar(image, ax=axes, label="weight")
    return figure


def plot_surprise(
    pieces: Sequence[str], probabilities: Sequence[float] | Float[Tensor, "tokens"], *, title: str = ""
) -> Figure:
    """A text, each token on a ground that says how much it surprised the model: −log₂ of its probability, in bits.

    Args:
        pieces: the tokens as text.
        probabilities: what the model gave to each before it saw it; nan where it was not asked.
    """
    bits = -torch.as_tensor(probabilities, dtype=torch.float64).log2()
    rows = _lay_out(pieces)
    lines = 1 + max(row for row, _, _ in rows)
    figure, axes = plt.subplots(figsize=(10, 0.27 * lines + 1.3), layout="constrained")
    for piece, (row, column, shown), surprise in zip(pieces, rows, bits.tolist(), strict=True):
        known = surprise == surprise
        ground = SURPRISE(min(surprise / MOST_BITS, 1.0)) if known else "#e6e6e6"
        axes.add_patch(Rectangle((column, row - 0.45), len(shown), 0.9, facecolor=ground, edgecolor=LIGHT, lw=0.3))
        colour = "#333333" if "\n" in piece else "black"
        for offset, letter in enumerate(shown):
            axes.text(
                column + offset + 0.5,
                row,
                letter,
                ha="center",
                va="center",
                family="monospace",
                fontsize=11,
                color=colour,
            )
    axes.set(xlim=(0, CHARACTERS_PER_LINE), ylim=(lines - 0.4, -0.6), title=title)
    axes.set_axis_off()
    scale = ScalarMappable(Normalize(0, MOST_BITS), SURPRISE)
    bar = figure.colorbar(scale, ax=axes, orientation="horizontal", shrink=0.5, aspect=40, pad=0.02, extend="max")
    bar.set_label("surprise (bits): 0 = certain, 1 = probability 1/2, 2 = 1/4, …")
    return figure


def _lay_out(pieces: Sequence[str]) -> list[tuple[int, int, str]]:
    """(line, column, what is shown) of each token: words stay whole, lines break where the text does."""
    places: list[tuple[int, int, str]] = []
    row = column = 0
    for number, piece in enumerate(pieces):
        shown = piece.replace("\n", NEWLINE)
        word = len(shown)
        for following in pieces[number + 1 :]:  # the rest of the word that begins here
            if not following[:1].isalnum():
                break
            word += len(following)
        starts_word = not piece[:1].isalnum()
        if column and column + (word if starts_word else len(shown)) > CHARACTERS_PER_LINE:
            row, column = row + 1, 0
        places.append((row, column, shown))
        column += len(shown)
        if "\n" in piece and not (number + 1 < len(pieces) and "\n" in pieces[number + 1]):
            row, column = row + 1, 0
    return places


def distribution(logits: Float[Tensor, "*batch vocab"], sampling: Sampling) -> Float[Tensor, "*batch vocab"]:
    """The probabilities that `Sampling.choose` draws from; at temperature 0 all on the likeliest token."""
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
    return sampling.transform(logits).softmax(dim=-1)


def entropy_bits(probabilities: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """−Σ p·log₂ p: how many bits a draw is worth; 0 where one token has all, log₂ n where n have equal shares."""
    return -torch.special.xlogy(probabilities, probabilities).sum(dim=-1) / torch.log(torch.tensor(2.0))


def describe(sampling: Sampling) -> str:
    """A sampling's settings as a short line, those that do nothing left out."""
    said = ["greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"]
    said += [f"top-k {sampling.top_k}"] if sampling.top_k else []
    said += [f"top-p {sampling.top_p:g}"] if sampling.top_p < 1 else []
    said += [f"min-p {sampling.min_p:g}"] if sampling.min_p else []
    return ", ".join(said)


def plot_sampling(
    logits: Float[Tensor, "vocab"],
    tokenizer: PreTrainedTokenizerBase,
    *samplings: Sampling,
    count: int = 16,
    title: str = "",
) -> Figure:
    """The distribution of the next token as the model gives it and as each sampling draws from it, a panel each.

    Wide grey bars are the model's own probabilities, narrow coloured ones those after the sampling's transforms; the
    names of tokens that were cut are grey. The last row is all tokens that have no row of their own.
    """
    logits = logits.detach().float()
    own = logits.softmax(dim=-1)
    order = own.argsort(descending=True, stable=True)[:count]
    names = [_name(tokenizer, token) for token in order.tolist()]
    names += [f"the {len(own) - count:,} others"]
    width = max(7.0, 3.0 + 3.1 * len(samplings))
    figure, panels = plt.subplots(
        1, len(samplings), figsize=(width, 0.25 * count + 1.9), sharex=True, squeeze=False, layout="constrained"
    )
    longest = 0.0
    for number, (panel, sampling) in enumerate(zip(panels[0], samplings, strict=True)):
        drawn = distribution(logits, sampling)
        before, after = (torch.cat((p[order], p.sum()[None] - p[order].sum())).clamp(min=0) for p in (own, drawn))
        kept = [bool(p > 0) for p in drawn[order]] + [bool((drawn > 0).sum() > (drawn[order] > 0).sum())]
        rows = range(count + 1)
        panel.barh(rows, 100 * before, height=0.85, color=LIGHT, label="the model's own")
        panel.barh(rows, 100 * after, height=0.45, color=COLOURS[number % len(COLOURS)], label="drawn from")
        for row, (p, is_kept) in enumerate(zip(torch.maximum(before, after).tolist(), kept, strict=True)):
            said = f"{after[row]:.1%}" if is_kept else "cut"
            panel.text(100 * p, row, f" {said}", va="center", fontsize=8, color="black" if is_kept else GREY)
        panel.set_yticks(rows, names if number == 0 else [""] * len(names))
        for label, is_kept in zip(panel.get_yticklabels(), kept, strict=True):
            label.set_color("black" if is_kept or len(samplings) > 1 else GREY)
        panel.invert_yaxis()
        bits = float(entropy_bits(drawn)) + 0.0  # no -0.0
        told = f"{int((drawn > 0).sum()):,} of {len(own):,} tokens kept\nentropy {bits:.2f} bits"
        panel.set_title(f"{describe(sampling)}\n{told}", fontsize=10)
        panel.set_xlabel("probability (%)")
        panel.spines[["top", "right"]].set_visible(False)
        longest = max(longest, float(before.max()), float(after.max()))
    panels[0, 0].set_xlim(0, 100 * longest * 1.25)
    figure.legend(
        handles=[Patch(color=LIGHT, label="the model's own"), Patch(color=BLUE, label="drawn from (coloured)")],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    figure.suptitle(title)
    return figure


def plot_against_temperature(
    temperatures: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    *,
    ylabel: str,
    limit: tuple[str, float] | None = None,
    title: str = "",
) -> Figure:
    """One line a label against the temperature.

    Args:
        limit: (name, value) of a horizontal line.
    """
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    marker = "o" if len(temperatures) < 12 else ""
    for number, (label, values) in enumerate(curves.items()):
        style, colour = LINE_STYLES[number % len(LINE_STYLES)], COLOURS[number % len(COLOURS)]
        axes.plot(temperatures, values, style, color=colour, linewidth=2, marker=marker, label=label)
    if limit is not None:
        axes.axhline(limit[1], color=GREY, linestyle=":", label=limit[0])
    axes.axvline(1, color=GREY, linewidth=0.8, alpha=0.6)
    axes.set(xlabel="temperature (1 = the model's own distribution)", ylabel=ylabel, title=title)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def explore_sampling(
    model: Decoder | LLM | str,
    prompt: str,
    sampling: Sampling | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_ids: Collection[int] | None = None,
    max_tokens: int = DRAWN_TOKENS,
) -> Explorer:
    """`plot_sampling` with sliders for temperature (0 is greedy), top-k, top-p, min-p and seed; above it
    a continuation drawn with them.

    Args:
        model: a decoder with its tokenizer, an LLM, or the name of a model ("tiny").
        stop_ids: tokens that end the continuation; the model's own when None.

    Raises:
        InvalidRequestError: a decoder without a tokenizer, or an empty prompt.
    """
    reader = reader_of(model, tokenizer)
    decoder, tokenizer = reader.model, reader.tokenizer
    ends = reader.stop_ids if stop_ids is None else stop_ids
    tokens = tokenizer(prompt).input_ids
    if not tokens:
        raise InvalidRequestError("the prompt has no tokens: write something that the model can go on from")
    with torch.inference_mode():
        logits = decoder(torch.tensor([tokens], device=decoder.device))[0, -1].cpu()
    start = sampling or Sampling(seed=0)
    controls = (
        slider("temperature", start.temperature, 0, 3, 0.1),
        slider("top-k (0: all)", start.top_k, 0, 50),
        slider("top-p (1: all)", start.top_p, 0.05, 1, 0.05),
        slider("min-p (0: all)", start.min_p, 0, 1, 0.01),
        slider("seed of the draw", start.seed or 0, 0, 20),
    )

    def tell(*chosen: Any) -> str:
        cache = ContiguousCache.for_decoder(decoder, max_len=len(tokens) + max_tokens)
        steps = generate(decoder, [tokens], cache, max_tokens=max_tokens, sampling=Sampling(*chosen), stop_ids=ends)
        written = str(tokenizer.decode([token for step in steps for token in step if token is not None]))
        before, after = (html.escape(part).replace("\n", "<br>") for part in (prompt, written))
        return f"<span style='opacity:0.75'>{before}</span><b>{after}</b>"

    return Explorer(controls, lambda *chosen: plot_sampling(logits, tokenizer, Sampling(*chosen)), tell)


def _name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as a label; a dollar sign would begin a formula."""
    return repr(tokenizer.decode([token])).replace("$", r"\$")
