"""Draw the pictures of docs/architecture.md: `python docs/draw.py` writes docs/figures/*.svg.

Dark letters stand on light boxes and everything else is a middle grey, so that both light and dark pages can show them.
The layout's rows are the layers that import-linter checks, read from pyproject.toml: the picture cannot say otherwise.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
INK, GREY = "#1b1b1b", "#808080"
BLUE, SKY, GREEN, ORANGE, PINK, PLAIN = "#a9d0ec", "#d3eaf8", "#a6dcc6", "#f6d998", "#eccbdd", "#dcdcdc"

ABOUT = {
    "cli": (PLAIN, "the commands: generate, chat, serve, pull, env, bench", "00"),
    "environment": (PLAIN, "what minillm env tells", ""),
    "server": (ORANGE, "the online door: OpenAI's interface over HTTP", "14, 15"),
    "scale": (ORANGE, "replicas and datasets on Ray", "16"),
    "bench": (PINK, "measurements that print a table", "10, 13"),
    "course": (PINK, "checks for the assignments", ""),
    "viz": (PINK, "figures and explorers for notebooks", "all"),
    "llm": (ORANGE, "the offline door: LLM, with vLLM's interface", "11, 12"),
    "simulate": (PINK, "the real scheduler on a virtual clock", "07, 11"),
    "engine": (GREEN, "requests, scheduler, runner, sampler, detokenizer", "11 – 13"),
    "training": (PINK, "a trainer, and the corpora that the project generates", "04"),
    "models": (BLUE, "real checkpoints: files, families, loader", "05, 15"),
    "tokenizers": (BLUE, "byte-pair encoding; readers of other forms", "01"),
    "cache": (GREEN, "key/value stores: contiguous, paged; block pool", "06 – 09, 12"),
    "transformer": (SKY, "the model: attention, positions, norms, decoder", "02 – 05"),
    "checks | client | text": (PLAIN, "small tools that several parts share", ""),
    "errors": (PLAIN, "every error that is raised on purpose", ""),
}
"""A layer's colour, what it is, the notebooks that explain it."""


def layers() -> list[str]:
    """The package's parts from top to bottom, as import-linter knows them."""
    linter = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    names = [layer.replace("minillm.", "") for layer in linter["contracts"][0]["layers"]]
    return [name for name in names if name != "__main__"]


def text(
    x: float, y: float, words: str, *, size: int = 14, ink: str = INK, anchor: str = "start", mono: bool = False
) -> str:
    """A line of text; `mono` for names in the code."""
    family = "ui-monospace, Consolas, monospace" if mono else "system-ui, sans-serif"
    weight = ' font-weight="600"' if mono else ""
    style = f'font-family="{family}" font-size="{size}" fill="{ink}" text-anchor="{anchor}"{weight}'
    return f'<text x="{x}" y="{y}" {style}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, colour: str) -> str:
    """A light rounded box."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{colour}"/>'


def arrow(path: str, *, dashed: bool = False) -> str:
    """A grey line along an SVG path, with a head at its end."""
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{GREY}" stroke-width="2" marker-end="url(#head)"{dashes}/>'


def svg(width: int, height: int, title: str, parts: Iterator[str]) -> str:
    """The whole picture."""
    head = (
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{GREY}"/></marker></defs>'
    )
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    return "\n".join([opening, f"<title>{escape(title)}</title>", head, *parts, "</svg>", ""])


def layout() -> Iterator[str]:
    """One row a layer, and the kernels beside the rows whose twins they are."""
    names, row = layers(), 36
    yield text(30, 18, "part", size=12, ink=GREY)
    yield text(662, 18, "notebooks", size=12, ink=GREY, anchor="end")
    for number, name in enumerate(names):
        colour, what, notebooks = ABOUT[name]
        y = 28 + number * row
        yield box(16, y, 660, row - 5, colour)
        yield text(30, y + 21, name, mono=True)
        yield text(228, y + 21, what)
        yield text(662, y + 21, notebooks, anchor="end")
    top, bottom = 28 + names.index("cache") * row, 28 + (names.index("transformer") + 1) * row - 5
    yield box(700, top, 172, bottom - top, GREEN)
    yield text(786, top + 22, "kernels", mono=True, anchor="middle")
    yield text(786, top + 40, "faster twins: Numba", size=13, anchor="middle")
    yield text(786, top + 57, "on CPUs, Triton on GPUs", size=13, anchor="middle")
    yield arrow(f"M 786 60 V {top - 12}")
    yield text(796, 180, "imports", size=12, ink=GREY)
    yield text(796, 196, "go down", size=12, ink=GREY)


def step_box(
    x: float, y: float, colour: str, name: str, *lines: str, width: float = 150, height: float = 74
) -> Iterator[str]:
    """A station of the prompt's way: its name in the code, and what it does."""
    yield box(x, y, width, height, colour)
    yield text(x + width / 2, y + 23, name, mono=True, anchor="middle")
    for number, line in enumerate(lines):
        yield text(x + width / 2, y + 43 + 17 * number, line, size=12, anchor="middle")


def way_of_a_prompt() -> Iterator[str]:
    """From a text to a text; the step in the middle is repeated for every token."""
    yield text(20, 52, "“Once upon a time”", size=14, ink=GREY)
    yield arrow("M 166 47 H 188")
    yield from step_box(192, 10, BLUE, "tokenizer", "text → token ids")
    yield arrow("M 344 47 H 384")
    yield from step_box(388, 10, GREEN, "Request", "waits in a queue;", "tokens so far")
    yield arrow("M 463 84 V 132")
    yield from step_box(388, 136, GREEN, "Scheduler", "which tokens are", "computed in this step")
    yield from step_box(606, 136, GREEN, "BlockPool", "who holds which", "block of memory")
    yield arrow("M 540 162 H 602")
    yield arrow("M 606 186 H 544")
    yield arrow("M 463 210 V 258")
    yield text(473, 238, "Schedule: chunks, block tables, copies", size=12, ink=GREY)
    yield box(150, 262, 606, 138, SKY)
    yield text(166, 285, "ModelRunner", mono=True)
    yield text(166, 303, "flat tokens through the Decoder, all sequences at once", size=12)
    yield from step_box(166, 316, BLUE, "q, k, v", "projected, rotated", width=128, height=68)
    yield arrow("M 296 350 H 318")
    yield from step_box(322, 316, GREEN, "PagedKVCache", "k and v written", "into their slots", width=128, height=68)
    yield arrow("M 452 350 H 474")
    yield from step_box(478, 316, GREEN, "attention", "over the blocks of", "each table", width=128, height=68)
    yield arrow("M 608 350 H 630")
    yield from step_box(634, 316, BLUE, "feed-forward", "next layer,", "at last: logits", width=112, height=68)
    yield arrow("M 463 400 V 436")
    yield from step_box(388, 440, GREEN, "Sampler", "logits → one token", "for each sequence")
    yield arrow("M 388 477 H 60 V 120 Q 60 104 76 104 H 420 V 88", dashed=True)
    yield text(70, 440, "the token joins its", size=12, ink=GREY)
    yield text(70, 456, "request; next step", size=12, ink=GREY)
    yield arrow("M 540 477 H 602")
    yield from step_box(606, 440, ORANGE, "Detokenizer", "whole characters,", "stop texts")
    yield arrow("M 681 514 V 544")
    yield text(640, 562, "RequestOutput: “, in a small house near the garden, …”", size=14, ink=GREY, anchor="middle")


def pictures() -> dict[str, str]:
    """Both, by the names of their files."""
    height = 28 + len(layers()) * 36 + 8
    return {
        "layout.svg": svg(890, height, "The layout of the package", layout()),
        "prompt.svg": svg(890, 580, "The way of a prompt through the engine", way_of_a_prompt()),
    }


def main() -> None:
    """Write both."""
    folder = HERE / "figures"
    folder.mkdir(exist_ok=True)
    for name, picture in pictures().items():
        (folder / name).write_text(picture, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
