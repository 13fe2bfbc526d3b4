"""A real browser, for whatever has a page; and the folder where what it showed is kept."""

from __future__ import annotations

import contextlib
import html
import shutil
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest

SCREENSHOTS = Path(__file__).resolve().parents[1] / "screenshots"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def browser():
    """A module's own: while playwright's event loop runs, no test of its process can start another."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip(f"there is no browser on this machine: none of {', '.join(CHROMIUM)} is on the PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens an address; see `opening_pages`."""
    with opening_pages(browser) as open_page:
        yield open_page


@contextlib.contextmanager
def opening_pages(browser):
    """Opens addresses; at the end nothing has been complained about and no other host was asked (nor reached)."""
    contexts, complaints, foreign = [], [], []

    def refuse(route):
        foreign.append(route.request.url)
        route.abort()

    def open_page(url, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        context.route(lambda asked: is_foreign(asked, url), refuse)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        return page

    open_page.complaints = complaints
    yield open_page
    for context in contexts:
        context.close()
    assert foreign == []
    assert complaints == []


def is_foreign(asked: str, url: str) -> bool:
    """Whether it is asked of another host than the page's own."""
    scheme, host, *_ = urlsplit(asked)
    return scheme not in ("data", "blob") and (scheme, host) != urlsplit(url)[:2]


@pytest.fixture(scope="module")
def screenshots():
    """A folder for pictures of pages; what is in it is listed in its index.html when a module's tests are done."""
    SCREENSHOTS.mkdir(exist_ok=True)
    yield SCREENSHOTS
    figures = [
        f"<figure><figcaption>{html.escape(path.stem)}</figcaption><img loading=lazy src='{path.name}'></figure>"
        for path in sorted(SCREENSHOTS.glob("*.png"))
    ]
    style = "body{font-family:sans-serif;margin:2em}img{max-width:100%;border:1px solid #aaa}"
    page = f"<!doctype html><meta charset=utf-8><title>Screenshots</title><style>{style}</style>{''.join(figures)}\n"
    (SCREENSHOTS / "index.html").write_text(page, encoding="utf-8")
