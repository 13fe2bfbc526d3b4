"""What all figures share: Okabe and Ito's palette, told apart by colour-blind readers on light and dark pages."""

from __future__ import annotations

import io

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
RED = "#D55E00"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
GREY = "#7f7f7f"
LIGHT = "#e4e4e4"
"""A surface that is there and means nothing yet."""

COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def png(figure: Figure) -> bytes:
    """The picture's bytes, for a widget; the figure is closed, so that the notebook does not show it a second time."""
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=90)
        plt.close(figure)
        return file.getvalue()
