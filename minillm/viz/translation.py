"""Figures of the encoder/decoder: its stack, its training, what it looks at, and how often it is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from minillm.training.schedules import Schedule
from minillm.viz.style import BLUE, COLOURS, GREEN, GREY, ORANGE, box

PINYIN = {
    **dict(zip("零一二三四五六七八九", "líng yī èr sān sì wǔ liù qī bā jiǔ".split(), strict=True)),
    **dict(zip("十百千万亿", "shí bǎi qiān wàn yì".split(), strict=True)),
}
VALUES = {
    **{digit: str(value) for value, digit in enumerate("零一二三四五六七八九")},
    **dict(zip("十百千万亿", ("10", "100", "1000", "10⁴", "10⁸"), strict=True)),
}


def gloss(character: str) -> str:
    """How a Chinese numeral is said, and what it is worth: figures need no Chinese font. Anything else stays."""
    return f"{PINYIN[character]} · {VALUES[character]}" if character in PINYIN else character


def plot_stack(num_layers: int = 6) -> Figure:
    """The encoder and the decoder as boxes, from the bottom up, and the one arrow between them."""
    figure, axes = plt.subplots(figsize=(8, 6))
    encoder = (("self-attention\n(sees every source token)", BLUE), ("feed-forward", ORANGE))
    decoder = (
        ("self-attention\n(sees earlier target tokens)", BLUE),
        ("cross-attention\n(sees the source)", GREEN),
        ("feed-forward", ORANGE),
    )
    for x, name, blocks in ((0.0, "encoder", encoder), (5.0, "decoder", decoder)):
        box(axes, (x, 0.0), (3.0, 0.7), "embedding · √d + positions", GREY)
        top = 1.1 * len(blocks)
        frame = FancyBboxPatch(
            (x - 0.25, 0.88), 3.5, top + 0.2, boxstyle="round,pad=0.08", facecolor="none", edgecolor=GREY
        )
        axes.add_patch(frame)
        axes.text(x + 1.5, top + 1.3, f"{name}: {num_layers} ×", ha="center", fontsize=11, fontweight="bold")
        for number, (text, colour) in enumerate(blocks):
            box(axes, (x, 1.1 + 1.1 * number), (3.0, 0.7), text, colour)
            axes.text(x + 3.05, 1.0 + 1.1 * number, "+ norm", fontsize=8, color="black", va="top", ha="right")
    axes.text(1.5, -0.35, "source tokens", ha="center", va="top")
    axes.text(6.5, -0.35, "target tokens, shifted right", ha="center", va="top")
    box(axes, (5.0, 5.2), (3.0, 0.7), "embedding table, transposed", GREY)
    axes.text(6.5, 6.15, "logits of the next target token", ha="center")
    arrow = {"arrowstyle": "->", "color": GREEN, "lw": 2, "connectionstyle": "arc3,rad=-0.15"}
    axes.annotate("", (4.9, 2.55), (2.7, 3.36), arrowprops=arrow)
    axes.text(3.1, 3.5, "keys and values,\ncomputed once", ha="left", color="black", fontsize=9)
    axes.set(xlim=(-0.6, 8.6), ylim=(-0.8, 6.5))
    axes.set_axis_off()
    figure.tight_layout()
    return figure


def plot_schedules(schedules: Mapping[str, Schedule], steps: int) -> Figure:
    """The learning rate of each step, as a share of the highest."""
    figure, axes = plt.subplots(figsize=(7, 2.8))
    for (name, schedule), colour in zip(schedules.items(), COLOURS, strict=False):
        axes.plot([schedule(step) for step in range(steps)], label=name, color=colour)
    axes.set(xlabel="step", ylabel="share of the highest rate", title="Learning rates rise, then fall")
    return _finish(figure, axes)


def plot_losses(losses: Mapping[str, Sequence[float]], *, smooth: int = 10, title: str = "") -> Figure:
    """Loss against step, on a logarithmic axis; each curve is the mean of `smooth` steps."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for (name, values), colour in zip(losses.items(), COLOURS, strict=False):
        means = [sum(values[at : at + smooth]) / smooth for at in range(0, len(values) - smooth + 1, smooth)]
        axes.plot([smooth * (index + 0.5) for index in range(len(means))], means, label=name, color=colour)
    axes.set(xlabel="step", ylabel="loss (nats a target token)", title=title, yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return _finish(figure, axes)


def plot_signal(sizes: Mapping[str, Sequence[float]]) -> Figure:
    """How large a random network's activations are after each block."""
    figure, axes = plt.subplots(figsize=(7, 3))
    for (name, values), colour in zip(sizes.items(), COLOURS, strict=False):
        axes.plot(range(len(values)), values, marker=".", label=name, color=colour)
    axes.set(xlabel="after this many blocks", ylabel="standard deviation", yscale="log")
    axes.set_title("What enters the next block")
    return _finish(figure, axes)


def plot_alignment(
    weights: Float[Tensor, "target source"], source: Sequence[str], target: Sequence[str], *, title: str = ""
) -> Figure:
    """Which source tokens each target token looks at: dark is much."""
    figure, axes = plt.subplots(figsize=(0.42 * len(source) + 2, 0.32 * len(target) + 1.6))
    image = axes.imshow(weights.float().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(source)), source, rotation=60, ha="right")
    axes.set_yticks(range(len(target)), target)
    axes.set(xlabel="source token", ylabel="target token being written", title=title)
    figure.colorbar(image, ax=axes, label="attention weight", fraction=0.04)
    figure.tight_layout()
    return figure


def plot_exact_match(by_digits: Mapping[str, Mapping[int, float]]) -> Figure:
    """Share of numbers translated without a mistake, by how many digits they have."""
    figure, axes = plt.subplots(figsize=(7, 3))
    width = 0.8 / len(by_digits)
    for place, ((name, shares), colour) in enumerate(zip(by_digits.items(), COLOURS, strict=False)):
        axes.bar(
            [d + (place - (len(by_digits) - 1) / 2) * width for d in shares],
            list(shares.values()),
            width,
            label=name,
            color=colour,
        )
    axes.set(xlabel="digits", ylabel="exactly right", ylim=(0, 1.35), title="Held-out numbers, by length")
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])  # above them is room for the legend
    axes.set_xticks(sorted({digits for shares in by_digits.values() for digits in shares}))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return _finish(figure, axes)


def _finish(figure: Figure, axes: Axes) -> Figure:
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure
