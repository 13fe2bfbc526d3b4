"""The picture of a pool and its tables says what they hold; the explorer's buttons move a real engine."""

from __future__ import annotations

import re

import ipywidgets
import matplotlib.pyplot as plt
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from minillm import LLM, SamplingParams
from minillm.cache.block_pool import BlockPool
from minillm.cache.block_table import BlockTable
from minillm.errors import InvalidRequestError
from minillm.viz import explore_blocks, plot_blocks
from minillm.viz.blocks import EXPLORED, _draw

PNG = b"\x89PNG"
SIZES = {"block_size": 4, "num_gpu_blocks_override": 18, "max_model_len": 48}


def fills(figure: Figure) -> dict[str, tuple[float, float]]:
    """What is coloured → width and height, each as a share of a block's slots."""
    patches = [patch for patch in figure.axes[0].patches if patch.get_gid()]
    return {patch.get_gid(): (patch.get_width() / 0.92, patch.get_height() / 0.5) for patch in patches}


def colours(figure: Figure) -> dict[str, str]:
    return {patch.get_gid(): to_hex(patch.get_facecolor()) for patch in figure.axes[0].patches if patch.get_gid()}


def said(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def headers(figure: Figure) -> dict[int, str]:
    """Number of a physical block → what is written on its right."""
    texts = figure.axes[0].texts
    numbered = [at for at, text in enumerate(texts) if re.fullmatch(r"\d+( #)?", text.get_text())]
    return {int(texts[at].get_text().split()[0]): texts[at + 1].get_text() for at in numbered}


@pytest.fixture
def interleaved() -> tuple[BlockPool, BlockTable, BlockTable]:
    """A in blocks 0, 1, 3 with 10 tokens, B in block 2 with 3, of 6 blocks of 4."""
    pool = BlockPool(6, 4)
    a, b = BlockTable(pool), BlockTable(pool)
    a.append(7)
    b.append(3)
    a.append(3)
    return pool, a, b


def test_each_block_is_drawn_as_full_as_it_is(interleaved):
    pool, a, b = interleaved
    figure = plot_blocks(pool, {"A": a, "B": b})
    assert fills(figure) == {
        "pool/0/A": (1, 1),
        "pool/1/A": (1, 1),
        "pool/2/B": (pytest.approx(3 / 4), 1),
        "pool/3/A": (pytest.approx(2 / 4), 1),
        "table/A/0": (1, 1),
        "table/A/1": (1, 1),
        "table/A/2": (pytest.approx(2 / 4), 1),
        "table/B/0": (pytest.approx(3 / 4), 1),
    }
    assert headers(figure) == {0: "A", 1: "A", 2: "B", 3: "A", 4: "", 5: ""}
    texts = said(figure.axes[0])
    assert [text for text in texts if "→" in text][1:] == ["0 → 0", "1 → 1", "2 → 3", "0 → 2"]
    assert {"free: 1", "free: 2", "10 tokens", "3 tokens"} < set(texts)
    shown = colours(figure)
    assert shown["pool/3/A"] == shown["table/A/2"] != shown["pool/2/B"] == shown["table/B/0"]


def test_lines_lead_to_where_a_block_lies(interleaved):
    pool, a, b = interleaved
    lines = {line.get_gid(): line.get_xdata() for line in plot_blocks(pool, {"A": a, "B": b}).axes[0].lines}
    moved = {name: round(end - start) for name, (start, end) in lines.items()}
    assert moved == {"line/A/0": 0, "line/A/1": 0, "line/A/2": 1, "line/B/0": 2}
    assert not plot_blocks(BlockPool(7, 4)).axes[0].lines


def test_a_shared_block_is_in_bands_and_counted(interleaved):
    pool, a, b = interleaved
    child = a.fork()
    child.truncate(9)
    figure = plot_blocks(pool, {"A": a, "B": b, "C": child})
    drawn = fills(figure)
    assert drawn["pool/3/A"] == (pytest.approx(2 / 4), pytest.approx(1 / 2))
    assert drawn["pool/3/C"] == (pytest.approx(1 / 4), pytest.approx(1 / 2))
    assert headers(figure)[3] == "A C ×2"
    assert figure.axes[0].get_title() == "4 of 6 blocks held, 3 of them shared"
    assert headers(plot_blocks(pool, {"a long name": a, "B": b, "C": child}))[3] == "×2"


def test_who_is_not_named_holds_all_the_same(interleaved):
    pool, a, _ = interleaved
    figure = plot_blocks(pool, {"A": a})
    assert headers(figure)[2] == "held"
    assert "pool/2/held" in fills(figure)
    assert headers(plot_blocks(pool))[0] == "held"


def test_free_blocks_stand_in_their_queue_and_some_are_kept(interleaved):
    pool, a, b = interleaved
    pool.remember(0, b"first")
    pool.remember(2, b"other")
    a.free()
    figure = plot_blocks(pool, {"B": b})
    free = {text.get_gid(): text.get_text() for text in figure.axes[0].texts if text.get_gid()}
    places = {block: place for place, block in enumerate(pool.free_blocks, start=1)}
    assert places == {4: 1, 5: 2, 3: 3, 1: 4, 0: 5}
    expected = {f"pool/{block}/free": f"{'kept' if block == 0 else 'free'}: {place}" for block, place in places.items()}
    assert free == expected
    assert {"0 #", "2 #", "1"} < set(said(figure.axes[0]))
    assert figure.axes[0].get_title().endswith("1 free ones kept")


def test_tokens_are_written_into_their_slots(interleaved):
    pool, a, b = interleaved
    figure = plot_blocks(pool, {"A": a, "B": b}, tokens={"A": list("abcdefghij"), "B": ["␣some", "extraordinary", "."]})
    texts = figure.axes[0].texts
    assert sorted(said(figure.axes[0])).count("j") == 2, "in the pool and in the table"
    assert {"some", "extrao…"} < set(said(figure.axes[0]))
    left, right = (next(text for text in texts if text.get_text() == letter) for letter in "ij")
    assert right.get_position()[0] - left.get_position()[0] == pytest.approx(0.92 / 4)


def test_large_blocks_tell_how_many_slots_are_in_use():
    pool = BlockPool(4, 16)
    table = BlockTable(pool)
    table.append(21)
    texts = said(plot_blocks(pool, {"A": table}, tokens={"A": ["x"] * 21}).axes[0])
    assert texts.count("16 of 16") == texts.count("5 of 16") == 2
    assert "x" not in texts


def test_long_tables_go_on_in_the_next_row():
    pool = BlockPool(14, 1)
    table = BlockTable(pool)
    table.append(8)
    patches = {patch.get_gid(): patch for patch in plot_blocks(pool, {"A": table}).axes[0].patches}
    assert patches["table/A/7"].get_y() > patches["table/A/5"].get_y() == patches["table/A/0"].get_y()
    assert patches["table/A/7"].get_x() == patches["table/A/1"].get_x()
    assert patches["pool/7/A"].get_x() == patches["pool/1/A"].get_x()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda pool, table: plot_blocks(BlockPool(49, 4)), "49 blocks"),
        (lambda pool, table: plot_blocks(BlockPool(6, 4), {"A": table}), "another pool"),
        (lambda pool, table: plot_blocks(pool, {"A": table}, tokens={"A": ["x"] * 9}), "10 tokens"),
    ],
    ids=["too many", "another pool", "too few texts"],
)
def test_what_cannot_be_drawn_is_refused(interleaved, wrong, match):
    pool, a, _ = interleaved
    with pytest.raises(InvalidRequestError, match=match):
        wrong(pool, a)
    assert not plt.get_fignums()


@pytest.fixture
def llm():
    with LLM("tiny", dtype="float32", device="cpu", **SIZES) as llm:
        yield llm


def test_an_engine_is_drawn_with_its_requests(llm):
    text = "There was once a curious girl whose name was Nora."
    for name in ("first", "second"):
        llm.engine.add_request(name, llm.get_tokenizer()(text).input_ids, SamplingParams(temperature=0))
        llm.engine.step()
    beside = BlockTable(llm.engine.scheduler.pool)
    beside.append(5)
    figure = plot_blocks(llm, {"beside": beside}, title="given")
    first, second = (request.table for request in llm.engine.scheduler.running)
    assert first.blocks[:2] == second.blocks[:2]
    held = {name for name in fills(figure) if name.startswith("pool/")}
    assert {f"pool/{block}/first" for block in first.blocks} == {name for name in held if name.endswith("first")}
    assert {f"pool/{block}/second" for block in second.blocks} == {name for name in held if name.endswith("second")}
    assert {f"table/beside/{index}" for index in range(2)} < set(fills(figure))
    assert "curious" in said(figure.axes[0])
    assert figure.axes[0].get_title() == "given"


@pytest.fixture
def no_pictures(monkeypatch):
    """For long runs whose words are what counts."""
    monkeypatch.setattr("minillm.viz.blocks._draw", lambda *_: Figure())


class Explorer:
    """The widget's parts by name."""

    def __init__(self, llm: LLM) -> None:
        row, self.said, self.image = explore_blocks(llm).children
        self.prompts, self.add, self.step, self.abort = row.children
        assert isinstance(self.image, ipywidgets.Image)

    def until(self, word: str, most: int = 40) -> str:
        """Step until the line says this."""
        for _ in range(most):
            self.step.click()
            if word in self.said.value:
                return self.said.value
        raise AssertionError(f"{word!r} is never said")


def test_the_explorer_begins_with_requests_that_share(llm):
    explorer = Explorer(llm)
    running = llm.engine.scheduler.running
    assert [request.name for request in running] == ["A", "B", "C/0", "C/1"]
    assert running[1].num_cached_tokens == 8
    assert running[2].table.blocks == running[3].table.blocks
    assert "B 5 tokens (8 found in memory)" in explorer.said.value
    assert "forked C/1" in explorer.said.value
    assert bytes(explorer.image.value).startswith(PNG)


def test_step_takes_one_step_and_tells_of_the_copy(llm):
    explorer = Explorer(llm)
    before, steps = bytes(explorer.image.value), llm.engine.counts.num_steps
    shared = llm.engine.scheduler.running[2].table.blocks[-1]
    explorer.step.click()
    assert llm.engine.counts.num_steps == steps + 1
    copied = llm.engine.scheduler.running[2].table.blocks[-1]
    assert f"copied {shared} → {copied} for C/0" in explorer.said.value
    assert f"Step {steps + 1}: computed A 1 token, B 1 token, C/0 1 token, C/1 1 token" in explorer.said.value
    assert explorer.image.value != before
    assert not plt.get_fignums(), "the explorer leaves no figure open"


@pytest.fixture
def last_figure(monkeypatch):
    """What the explorer last drew, drawn when it is asked for: figures take long."""
    given = []
    monkeypatch.setattr("minillm.viz.blocks._draw", lambda *now: given.append(now) or Figure())
    return lambda: _draw(*given[-1])


def marks(figure: Figure) -> dict[str, str]:
    """What happened to blocks, as it is marked, with what is written beside the frame."""
    frames = [patch.get_gid() for patch in figure.axes[0].patches if re.match("copied|evicted", patch.get_gid() or "")]
    words = [text for text in said(figure.axes[0]) if re.match("copy of|evicted", text)]
    return dict(zip(frames, words, strict=True))


def test_a_copy_is_marked_in_the_step_in_which_it_is_made(llm, last_figure):
    explorer = Explorer(llm)
    assert not marks(last_figure())
    shared = llm.engine.scheduler.running[2].table.blocks[-1]
    explorer.step.click()
    copied = llm.engine.scheduler.running[2].table.blocks[-1]
    assert marks(last_figure()) == {f"copied/{copied}": f"copy of {shared}"}
    explorer.step.click()
    assert not marks(last_figure())


def test_an_eviction_is_told_and_marked(llm, monkeypatch, last_figure):
    """Evicted is what the pool is told to forget while it gives a block out."""
    explorer, pool, forgotten = Explorer(llm), llm.engine.scheduler.pool, []
    forget = pool.forget

    def note(block):
        forgotten.extend([block] if pool.hashes[block] else [])
        forget(block)

    monkeypatch.setattr(pool, "forget", note)
    explorer.prompts.value = list(EXPLORED)[3]
    for _ in range(4):
        explorer.add.click()
    assert "evicted" in explorer.until("evicted")
    (told,) = re.findall(r"evicted ([\d, ]+)", explorer.said.value)
    assert sorted(map(int, told.split(", "))) == sorted(forgotten)
    assert {name for name in marks(last_figure()) if "evicted" in name} == {f"evicted/{block}" for block in forgotten}


def test_add_puts_the_chosen_prompt_into_the_queue(llm):
    explorer = Explorer(llm)
    explorer.prompts.value = list(EXPLORED)[3]
    explorer.add.click()
    [waiting] = llm.engine.scheduler.waiting
    assert waiting.name == "D"
    assert llm.get_tokenizer().decode(waiting.prompt_token_ids) == EXPLORED[explorer.prompts.value][0]
    assert "Waiting: D." in explorer.said.value
    explorer.step.click()
    assert "Waiting: nobody." in explorer.said.value
    assert llm.engine.scheduler.running[-1] is waiting


def test_abort_takes_the_oldest_out_and_leaves_what_others_hold(llm):
    explorer = Explorer(llm)
    before, (oldest, second, *_) = bytes(explorer.image.value), llm.engine.scheduler.running
    explorer.abort.click()
    assert oldest.finish_reason == "abort"
    assert "A was aborted" in explorer.said.value
    counts = llm.engine.scheduler.pool.ref_counts
    assert [counts[block] for block in second.table.blocks] == [1] * len(second.table.blocks)
    assert explorer.image.value != before
    for _ in range(2):
        explorer.abort.click()
    assert llm.engine.scheduler.pool.num_free == 18
    explorer.abort.click()
    assert "There is no request" in explorer.said.value
    explorer.step.click()
    assert "Nothing to do" in explorer.said.value


@pytest.mark.usefixtures("no_pictures")
def test_what_ends_is_found_again_whatever_was_between(llm):
    explorer = Explorer(llm)
    assert "ended A" in explorer.until("ended A")
    explorer.until("Nothing to do")
    explorer.add.click()
    explorer.step.click()
    assert "D 1 token (12 found in memory)" in explorer.said.value


@pytest.mark.usefixtures("no_pictures")
def test_too_many_requests_preempt_the_youngest(llm):
    explorer = Explorer(llm)
    for prompt in EXPLORED:
        explorer.prompts.value = prompt
        explorer.add.click()
    explorer.until("preempted F/1")
    assert "Waiting: F/1" in explorer.said.value
    while "F/1 3 tokens" not in explorer.said.value:
        explorer.step.click()
    assert "forked" not in explorer.said.value, "F/1 came back by itself"


def test_the_engines_own_trace_goes_on():
    with LLM("tiny", dtype="float32", device="cpu", trace=True, **SIZES) as llm:
        explorer = Explorer(llm)
        steps = len(llm.trace.steps)
        explorer.step.click()
        assert llm.engine.trace is llm.trace
        assert len(llm.trace.steps) == steps + 1 == llm.engine.counts.num_steps


def test_an_engine_with_requests_is_drawn_as_it_stands(llm):
    llm.engine.add_request("mine", [5, 6, 7], SamplingParams(max_tokens=8, ignore_eos=True))
    explorer = Explorer(llm)
    assert [request.name for request in llm.engine.scheduler.running] == ["mine"]
    assert "mine" in explorer.said.value


def test_a_prompt_that_could_never_fit_is_refused_in_words():
    with LLM("tiny", dtype="float32", device="cpu", block_size=4, num_gpu_blocks_override=3, max_model_len=48) as llm:
        explorer = Explorer(llm)
        assert "Nothing to do" in explorer.said.value
        explorer.add.click()
        assert "was refused" in explorer.said.value


def test_a_pool_that_cannot_be_drawn_is_not_explored():
    with LLM("tiny", dtype="float32", device="cpu", num_gpu_blocks_override=49, max_model_len=48) as llm:
        with pytest.raises(InvalidRequestError, match="num_gpu_blocks_override"):
            explore_blocks(llm)
        assert not llm.engine.has_unfinished_requests
