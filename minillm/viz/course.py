"""The map of the course: from the Transformer to the serving engine, and the parts of the package on the way."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from minillm.viz.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, box, ink

STAGES = (
    ("The Transformer", BLUE, ("tokens and\nembeddings", "positions", "attention", "encoder and\ndecoder")),
    ("The language model", SKY, ("decoder only,\nreal weights", "KV cache")),
    (
        "Paged memory",
        GREEN,
        ("waste of\nreservation", "blocks and\ntables", "paged\nattention", "Triton\nkernels"),
    ),
    ("The engine", ORANGE, ("continuous\nbatching", "sharing\nblocks", "making\nit fast")),
    ("The service", RED, ("serving", "deploying\nGLM-4")),
    ("Beyond", PURPLE, ("many\ndevices",)),
)
"""(stage, colour, its notebooks from 01 on)."""

PER_ROW = 8


def plot_course_map() -> Figure:
    """The notebooks as stops on one road, coloured by stage."""
    figure, axes = plt.subplots(figsize=(10, 3.6))
    stops = [(stage, colour, name, name == names[0]) for stage, colour, names in STAGES for name in names]
    places = [_place(number) for number in range(len(stops))]
    axes.plot(*zip(*places, strict=True), color=GREY, linewidth=6, alpha=0.35, zorder=0)
    for number, ((stage, colour, name, is_first), (x, y)) in enumerate(zip(stops, places, strict=True), start=1):
        box(axes, (x - 0.4, y - 0.3), (0.8, 0.6), f"{number:02d}\n{name}", colour, fontsize=8)
        if is_first:
            axes.text(x - 0.42, y + 0.38, stage, va="bottom", fontsize=10, fontweight="bold", color=ink(colour))
    axes.set(xlim=(-0.6, PER_ROW - 0.4), ylim=(-1.62, 0.75))
    axes.set_axis_off()
    figure.tight_layout()
    return figure


def _place(number: int) -> tuple[float, float]:
    """Where a stop stands: the road turns back at the end of each row."""
    row, column = divmod(number, PER_ROW)
    return (column if row % 2 == 0 else PER_ROW - 1 - column), -1.15 * row
