"""What all figures share: Okabe and Ito's palette, told apart by colour-blind readers on light and dark pages."""

from __future__ import annotations

import io

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.typing import ColorType

BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
RED = "#D55E00"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
GREY = "#666666"
LIGHT = "#e4e4e4"
"""A surface that is there and means nothing yet."""

COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)
READABLE = 4.5
"""The least contrast of a text with its ground (WCAG 2.2, §1.4.3)."""
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def contrast(one: ColorType, other: ColorType) -> float:
    """Of two colours, from 1 to 21, as WCAG 2.2 defines it."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: ColorType) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def ink(colour: ColorType) -> tuple[float, float, float]:
    """A colour for text: darker, as far as it needs to be to be read on white."""
    red, green, blue = to_rgb(colour)
    while contrast((red, green, blue), "white") < READABLE:
        red, green, blue = 0.97 * red, 0.97 * green, 0.97 * blue
    return red, green, blue


def ink_on(ground: ColorType) -> str:
    """Black or white, whichever is easier to read on this ground."""
    return max("black", "white", key=lambda colour: contrast(colour, ground))


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: ColorType = GREY,
    *,
    width: float = 1.5,
    alpha: float = 1.0,
) -> None:
    """From one point to another."""
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "alpha": alpha, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style, zorder=3)


def box(
    axes: Axes, corner: tuple[float, float], size: tuple[float, float], text: str, colour: str, *, fontsize: float = 9
) -> None:
    """A round box with a text in its middle, on a light shade of the colour."""
    (x, y), (width, height) = corner, size
    for look in ({"facecolor": "white"}, {"facecolor": colour, "alpha": 0.3}):
        axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0.03", zorder=2, **look))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=fontsize, zorder=4)


def png(figure: Figure) -> bytes:
    """The picture's bytes, for a widget; the figure is closed, so that the notebook does not show it a second time."""
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=90)
        plt.close(figure)
        return file.getvalue()
