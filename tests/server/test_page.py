"""The page at `/`: what the server gives, and what a browser makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time

import httpx
import pytest

from minillm import LLM, SamplingParams
from minillm.cache.block_pool import BlockPool
from minillm.server.page import FILES, FOLDER, MOST_WAITING, SECONDS_BETWEEN_LOOKS, runs, snapshot
from minillm.server.protocol import LiveSnapshot
from tests.server.conftest import SMALL, running

MINE = "rgb(0, 114, 178)"
STORY = "Tell me a story about Mia and a red kite."
CHAT = "**/v1/chat/completions"


pytestmark = pytest.mark.usefixtures("nothing_is_left_behind")


@pytest.fixture
def slow(llm, monkeypatch):
    """Steps that take long enough to be watched."""
    compute = llm.engine.runner.compute

    def computed(step):
        time.sleep(0.03)
        return compute(step)

    monkeypatch.setattr(llm.engine.runner, "compute", computed)


def in_engine(server, work):
    """What a function of the engine returns, between two steps."""
    return asyncio.run_coroutine_threadsafe(server.service.engine.ask(work), server.service.engine._loop).result(20)


@contextlib.contextmanager
def answers(server, count, **options):
    """So many answers being written, until the block ends."""
    stop = threading.Event()

    def read(at):
        body = {"prompt": f"Once upon a time {at}", "max_tokens": 400, "ignore_eos": True, "stream": True, **options}
        with (
            httpx.Client(base_url=server.url, timeout=30) as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            for _ in response.iter_lines():
                if stop.is_set():
                    return

    threads = [threading.Thread(target=read, args=(at,)) for at in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)


def is_still(looks):
    """Whether nobody looks for the time of three looks."""
    seen = len(looks)
    time.sleep(3 * SECONDS_BETWEEN_LOOKS)
    return len(looks) == seen


def blocks_of(numbers):
    return [first + at for first, count in zip(numbers[::2], numbers[1::2], strict=True) for at in range(count)]


# --- what the server gives


@pytest.mark.parametrize("path", FILES)
def test_the_files_come_with_their_types_and_a_strict_policy(server, path):
    found = server.http.get(path)
    assert found.status_code == 200
    assert found.headers["content-type"] == f"{FILES[path][1]}; charset=utf-8"
    assert found.headers["x-content-type-options"] == "nosniff"
    rules = dict(rule.strip().split(" ", 1) for rule in found.headers["content-security-policy"].split(";"))
    assert rules["default-src"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"


def test_the_files_name_no_other_place():
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {name for name, _ in FILES.values()}
    for name in names:
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert not re.search(r"//\w|@import|url\(|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_the_settings_are_the_servers(server, llm):
    found = server.http.get("/page/settings").json()
    assert found == {
        "model": "tiny",
        "max_model_len": llm.max_model_len,
        "chat_refusal": None,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
    }


def test_the_pages_own_routes_are_not_part_of_the_api(server):
    paths = server.http.get("/openapi.json").json()["paths"]
    assert not {"/", "/page.js", "/page/settings", "/live"} & paths.keys()


def test_runs_are_blocks_written_shorter():
    assert runs([7, 8, 9, 2, 4, 3, 0]) == [7, 3, 2, 1, 4, 1, 3, 1, 0, 1]
    assert runs([]) == []


def test_a_snapshot_is_what_the_scheduler_knows(server):
    with answers(server, 22):  # 16 have seats
        assert server.until(lambda: len(server.llm.engine.scheduler.waiting) == 6)
        seen, names, tables, ref_counts, hashes, num_waiting = in_engine(
            server,
            lambda engine: (
                snapshot(engine),
                [request.name for request in engine.scheduler.running],
                [list(request.table.blocks) for request in engine.scheduler.running],
                list(engine.scheduler.pool.ref_counts),
                list(engine.scheduler.pool.hashes),
                len(engine.scheduler.waiting),
            ),
        )
    assert [request.name for request in seen.running] == names
    assert [request.blocks for request in seen.running] == tables
    held = [block for request in seen.running for block in request.blocks]
    assert [held.count(block) for block in range(seen.num_blocks)] == ref_counts
    assert seen.num_held == len(set(held)) == sum(count > 0 for count in ref_counts)
    assert blocks_of(seen.found_again) == [block for block, content in enumerate(hashes) if content is not None]
    assert len(seen.waiting) == seen.num_waiting == num_waiting
    for request in [*seen.running, *seen.waiting]:
        assert 0 <= request.computed <= request.prompt + request.written
        assert request.written <= request.max_tokens
        assert -(-request.computed // seen.block_size) <= len(request.blocks)


def test_a_long_queue_is_told_of_by_its_beginning(server):
    with answers(server, 1, n=100):  # a prompt's answers wait for themselves
        assert server.until(lambda: len(server.llm.engine.scheduler.waiting) > MOST_WAITING)
        seen = in_engine(server, snapshot)
    assert len(seen.waiting) == MOST_WAITING < seen.num_waiting


def test_the_live_view_streams_and_nothing_is_held_after(server):
    with server.http.stream("GET", "/live") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        seen = (LiveSnapshot.model_validate_json(event) for event in events)
        before = next(seen)
        with answers(server, 3):
            during = next(one for one in seen if len(one.running) == 3 and all(r.written for r in one.running))
        after = next(one for one in seen if not one.running)
    assert before.num_held == after.num_held == 0
    assert during.num_held > 0
    assert before.generation_tokens < during.generation_tokens <= after.generation_tokens
    assert before.time < during.time < after.time


def test_all_who_watch_share_one_look_and_nobody_looks_for_nobody(server, monkeypatch):
    looks = []
    monkeypatch.setattr("minillm.server.page.snapshot", lambda engine: looks.append(1) or snapshot(engine))

    def read(count):
        with httpx.Client(base_url=server.url) as client, client.stream("GET", "/live") as response:
            lines = (line for line in response.iter_lines() if line)
            for _ in range(count):
                next(lines)

    threads = [threading.Thread(target=read, args=(4,)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert 3 <= len(looks) < 4 * 5, "the first may be one that was made for somebody before"
    assert server.until(lambda: is_still(looks))


def test_a_large_pool_is_a_short_message(server, llm, monkeypatch):
    monkeypatch.setattr(llm.engine.scheduler, "pool", BlockPool(50_000, 16))
    llm.engine.scheduler.pool.hashes[100:40_000] = [b"known"] * 39_900
    seen = in_engine(server, snapshot)
    monkeypatch.undo()
    assert seen.num_blocks == 50_000
    assert seen.found_again == [100, 39_900]
    assert len(seen.model_dump_json()) < 1000


def test_with_a_key_only_the_files_are_open(llm):
    with running(llm, api_keys=["secret"]) as server:
        for path in FILES:
            assert server.http.get(path).status_code == 200
        for path in ("/live", "/page/settings", "/page", "/page.html"):
            assert server.http.get(path).status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert server.http.get("/page/settings", headers=headers).status_code == 200
        with server.http.stream("GET", "/live", headers=headers) as response:
            assert response.status_code == 200


def test_a_stream_tells_its_id_before_its_first_piece(server, slow):
    with answers(server, 16):
        assert server.until(lambda: len(server.llm.engine.scheduler.running) == 16)
        body = {"prompt": "Long ago", "stream": True, "max_tokens": 5}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            name = response.headers["x-request-id"]
            (waiting,) = in_engine(server, snapshot).waiting
            assert waiting.name.startswith(name)
            assert waiting.blocks == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_engine_ends_the_live_view():
    with LLM("tiny", **SMALL) as llm, running(llm) as server, server.http.stream("GET", "/live") as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)

        def fail(step):
            raise RuntimeError("the device is gone")

        llm.engine.runner.compute = fail
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "Long ago"})
        error, end = list(lines)[-2:]
        assert (
            "the engine has failed: the device is gone" in json.loads(error.removeprefix("data: "))["error"]["message"]
        )
        assert end == "data: [DONE]"


def test_draining_ends_the_live_view(llm):
    with running(llm) as server, server.http.stream("GET", "/live") as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        server.service.is_draining = True
        assert list(lines)[-1] == "data: [DONE]"


# --- what a browser makes of it


@pytest.fixture
def page(server, open_page):
    page = open_page(server.url)
    wait_until(page, "document.querySelector('#held').textContent.includes('held')")
    return page


def say(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")


def wait_until(page, expression):
    """Until this is true in the page, whose policy forbids playwright's own way (it evaluates texts)."""
    deadline = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(10)


def wait_for_the_end(page):
    page.wait_for_selector("#send:visible")


def last_answer(page):
    return page.locator(".answer").last.inner_text()


def num_pixels(page, colour):
    """Pixels of the grid in this colour."""
    return page.evaluate(
        """colour => {
            const canvas = document.querySelector("#pool");
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            let found = 0;
            for (let at = 0; at < data.length; at += 4)
                found += colour === `rgb(${data[at]}, ${data[at + 1]}, ${data[at + 2]})`;
            return found;
        }""",
        colour,
    )


def fulfil(page, pieces):
    """Let the server's answers to chats be these."""
    chunks = [
        {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
        for piece in pieces
    ]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route(CHAT, lambda route: route.fulfill(content_type="text/event-stream", body=body))


def test_an_answer_streams_in_and_is_llms(page, server, reference, slow):
    page.fill("#seed", "3")
    page.locator("#max_tokens").fill("6")
    say(page, STORY)
    wait_until(page, "document.querySelector('.answer').textContent.length > 10")
    early = last_answer(page)
    wait_for_the_end(page)
    expected = reference.chat(
        [{"role": "user", "content": STORY}],
        SamplingParams(temperature=1.0, seed=3, max_tokens=64),
        use_tqdm=False,
    )[0].outputs[0]
    assert last_answer(page) == expected.text.strip()
    assert expected.text.startswith(early)
    assert len(early) < len(expected.text)
    assert f"{len(expected.token_ids)} tokens written" in page.locator(".about").inner_text()


def test_the_grid_shows_what_is_held_while_it_is(page, server, slow):
    page.emulate_media(color_scheme="light")
    assert num_pixels(page, MINE) == 0
    say(page, STORY)
    page.wait_for_selector("#rows button:has-text('yours')")
    wait_until(page, "document.querySelector('#pool').ariaLabel.match(/^[1-9]/)")
    assert num_pixels(page, MINE) > 0
    page.click("#rows button")
    assert page.get_attribute("#rows button", "aria-pressed") == "true"
    assert re.match(r"Block table of yours: \d", page.inner_text("#table-of"))
    page.press("#text", "Escape")
    wait_until(page, "document.querySelector('#pool').ariaLabel.startsWith('0 of')")
    assert num_pixels(page, MINE) == 0
    assert page.locator("#rows tr").count() == 0
    assert page.inner_text("#rest") == "Nothing runs, nothing waits."


def test_blocks_that_several_requests_hold_are_told_apart(page, server, slow):
    page.emulate_media(color_scheme="light")
    with answers(server, 1, n=3, prompt="One sunny morning Mia went to the lake with Tom, and they took the red kite."):
        wait_until(page, "document.querySelectorAll('#rows tr').length === 3")
        page.wait_for_timeout(300)
        assert num_pixels(page, "rgb(28, 31, 35)") > 0
        assert num_pixels(page, "rgb(230, 159, 0)") > 0
    wait_until(page, "document.querySelectorAll('#rows tr').length === 0")
    assert num_pixels(page, "rgb(28, 31, 35)") == 0
    assert num_pixels(page, "rgb(170, 176, 183)") > 0  # free, and kept


def test_stop_frees_the_blocks_and_the_conversation_goes_on(page, server, slow):
    say(page, STORY)
    wait_until(page, "document.querySelector('.answer').textContent.length > 10")
    assert server.num_held > 0
    page.click("#stop")
    assert server.until(lambda: server.num_held == 0, seconds=2)
    wait_for_the_end(page)
    assert "stopped" in page.locator(".about").inner_text()
    stopped = last_answer(page)
    with page.expect_request(CHAT) as sent:
        say(page, "Go on.")
    messages = sent.value.post_data_json["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"].strip() == stopped
    page.click("#new")
    assert page.locator(".turn").count() == 0
    wait_for_the_end(page)
    fulfil(page, ["Hello."])
    with page.expect_request(CHAT) as sent:
        say(page, "Anew.")
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "Anew."}]
    wait_for_the_end(page)


def test_the_controls_are_what_is_sent(page):
    fulfil(page, ["Yes."])
    with page.expect_request(CHAT) as sent:
        say(page, "Hello")
    defaults = {"temperature": 1, "top_p": 1, "top_k": 0}
    assert sent.value.post_data_json.items() >= defaults.items()
    assert not {"max_tokens", "seed"} & sent.value.post_data_json.keys()
    for name, value in {"temperature": "0.7", "top_p": "0.9", "top_k": "40", "max_tokens": "5"}.items():
        page.locator(f"#{name}").fill(value)
    page.fill("#seed", "11")
    page.fill("#system", "Be kind.")
    page.press("#top_k", "ArrowRight")
    assert page.inner_text("label[for=max_tokens] output") == "32"
    with page.expect_request(CHAT) as sent:
        say(page, "Again")
    body = sent.value.post_data_json
    wanted = {"temperature": 0.7, "top_p": 0.9, "top_k": 41, "max_tokens": 32, "seed": 11, "stream": True}
    assert body.items() >= wanted.items()
    assert body["messages"][0] == {"role": "system", "content": "Be kind."}
    wait_for_the_end(page)


def test_a_request_that_waits_says_so(page, server, slow):
    with answers(server, 16):
        assert server.until(lambda: len(server.llm.engine.scheduler.running) == 16)
        say(page, STORY)
        wait_until(page, "document.querySelector('#log.waits') !== null")
        assert re.match(r"yours\s.*waits", page.inner_text("#rows tr:first-child"), re.DOTALL)
        page.press("#text", "Escape")
    wait_until(page, "document.querySelector('#log.waits') === null")


def test_html_is_shown_as_text(page):
    answer = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script><b>bold</b> &amp;"
    fulfil(page, [answer[:20], answer[20:]])
    say(page, "<i>Hello</i>")
    wait_for_the_end(page)
    assert last_answer(page) == answer
    assert page.locator(".user").inner_text() == "<i>Hello</i>"
    assert page.locator("#log img, #log script, #log b, #log i").count() == 0
    assert page.title() == "minillm"


@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        (400, "top_p: it is too small", "The server refuses this request: top_p: it is too small."),
        (
            429,
            "8 answers are being waited for",
            "The server is busy: 8 answers are being waited for. Try again in 1 s.",
        ),
        (503, "no new requests", "The server is shutting down: no new requests. Try again in 1 s."),
    ],
)
def test_errors_are_sentences_and_the_text_is_not_lost(page, open_page, status, message, expected):
    headers = {"Retry-After": "1"} if status != 400 else {}
    body = json.dumps({"error": {"message": message, "type": "x"}})
    page.route(CHAT, lambda route: route.fulfill(status=status, body=body, headers=headers))
    say(page, "Hello")
    page.wait_for_selector("[role=alert]")
    assert page.inner_text("[role=alert]") == expected
    assert page.input_value("#text") == "Hello"
    (complaint,) = open_page.complaints  # the browser's own
    assert f"status of {status}" in complaint
    open_page.complaints.clear()


def test_a_conversation_that_is_too_long_is_refused_by_the_real_server(page, open_page):
    say(page, "Mia " * 600)
    page.wait_for_selector("[role=alert]")
    assert "maximum context length is 512 tokens" in page.inner_text("[role=alert]")
    alert, log = (page.locator(name).bounding_box() for name in ("[role=alert]", "#log"))
    assert log["y"] <= alert["y"] < alert["y"] + alert["height"] <= log["y"] + log["height"]
    assert len(open_page.complaints) == 1
    open_page.complaints.clear()


def test_the_key_is_asked_for_and_sent(llm, open_page):
    with running(llm, api_keys=["secret"]) as server:
        page = open_page(server.url)
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.wait_for_selector("#key-wrong:visible")
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        wait_until(page, "document.querySelector('#held').textContent.includes('held')")
        page.locator("#max_tokens").fill("3")
        say(page, STORY)
        page.wait_for_selector(".about")
        assert last_answer(page)
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.reload()
        wait_until(page, "document.querySelector('#held').textContent.includes('held')")
        page.context.close()
    assert all("401" in complaint for complaint in open_page.complaints)
    open_page.complaints.clear()


def test_a_model_without_a_template_continues_texts(llm, reference, open_page, monkeypatch):
    monkeypatch.setattr(llm.get_tokenizer(), "chat_template", None)
    with running(llm) as server:
        page = open_page(server.url)
        page.wait_for_selector("#notice:visible")
        assert "this model has no chat template" in page.inner_text("#notice")
        page.locator("#temperature").fill("0")
        page.locator("#max_tokens").fill("4")
        say(page, "Once upon a time")
        page.wait_for_selector(".about")
        expected = reference.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
        assert last_answer(page) == "Once upon a time" + expected[0].outputs[0].text
        page.context.close()


def test_a_page_that_nobody_sees_does_not_watch(page, server, monkeypatch):
    looks = []
    monkeypatch.setattr("minillm.server.page.snapshot", lambda engine: looks.append(1) or snapshot(engine))
    assert server.until(lambda: looks)
    page.evaluate(
        """() => {
            Object.defineProperty(document, "hidden", { value: true, configurable: true });
            document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
    assert server.until(lambda: is_still(looks))


def test_it_can_be_used_by_keyboard_and_on_a_phone(server, open_page):
    page = open_page(server.url, viewport={"width": 390, "height": 844}, color_scheme="dark")
    wait_until(page, "document.querySelector('#held').textContent.includes('held')")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("Hello,")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Mia")
    assert page.input_value("#text") == "Hello,\nMia"
    reached = set()
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert reached >= {"send", "temperature", "top_p", "top_k", "max_tokens", "seed", "system", "queue"}
