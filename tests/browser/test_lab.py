"""JupyterLab in a real browser: notebooks run, their explorers moved, and what is seen then."""

from __future__ import annotations

import contextlib
import re

import pytest

from tests.browser.lab import SOURCES, jupyter_lab
from tests.browser.notebook import Notebook
from tests.conftest import opening_pages

ONLY_THE_LINE = {("explore_sampling", "seed of the draw")}
"""What these change is written, not drawn."""
OFTEN_WITHOUT_EFFECT = {
    ("explore_programs", "multiprocessors"),
    ("explore_programs", "query heads per KV head"),
}
"""Notebook 09 asks why: few of its batches are split otherwise."""
EXPLORERS = {
    "explore_rotary": "02_positions",
    "explore_attention": "03_attention",
    "explore_sampling": "05_decoder_only",
    "explore_memory": "07_memory_waste",
    "explore_blocks": "08_paged_blocks",
    "explore_schedule": "11_continuous_batching",
}
LOOKS = {"viewport": {"width": 1400, "height": 1000}}


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    with jupyter_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@contextlib.contextmanager
def running(open_page, lab, name):
    """A notebook, run whole; no cell has complained."""
    notebook = Notebook(open_page(f"{lab.url}/lab/tree/{name}?reset", **LOOKS))
    try:
        notebook.run_all()
        assert notebook.complaints() == []
        yield notebook
        assert notebook.complaints() == []
    finally:
        notebook.close()


@pytest.fixture(scope="module")
def explorers(browser, lab):
    """All six in one notebook: one kernel to wait for."""
    with (
        opening_pages(browser) as open_page,
        running(open_page, lab, lab.put_explorers(EXPLORERS)) as notebook,
    ):
        yield {shown.name: shown for shown in notebook.explorers()}


@pytest.fixture
def shown(request, explorers, screenshots):
    """The explorer after which the test is named; at the end a picture of it is kept."""
    found = explorers[request.function.__name__.replace("test_", "explore_")]
    found.show()
    yield found
    found.page.screenshot(path=screenshots / f"{found.name}.png")


def test_start_here(open_page, lab, screenshots):
    with running(open_page, lab, lab.put("00_start_here")) as notebook:
        assert notebook.photograph(screenshots, "00_start_here") > 0


def test_attention(shown):
    for name in ("layer", "head"):
        seen = shown.changed(lambda name=name: shown.slide(name))
        assert f"Layer {shown.reading('layer')}, head {shown.reading('head')}:" in seen.line
    assert "blue" not in shown.see().line
    assert "blue" in shown.changed(lambda: shown.write("Mia had a blue kite.")).line
    shades = "spans => spans.map(span => getComputedStyle(span).backgroundColor)"
    tokens = shown.root.locator(".widget-html-content span")
    looking = tokens.evaluate_all(shades)  # from the last token
    tokens.nth(2).hover()
    pointed = tokens.evaluate_all(shades)
    assert pointed != looking
    assert {shade.split()[-1] for shade in pointed[3:]} == {"0)"}, "nobody looks at what comes later"


def test_rotary(shown):
    first = shown.see().picture
    moved = {shown.changed(lambda name=name: shown.slide(name)).picture for name in shown.sliders()}
    assert len(moved | {first}) == 4


def test_sampling(shown):
    move_sliders(shown)
    assert shown.see().line.startswith("Once upon a time")


def test_memory(shown):
    go_through_steps(shown)
    (policies,) = shown.menus()
    assert "Running" in shown.changed(lambda: shown.choose_next(policies)).line


def test_blocks(shown):
    number = int(re.match(r"Step (\d+)", shown.see().line)[1])
    assert shown.changed(lambda: shown.press("step")).line.startswith(f"Step {number + 1}: computed")
    assert " was added: " in shown.changed(lambda: shown.press("add"), picture=False).line
    assert " was aborted." in shown.changed(lambda: shown.press("abort")).line


def test_schedule(shown):
    go_through_steps(shown)
    shown.until(lambda: shown.see().line.startswith(f"Step {shown.reading('step')}, "))


def go_through_steps(shown):
    """Forth, back, by the slider, and played: each shows the step that it goes to, and another picture."""
    start = int(shown.reading("step"))
    first = shown.see()
    assert shown.changed(lambda: shown.press("step")).line != ""
    assert int(shown.reading("step")) == start + 1
    assert shown.changed(lambda: shown.press("back")) == first
    assert int(shown.reading("step")) == start
    shown.changed(lambda: shown.slide("step"))
    assert int(shown.reading("step")) == start + 1
    shown.changed(shown.play)
    shown.changed(lambda: None)  # it goes on by itself
    shown.play()
    shown.settle()
    assert int(shown.reading("step")) > start + 2


def move_sliders(shown):
    """From the last one on, so that a seed is moved before top-k leaves nothing to be drawn."""
    for name in reversed(shown.sliders()):
        if (shown.name, name) in OFTEN_WITHOUT_EFFECT:
            shown.slide(name)
            shown.settle()
            continue
        shown.changed(lambda name=name: shown.slide(name), picture=(shown.name, name) not in ONLY_THE_LINE)


@pytest.mark.browser_all
@pytest.mark.parametrize("stem", [stem for stem in SOURCES if stem != "00_start_here"])
def test_notebook(open_page, lab, screenshots, stem):
    with running(open_page, lab, lab.put(stem)) as notebook:
        assert notebook.photograph(screenshots, stem) > 0
        for shown in notebook.explorers():
            shown.show()
            move_everything(shown)
            shown.page.screenshot(path=screenshots / f"{stem}_{shown.name}_moved.png")


def move_everything(shown):
    """Each control changes what is seen."""
    for menu in shown.menus():
        if shown.name == "explore_blocks":  # it says what the button beside it will add
            shown.choose_next(menu)
        else:
            shown.changed(lambda menu=menu: shown.choose_next(menu))
    move_sliders(shown)
    if shown.fields():
        shown.changed(lambda: shown.write("Mia saw a red kite. Mia saw a dog."))
    for box in shown.boxes():
        shown.changed(box.click)
    for name in shown.buttons():
        shown.changed(lambda name=name: shown.press(name), picture=False)
    if shown.root.locator(".widget-play").count():
        go_through_steps(shown)
