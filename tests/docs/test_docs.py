"""The site: built without a network and without a warning, whole, and asking nothing of other hosts."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urljoin, urlsplit

import lxml.html
import nbformat
import pytest
import yaml

import minillm

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
LOADING = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
}
"""Tags that load, and the attribute that says what."""

needs_sphinx = pytest.mark.skipif(
    find_spec("sphinx-mathjax-offline") is None or find_spec("myst_nb") is None,
    reason="the site needs the extra `docs`",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-c", "docs", "-W", "--keep-going", "-q", "-j", "2"]
    nowhere = "http://127.0.0.1:9"
    environment = {**os.environ, "http_proxy": nowhere, "https_proxy": nowhere, "HF_HUB_OFFLINE": "1"}
    shutil.rmtree(ROOT / "docs" / "api", ignore_errors=True)  # pages of modules that are no more
    done = subprocess.run(
        [*command, "-d", folder / "doctrees", ".", folder / "html"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site):
    """Every page, parsed."""
    return {path: lxml.html.parse(str(path)).getroot() for path in site.rglob("*.html") if "_static" not in path.parts}


@needs_sphinx
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_there_with_its_pictures(site, pages, notebook):
    page = pages[site / "notebooks" / f"{notebook.stem}.html"]
    outputs = [output for cell in nbformat.read(notebook, as_version=4).cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]  # also those beside a widget
    assert pictures
    assert len(page.xpath("//div[contains(@class, 'cell_output')]//img")) == len(pictures)
    assert not page.xpath("//script[contains(@type, 'widget') or contains(@src, 'widget')]")


@needs_sphinx
def test_links_lead_somewhere(site, pages):
    @cache
    def anchors(path):
        return {name for element in pages[path].iter() for name in (element.get("id"), element.get("name")) if name}

    broken = set()
    for path, page in pages.items():
        for link in page.xpath("//a/@href"):
            target = urlsplit(urljoin(path.as_uri(), link))
            if target.scheme != "file":
                continue
            file = Path(unquote(target.path))
            file = file / "index.html" if file.is_dir() else file
            if not file.exists() or (
                target.fragment and file in pages and unquote(target.fragment) not in anchors(file)
            ):
                broken.add((path.relative_to(site).as_posix(), link))
    assert not broken
    assert len(pages) > 60


@needs_sphinx
def test_nothing_is_loaded_from_elsewhere(site, pages):
    loaded = []
    for page in pages.values():
        loaded += [
            element.get(LOADING[element.tag]) for element in page.iter(*LOADING) if element.get(LOADING[element.tag])
        ]
        loaded += page.xpath("//link[not(@rel='canonical')]/@href")
        loaded += [url for style in page.xpath("//style/text() | //*/@style") for url in urls(style)]
    loaded += [url for path in site.rglob("*.css") for url in urls(path.read_text(encoding="utf-8"))]
    assert [url for url in loaded if urlsplit(url).scheme not in ("", "data") or url.startswith("//")] == []
    assert loaded


def urls(css: str) -> list[str]:
    return re.findall(r"url\(\s*['\"]?([^'\")]+)", css) + re.findall(r"@import\s+['\"]([^'\"]+)", css)


# --- what a browser makes of it


@needs_sphinx
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_pages_are_read_on_any_screen(site, open_page, screenshots, scheme, width):
    """As files: whoever built it needs no server."""
    page = open_page((site / "index.html").as_uri(), viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.wait_for_url("**/docs/index.html")
    page.screenshot(path=screenshots / f"site_index_{scheme}_{width}.png")
    page.goto((site / "notebooks" / "03_attention.html").as_uri())
    page.wait_for_selector("mjx-container svg")
    page.screenshot(path=screenshots / f"site_notebook_{scheme}_{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nobody scrolls sideways"
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 384) == (scheme == "light")


@needs_sphinx
def test_the_glossary_leads_to_notebooks(site, open_page, screenshots):
    page = open_page((site / "docs" / "glossary.html").as_uri())
    page.screenshot(path=screenshots / "site_glossary.png")
    assert page.locator("dt", has_text="注意力").count() > 0
    page.locator("dd a[href*='03_attention']").first.click()
    page.wait_for_url("**/notebooks/03_attention.html")


@pytest.fixture(scope="module")
def served(site):
    """The site's address on a server: a search reads the pages that it found, which a browser allows no file."""
    handler = partial(SimpleHTTPRequestHandler, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@needs_sphinx
def test_what_is_searched_for_is_found(served, open_page, screenshots):
    page = open_page(f"{served}/docs/index.html")
    page.fill("input[name=q]", "preemption")
    page.press("input[name=q]", "Enter")
    found = page.locator("#search-results li a[href*='11_continuous_batching']").first
    found.wait_for()
    page.wait_for_selector("#search-results p.context")
    page.screenshot(path=screenshots / "site_search.png")
    found.click()
    page.wait_for_url("**/notebooks/11_continuous_batching.html**")


def test_the_map_to_vllm_names_what_is_here():
    text = (ROOT / "docs" / "from_minillm_to_vllm.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:minillm|kernels)/[\w/.]+)`", text))
    assert len(named) > 40
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


def test_every_term_of_the_glossary_has_chinese_and_a_notebook():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    entries = re.findall(r"^(\S.*)\n(\S.*)\n  (.+)$", text, flags=re.MULTILINE)
    assert len(entries) >= 60
    for english, chinese, told in entries:
        assert english.isascii()
        assert re.search(r"[\u4e00-\u9fff]", chinese)
        (link,) = re.findall(r"\]\(\.\./(notebooks/[\w.]+)\)", told)
        source = ROOT / "notebooks" / "src" / f"{Path(link).stem}.py"
        assert words(re.sub(r"\(.*\)|,.*", "", english)) in words(source.read_text(encoding="utf-8")), english


def words(text):
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def test_pictures_are_what_their_script_draws(tmp_path):
    draw = runpy.run_path(str(ROOT / "docs" / "draw.py"))
    for name, picture in draw["pictures"]().items():
        assert (ROOT / "docs" / "figures" / name).read_text(encoding="utf-8") == picture


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["version"] == minillm.__version__
    assert citation["license"] == "Apache-2.0"
