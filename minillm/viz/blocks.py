"""Blocks of keys and values, drawn from the live objects: the pool, the tables over it, and their explorer."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import ipywidgets as widgets  # type: ignore[import-untyped]
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from minillm.cache.block_pool import BlockPool
from minillm.cache.block_table import BlockTable
from minillm.engine.outputs import RequestOutput
from minillm.engine.params import SamplingParams
from minillm.engine.request import Request
from minillm.engine.scheduler import Schedule, Scheduler
from minillm.engine.trace import Trace
from minillm.errors import InvalidRequestError
from minillm.llm import LLM
from minillm.viz.attention import token_names
from minillm.viz.explorer import Explorer
from minillm.viz.style import COLOURS, GREY, LIGHT, ink

COLUMNS = 6
"""Blocks beside each other."""
MOST_BLOCKS = 48
"""Blocks of a pool that can be drawn."""
MOST_WRITTEN = 4
"""Slots of a block that have room for their tokens' texts."""
MOST_LETTERS = 7
"""Letters of a token that fit into a slot."""

HEADER, BODY, PITCH = 0.34, 0.5, 1.0
"""Height of a block's line of text, of its slots, and from one row of blocks to the next."""

EXPLORED: Mapping[str, tuple[str, SamplingParams]] = {
    "Nora, and what she had": (
        "There was once a curious girl whose name was Nora. She had",
        SamplingParams(temperature=0, max_tokens=10),
    ),
    "Nora, another story (the same beginning)": (
        "There was once a curious girl whose name was Nora. One evening",
        SamplingParams(temperature=0, max_tokens=10),
    ),
    "two answers to one prompt (n=2)": (
        "Sam was a clever boy. One sunny evening",
        SamplingParams(n=2, temperature=0.8, seed=8, max_tokens=10),
    ),
    "something else": (
        "Once upon a time, in a small house near the farm, lived",
        SamplingParams(temperature=0, max_tokens=10),
    ),
}
"""Name → prompt and how it is answered, for `explore_blocks`."""


class _View(NamedTuple):
    """One request's memory as it is drawn; `tokens` is empty where the texts are not known."""

    name: str
    table: BlockTable
    colour: str
    tokens: Sequence[str]


class _Share(NamedTuple):
    """One request's part in a block: which one in its order, and how many slots it has filled."""

    view: _View
    number: int
    filled: int

    @property
    def tokens(self) -> Sequence[str]:
        start = self.number * self.view.table.pool.block_size
        return self.view.tokens[start : start + self.filled]


def plot_blocks(
    memory: LLM | BlockPool,
    tables: Mapping[str, BlockTable] | None = None,
    *,
    tokens: Mapping[str, Sequence[str]] | None = None,
    title: str = "",
) -> Figure:
    """The pool as a grid of physical blocks, and below it each table's blocks in the order of its tokens.

    A block is coloured by who holds it, in bands where there are several (×2: its reference count). A free one says how
    many are given out before it, and whether its content can still be found. In a pool that fits into one row, lines
    lead from a table's blocks to where they lie.

    Args:
        memory: a pool, or an LLM whose engine's pool and running requests are drawn.
        tables: name → table over that pool; beside an LLM's requests.
        tokens: name → the texts of that table's tokens; they are written where a block has at most four slots.

    Raises:
        InvalidRequestError: a pool of too many blocks to be drawn, a table over another pool, or too few texts.
    """
    numbers: dict[str, int] = {}
    views = _request_views(memory, numbers) if isinstance(memory, LLM) else []
    pool = memory.engine.scheduler.pool if isinstance(memory, LLM) else memory
    for name, table in (tables or {}).items():
        if table.pool is not pool:
            raise InvalidRequestError(f"table {name!r} is over another pool: draw it with its own")
        texts = (tokens or {}).get(name, ())
        if texts and len(texts) < table.num_tokens:
            raise InvalidRequestError(f"table {name!r} has {table.num_tokens} tokens, and there are {len(texts)} texts")
        views.append(_View(name, table, _colour(name, numbers), texts))
    return _draw(pool, views, title)


def explore_blocks(llm: LLM) -> Explorer:
    """`plot_blocks` of a live engine, with buttons that add a prompt, take a step, and abort the oldest request.

    The prompts are those of `EXPLORED`; an engine without requests is given some first. The line tells of the last
    thing done, and blocks that were copied or evicted in it are marked. Outputs are dropped: nothing else may be
    generated with this LLM meanwhile.

    Raises:
        InvalidRequestError: the LLM's pool has too many blocks to be drawn.
        TokenizerError: the LLM has no tokenizer for the prompts.
    """
    scheduler = llm.engine.scheduler
    _check_size(scheduler.pool)
    tokenizer = llm.get_tokenizer()
    numbers: dict[str, int] = {}
    names = (f"{letter}{round_ or ''}" for round_ in count() for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    prompts = widgets.Dropdown(options=list(EXPLORED), layout={"width": "320px"})
    add, step, abort = (
        widgets.Button(description=does, layout={"width": "auto"}) for does in ("add", "step", "abort the oldest")
    )

    def add_prompt(prompt: str) -> _Event:
        text, params = EXPLORED[prompt]
        taken = {request.request_id for request in (*scheduler.running, *scheduler.waiting)}
        name = next(name for name in names if name not in taken)
        try:
            llm.engine.add_request(name, tokenizer(text).input_ids, params, prompt=text)
        except InvalidRequestError as error:
            return _Event(f"{name} was refused: {error}.")
        return _Event(f"{name} was added: “{text}”.")

    def abort_oldest() -> _Event:
        oldest = next(iter((*scheduler.running, *scheduler.waiting)), None)
        if oldest is None:
            return _Event("There is no request.")
        llm.engine.abort(oldest.request_id)
        return _Event(f"{oldest.request_id} was aborted.")

    if not scheduler.has_requests:
        first, second, third, _ = EXPLORED
        add_prompt(first)
        llm.engine.step()
        add_prompt(second)
        add_prompt(third)
    last = [_step(llm)]

    def draw() -> Figure:
        return _draw(scheduler.pool, _request_views(llm, numbers), "", last[-1])

    def tell() -> str:
        waiting = ", ".join(request.name for request in scheduler.waiting) or "nobody"
        return f"{html.escape(last[-1].said)} <i>Waiting: {html.escape(waiting)}.</i>"

    explorer = Explorer((), draw, tell, rows=[widgets.HBox([prompts, add, step, abort])])

    def on_click(button: Any, does: Callable[[], _Event]) -> None:
        def do(_: Any) -> None:
            last[:] = [does()]
            explorer.redraw()

        button.on_click(do)

    on_click(add, lambda: add_prompt(prompts.value))
    on_click(step, lambda: _step(llm))
    on_click(abort, abort_oldest)
    return explorer


class _Event(NamedTuple):
    """What was done, in words, and what it did to blocks.

    Attributes:
        copies: a block that was written on → the one whose content it was given before.
        evicted: blocks whose content can be found no more, as they are needed for something else.
    """

    said: str
    copies: Mapping[int, int] = {}
    evicted: Sequence[int] = ()


NOTHING = _Event("")


class _LastStep(Trace):
    """Keeps the step itself, and lets the engine's own trace record it too."""

    def __init__(self, trace: Trace | None) -> None:
        super().__init__()
        self.trace = trace
        self.step: Schedule | None = None

    def record(self, scheduler: Scheduler, step: Schedule, start: float, end: float) -> None:
        self.step = step
        if self.trace is not None:
            self.trace.record(scheduler, step, start, end)


def _step(llm: LLM) -> _Event:
    """Take a step and tell of it."""
    engine, pool = llm.engine, llm.engine.scheduler.pool
    running, kept = list(engine.scheduler.running), list(pool.hashes)
    engine.trace = last = _LastStep(engine.trace)
    try:
        outputs = engine.step()
    finally:
        engine.trace = last.trace
    if last.step is None:
        return _Event("Nothing to do: add a prompt.")
    known = [*running, *(part.request for part in last.step.scheduled)]
    forked = [request for request in engine.scheduler.running if request not in known]
    copies = {copy.target: copy.source for part in last.step.scheduled for copy in part.copies}
    evicted = [block for block, content in enumerate(kept) if content is not None and pool.find(content) is None]
    said = _tell(last.step, running, forked, outputs, evicted)
    return _Event(f"Step {engine.counts.num_steps}: {said}.", copies, evicted)


def _tell(
    step: Schedule,
    before: Sequence[Request],
    forked: Sequence[Request],
    outputs: Sequence[RequestOutput],
    evicted: Sequence[int],
) -> str:
    """A step in words.

    Args:
        before: the requests that ran before it.
        forked: those that began with another's memory behind it.
    """
    parts = []
    for part in step.scheduled:
        found = part.start + part.num_stored if part.request not in before else 0
        tokens = f"{part.request.name} {part.count} token{'s' if part.count > 1 else ''}"
        parts.append(tokens + (f" ({found} found in memory)" if found else ""))
    copies = [
        f"{copy.source} → {copy.target} for {part.request.name}" for part in step.scheduled for copy in part.copies
    ]
    events = {
        "computed": parts,
        "copied": copies,
        "evicted": [str(block) for block in evicted],
        "forked": [request.name for request in forked],
        "preempted": [request.name for request in step.preempted],
        "ended": [output.request_id for output in outputs if output.finished],
    }
    return "; ".join(f"{what} {', '.join(who)}" for what, who in events.items() if who)


def _request_views(llm: LLM, numbers: dict[str, int]) -> list[_View]:
    """The running requests; `numbers` keeps a colour for each name."""
    tokenizer, pool = llm.engine.tokenizer, llm.engine.scheduler.pool
    views = []
    for request in llm.engine.scheduler.running:
        texts: Sequence[str] = ()
        if tokenizer is not None and pool.block_size <= MOST_WRITTEN:
            texts = token_names(tokenizer, request.tokens(0, request.table.num_tokens))
        views.append(_View(request.name, request.table, _colour(request.name, numbers), texts))
    return views


def _colour(name: str, numbers: dict[str, int]) -> str:
    return COLOURS[numbers.setdefault(name, len(numbers)) % 6]  # grey, the seventh, means nobody's


def _check_size(pool: BlockPool) -> None:
    """Raise InvalidRequestError where a picture would not be readable."""
    if pool.num_blocks > MOST_BLOCKS:
        raise InvalidRequestError(
            f"{pool.num_blocks} blocks are too many for a picture: draw a pool of {MOST_BLOCKS} or fewer "
            "(LLM(…, num_gpu_blocks_override=24, block_size=4))"
        )


def _draw(pool: BlockPool, views: Sequence[_View], title: str, event: _Event = NOTHING) -> Figure:
    _check_size(pool)
    shares: dict[int, list[_Share]] = defaultdict(list)
    for view in views:
        for index, block in enumerate(view.table.blocks):
            filled = min(view.table.num_tokens - index * pool.block_size, pool.block_size)
            shares[block].append(_Share(view, index, filled))
    heights = [PITCH * max(1, _rows(len(view.table.blocks))) for view in views]
    below = PITCH * _rows(pool.num_blocks) + 0.25  # where the tables begin
    bottom = below + 0.45 + sum(heights) if views else below - 0.25
    figure, axes = plt.subplots(figsize=(10, 0.58 * bottom + 1.2), layout="constrained")
    axes.set(xlim=(-0.75, COLUMNS - 0.05), ylim=(bottom, -0.45))
    axes.set_axis_off()
    _caption(axes, -0.22, "The pool: physical blocks")
    for block in range(pool.num_blocks):
        _draw_physical(axes, pool, block, shares[block])
    for block, source in event.copies.items():
        _mark(axes, block, f"copy of {source}", "-", f"copied/{block}")
    for block in event.evicted:
        _mark(axes, block, "evicted", "--", f"evicted/{block}")
    top = below + 0.45
    if views:
        _caption(axes, below + 0.2, "The tables: logical block → physical block")
    for number, (view, height) in enumerate(zip(views, heights, strict=True)):
        _draw_table(axes, view, top)
        if pool.num_blocks <= COLUMNS:
            _draw_lines(axes, view, top, 0.06 * (number - (len(views) - 1) / 2))
        top += height
    axes.set_title(title or _summary(pool))
    _legend(figure, pool)
    return figure


def _caption(axes: Axes, y: float, text: str) -> None:
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.text(-0.7, y, text, fontsize=9, style="italic", va="center", bbox=behind)


def _rows(blocks: int) -> int:
    return -(-blocks // COLUMNS)


def _corner(number: int, top: float) -> tuple[float, float]:
    """Left and upper edge of a block in a grid that begins at `top`."""
    return number % COLUMNS, top + PITCH * (number // COLUMNS)


def _draw_physical(axes: Axes, pool: BlockPool, block: int, shares: Sequence[_Share]) -> None:
    x, y = _corner(block, 0)
    held, is_known = pool.ref_counts[block], pool.hashes[block] is not None
    number = f"{block} #" if is_known else f"{block}"
    if not held:
        _frame(axes, x, y, number, "", LIGHT if is_known else "white")
        said = f"{'kept' if is_known else 'free'}: {pool.free_blocks.index(block) + 1}"
        axes.text(x + 0.46, y + HEADER + BODY / 2, said, fontsize=8, ha="center", va="center", gid=f"pool/{block}/free")
        return
    holders = " ".join(share.view.name for share in shares) or "held"
    times = f"×{held}" if held > 1 else ""
    _frame(axes, x, y, number, f"{holders} {times}".strip() if len(holders) <= 11 else times)
    if not shares:
        _fill(axes, x, y, 1.0, GREY, f"pool/{block}/held")
    for band, share in enumerate(shares):
        gid = f"pool/{block}/{share.view.name}"
        _fill(axes, x, y, share.filled / pool.block_size, share.view.colour, gid, band, len(shares))
    if shares:
        _write(axes, x, y, max(shares, key=lambda share: share.filled))


def _mark(axes: Axes, block: int, said: str, line: str, gid: str) -> None:
    """A thick frame around a block of the pool, and what happened to it."""
    x, y = _corner(block, 0)
    axes.add_patch(Rectangle((x, y), 0.92, HEADER + BODY, fill=False, linewidth=2.5, linestyle=line, zorder=5, gid=gid))
    ground = {"facecolor": "black", "edgecolor": "none", "pad": 1.5}
    place = (x + 0.46, y + HEADER + BODY)
    axes.text(*place, said, fontsize=7, color="white", ha="center", va="center", bbox=ground, zorder=6)


def _draw_table(axes: Axes, view: _View, top: float) -> None:
    middle = top + HEADER + BODY / 2
    axes.text(
        -0.1, middle - 0.05, view.name, fontsize=11, weight="bold", ha="right", va="bottom", color=ink(view.colour)
    )
    plural = "" if view.table.num_tokens == 1 else "s"
    axes.text(-0.1, middle, f"{view.table.num_tokens} token{plural}", fontsize=8, ha="right", va="top")
    pool = view.table.pool
    for index, block in enumerate(view.table.blocks):
        x, y = _corner(index, top)
        filled = min(view.table.num_tokens - index * pool.block_size, pool.block_size)
        _frame(axes, x, y, f"{index} → {block}", "")
        _fill(axes, x, y, filled / pool.block_size, view.colour, f"table/{view.name}/{index}")
        _write(axes, x, y, _Share(view, index, filled))


def _draw_lines(axes: Axes, view: _View, top: float, shift: float) -> None:
    """From each of a table's blocks to where it lies in the pool's one row."""
    for index, block in enumerate(view.table.blocks):
        (x, y), (end, _) = _corner(index, top), _corner(block, 0)
        xs, ys = (x + 0.46 + shift, end + 0.46 + shift), (y, HEADER + BODY)
        axes.plot(xs, ys, color=view.colour, linewidth=1.2, zorder=0, gid=f"line/{view.name}/{index}")


def _frame(axes: Axes, x: float, y: float, left: str, right: str, colour: str = "white") -> None:
    """An empty block with its line of text above the slots."""
    axes.add_patch(Rectangle((x, y), 0.92, HEADER + BODY, facecolor=colour, edgecolor="black", linewidth=0.8, zorder=1))
    axes.text(x + 0.03, y + HEADER / 2 + 0.02, left, fontsize=8, weight="bold", va="center")
    axes.text(x + 0.89, y + HEADER / 2 + 0.02, right, fontsize=8, ha="right", va="center")


def _fill(axes: Axes, x: float, y: float, share: float, colour: str, gid: str, band: int = 0, bands: int = 1) -> None:
    """The part of a block's slots that is in use; one of several bands where others use them too."""
    height = BODY / bands
    corner = x, y + HEADER + band * height
    axes.add_patch(Rectangle(corner, 0.92 * share, height, facecolor=colour, alpha=0.4, zorder=2, gid=gid))


def _write(axes: Axes, x: float, y: float, share: _Share) -> None:
    """Lines between the slots and the tokens' texts in them; in large blocks how many slots are in use."""
    size = share.view.table.pool.block_size
    middle = y + HEADER + BODY / 2
    if size > 2 * MOST_WRITTEN:
        axes.text(x + 0.46, middle, f"{share.filled} of {size}", fontsize=8, ha="center", va="center", zorder=4)
        return
    edges = [x + 0.92 * slot / size for slot in range(1, size)]
    axes.vlines(edges, y + HEADER, y + HEADER + BODY, color="black", linewidth=0.4, zorder=3)
    if size <= MOST_WRITTEN:
        for slot, text in enumerate(share.tokens):
            word = text.removeprefix("␣")
            short = word if len(word) <= MOST_LETTERS else word[: MOST_LETTERS - 1] + "…"
            axes.text(
                x + 0.92 * (slot + 0.5) / size,
                middle,
                short,
                fontsize=6 if len(short) < MOST_LETTERS else 5,
                ha="center",
                va="center",
                zorder=4,
            )


def _summary(pool: BlockPool) -> str:
    held, shared = pool.num_blocks - pool.num_free, sum(times > 1 for times in pool.ref_counts)
    kept = sum(pool.hashes[block] is not None for block in pool.free_blocks)
    said = f"{held} of {pool.num_blocks} blocks held, {shared} of them shared"
    return f"{said}; {kept} free ones kept" if kept else said


def _legend(figure: Figure, pool: BlockPool) -> None:
    """What the marks mean, of those that occur."""
    handles = []
    free = [pool.hashes[block] for block in pool.free_blocks]
    if None in free:
        handles.append(Patch(facecolor="white", edgecolor="black", label="free: its place in the queue"))
    if any(free):
        handles.append(Patch(facecolor=LIGHT, edgecolor="black", label="kept: free too, and can be found"))
    if any(pool.hashes):
        handles.append(Patch(alpha=0, label="#: can be found by its content"))
    if any(times > 1 for times in pool.ref_counts):
        handles.append(Patch(alpha=0, label="×2: held twice"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
