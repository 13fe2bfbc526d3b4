"""A comparison as a picture: bars of tokens a second, and lines for what the machine could do at best."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from minillm.bench.comparison import Comparison, rate
from minillm.bench.workloads import Workload
from minillm.viz.style import BLUE, LIGHT, ORANGE

LOOKS: tuple[tuple[str, Literal["--", ":"]], ...] = ((BLUE, "--"), (ORANGE, ":"))
"""Of each dtype: the colour of its bars and of its limit, and that line's style."""


def draw(comparison: Comparison, path: Path) -> None:
    """Write the picture: a panel for each workload, a group of bars for each engine, a bar for each dtype."""
    width = 1 + 3.4 * len(comparison.works)
    figure, panels = plt.subplots(1, len(comparison.works), figsize=(width, 4.2), squeeze=False, layout="constrained")
    for axes, work in zip(panels[0], comparison.works, strict=True):
        _panel(axes, comparison, work)
    handles: list[Patch | Line2D] = []
    for dtype, (colour, style) in zip(comparison.rates, LOOKS, strict=False):
        handles.append(Patch(color=colour, label=dtype))
        handles.append(Line2D([], [], color=colour, linestyle=style, label=f"limit in {dtype}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(axes: Axes, comparison: Comparison, work: Workload) -> None:
    engines = list(dict.fromkeys(result.engine for result in comparison.results))
    height = 0.8 / len(comparison.rates)
    for index, (dtype, (colour, style)) in enumerate(zip(comparison.rates, LOOKS, strict=False)):
        for row, engine in enumerate(engines):
            result = comparison.result(engine, dtype, work)
            if result is not None and result.runs:
                bar = axes.barh(row + index * height, result.tokens_per_second, height, color=colour)
                axes.bar_label(bar, fmt="{:.0f}", fontsize=7, padding=2)
        axes.axvline(rate(work, *comparison.limit(dtype, work)), color=colour, linestyle=style)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(engines))], engines)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s after the first" if work.is_single else "tokens/s")
    axes.set_title(f"{work.name}\n{work.what}", fontsize=8)
    axes.margins(x=0.15)
    axes.grid(axis="x", color=LIGHT)
    axes.set_axisbelow(True)
