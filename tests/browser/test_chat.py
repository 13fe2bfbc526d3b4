"""The chat page of `minillm serve tiny`, started as it is typed; tests/server/test_page.py has its every detail."""

from __future__ import annotations

import os
import sys

import pytest

from tests.browser.lab import ROOT, free_port, started

STORY = "Tell me a story about Mia and a red kite."


@pytest.fixture(scope="module")
def url(browser, tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("serve"), free_port()
    command = [sys.executable, "-m", "minillm", "serve", "tiny", "--port", str(port)]
    with started(
        command, {**os.environ, "PYTHONPATH": str(ROOT)}, folder / "serve.log", f"http://127.0.0.1:{port}/health"
    ):
        yield f"http://127.0.0.1:{port}/"


@pytest.mark.browser_all
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_answers(open_page, url, screenshots, scheme, width):
    page = open_page(url, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.fill("#text", STORY)
    page.press("#text", "Enter")
    page.wait_for_selector(".about", timeout=120_000)
    assert "Mia" in page.locator(".answer").last.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=screenshots / f"chat_{scheme}_{width}.png")
