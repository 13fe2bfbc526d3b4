"""A notebook that is open in a browser, and the explorers in it: run, moved and looked at as by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

OUTER = ".jp-WindowedPanel-outer"
NOTEBOOK = "window.jupyterapp.shell.currentWidget"
IS_DONE = f"""() => {{
    const cells = {NOTEBOOK}.content.widgets.filter(cell => cell.model.type === "code");
    const has_failed = cells.some(cell => cell.model.outputs.toJSON().some(one => one.output_type === "error"));
    const is_idle = {NOTEBOOK}.sessionContext.session?.kernel?.status === "idle";
    return is_idle && (has_failed || cells.every(cell => cell.model.executionCount !== null));
}}"""
IS_READY = f"() => window.jupyterapp && {NOTEBOOK}?.sessionContext?.session?.kernel?.status === 'idle'"
SOURCES = f"() => {NOTEBOOK}.content.widgets.map(cell => cell.model.sharedModel.getSource())"
OUTPUTS = f"""() => {NOTEBOOK}.content.widgets
    .filter(cell => cell.model.type === "code").flatMap(cell => cell.model.outputs.toJSON())"""
FINGERPRINT = """async image => {
    const digest = await crypto.subtle.digest("SHA-256", await (await fetch(image.src)).arrayBuffer());
    return Array.from(new Uint8Array(digest)).join(" ");
}"""
HAS_FIGURE = """() => {
    const { top, bottom } = document.querySelector(".jp-WindowedPanel-outer").getBoundingClientRect();
    return [...document.querySelectorAll(".jp-OutputArea-output :is(img, svg)")]
        .map(figure => figure.getBoundingClientRect())
        .some(place => place.height > 50 && place.top < bottom && place.bottom > top);
}"""
SECONDS = 1200
FIRST_TIME = "preparing kernels for this machine"
"""What is told once in a while, on purpose."""


class Seen(NamedTuple):
    """What an explorer shows: the fingerprint of its picture's bytes, and its line of text."""

    picture: str
    line: str


@dataclass
class Notebook:
    """The one that is open in a page of JupyterLab."""

    page: Any

    def run_all(self) -> None:
        """Run → Run All Cells, and wait until all have run or one has failed."""
        self.page.wait_for_function(IS_READY, timeout=120_000)
        self.page.click("#jp-MainMenu >> text=Run")
        self.page.click("li[data-command='runmenu:run-all']")
        self.page.wait_for_function(IS_DONE, timeout=1000 * SECONDS, polling=300)

    def complaints(self) -> list[str]:
        """Errors and what was written to stderr, by any cell."""
        outputs = self.page.evaluate(OUTPUTS)
        errors = ["\n".join(one["traceback"]) for one in outputs if one["output_type"] == "error"]
        written = [str(one["text"]) for one in outputs if one.get("name") == "stderr"]
        return errors + [text for text in written if not text.startswith(FIRST_TIME)]

    def close(self) -> None:
        """End its kernel: two cores have no room for those that nobody looks at."""
        self.page.evaluate(f"() => {NOTEBOOK}.sessionContext.shutdown()")

    def photograph(self, folder: Path, name: str) -> int:
        """Scroll through it and keep a picture of every screenful with a figure; how many there are.

        Cells out of sight are not rendered, so that its height is known only on the way.
        """
        for old in folder.glob(f"{name}_*.png"):
            old.unlink()
        outer = self.page.locator(OUTER)
        step = outer.evaluate("outer => Math.floor(0.9 * outer.clientHeight)")
        top = count = 0
        while top < outer.evaluate("outer => outer.scrollHeight"):
            outer.evaluate("(outer, top) => outer.scrollTop = top", top)
            self.page.wait_for_timeout(300)
            assert self.page.get_by_text("Error displaying widget").count() == 0
            if self.page.evaluate(HAS_FIGURE):
                outer.screenshot(path=folder / f"{name}_{count:02d}.png")
                count += 1
            top += step
        return count

    def explorers(self) -> list[Explorer]:
        """Those of all cells that make one."""
        sources = enumerate(self.page.evaluate(SOURCES))
        return [Explorer(self.page, at, one.split("(")[0]) for at, one in sources if one.startswith("explore_")]


@dataclass
class Explorer:
    """One explorer; `name` is the function that made it."""

    page: Any
    cell: int
    name: str

    def show(self) -> None:
        """Scroll to it."""
        self.page.evaluate(f"at => {NOTEBOOK}.content.scrollToItem(at, 'start')", self.cell)
        self.root.locator("img.widget-image").wait_for()

    @property
    def root(self) -> Any:
        return self.page.locator(f"[data-windowed-list-index='{self.cell}'] .jp-OutputArea")

    def see(self) -> Seen:
        picture = self.root.locator("img.widget-image").evaluate(FINGERPRINT)
        line = self.root.locator(".widget-html .widget-html-content")
        return Seen(picture, line.first.inner_text() if line.count() else "")

    def changed(self, do: Callable[[], None], *, picture: bool = True) -> Seen:
        """What it shows after something was done: another picture, or (where that may stay) another line."""
        before, shown = self.see(), self.shown()
        do()
        self.until(lambda: self.shown() != shown)
        self.settle()
        self.until(lambda: self.see().picture != before.picture or (not picture and self.see().line != before.line))
        return self.see()

    def until(self, happened: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, f"{self.name}: nothing changes; it says {self.see().line!r}"
            self.page.wait_for_timeout(50)

    def shown(self) -> list[str]:
        """Another one whenever the kernel has sent a picture or a line."""
        return self.root.evaluate("root => [root.querySelector('img.widget-image').src, root.innerText]")

    def settle(self) -> None:
        """Until the kernel has nothing more to do."""
        self.page.wait_for_timeout(200)
        self.page.wait_for_function(IS_READY)

    # --- its controls, named by what is written on them

    def sliders(self) -> list[str]:
        return self.root.locator(".widget-slider .widget-label").all_inner_texts()

    def buttons(self) -> list[str]:
        return self.root.locator("button.widget-button").all_inner_texts()

    def menus(self) -> list[Any]:
        return self.root.locator("select").all()

    def boxes(self) -> list[Any]:
        return self.root.locator("input[type=checkbox]").all()

    def reading(self, slider: str) -> str:
        """The number beside a slider."""
        return self.slider(slider).locator(".widget-readout").inner_text()

    def slider(self, name: str) -> Any:
        named = self.page.get_by_text(name, exact=True)
        return self.root.locator(".widget-slider").filter(has=named)

    def slide(self, name: str) -> None:
        """One step to the right, or to the left from the right end."""
        before = self.reading(name)
        for key in ("ArrowRight", "ArrowLeft"):
            self.slider(name).locator(".noUi-handle").press(key)
            if self.reading(name) != before:
                return
        raise AssertionError(f"{self.name}: the slider {name} does not move")

    def press(self, button: str) -> None:
        self.root.locator("button.widget-button").filter(has_text=button).first.click()

    def fields(self) -> int:
        return self.root.locator(".widget-text input").count()

    def write(self, text: str) -> None:
        field = self.root.locator(".widget-text input")
        field.fill(text)
        field.press("Enter")

    def choose_next(self, menu: Any) -> None:
        """The option after the one that is chosen, round and round."""
        chosen, count = menu.evaluate("menu => [menu.selectedIndex, menu.options.length]")
        menu.select_option(index=(chosen + 1) % count)

    def play(self) -> None:
        """Start it, or pause it."""
        self.root.locator(".widget-play button").first.click()
