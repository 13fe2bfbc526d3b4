"""What goes wrong: clients that leave, keys, too many requests, signals, an engine that fails."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import psutil
import pytest

from minillm import LLM
from minillm.errors import ConfigError, MissingExtraError
from minillm.server.service import ServerConfig
from tests.server.conftest import SMALL, running
from tests.server.raw import request

LONG = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def slow(llm, monkeypatch):
    """The engine takes its time for a step, so that there is a middle to leave in."""
    step = llm.engine.step

    def slowly():
        time.sleep(0.01)
        return step()

    monkeypatch.setattr(llm.engine, "step", slowly)
    return llm


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(slow, stream):
    asked = request("/v1/completions", json.dumps(LONG | {"stream": stream}).encode())
    with running(slow) as server:
        where = urlsplit(server.url)
        with socket.create_connection((where.hostname, where.port)) as connection:
            connection.sendall(asked)
            assert server.until(lambda: server.num_held > 0)
        steps = slow.engine.counts.num_steps
        assert server.until(lambda: server.num_held == 0, 1.0)
        assert slow.engine.counts.num_steps <= steps + 3  # the word of it must travel
        assert server.until(lambda: server.service.engine.num_unfinished == 0)
        assert 'finished_reason="abort"' in server.http.get("/metrics").text


def test_keys(llm):
    with running(llm, api_keys=["first", "second"]) as server:
        for key in ("first", "second"):
            server.key = key
            assert server.openai.models.list().data
        for key in ("third", "firs", "ключ".encode().decode("latin-1")):
            server.key = key
            answer = server.http.get("/v1/models", headers={"authorization": f"Bearer {key}".encode("latin-1")})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        schema = server.http.get("/openapi.json").json()
        assert schema["components"]["securitySchemes"] == {"api_key": {"type": "http", "scheme": "bearer"}}
        assert schema["paths"]["/tokenize"]["post"]["security"] == [{"api_key": []}]
        assert "security" not in schema["paths"]["/health"]["get"]
        server.key = "third"
        with pytest.raises(openai.AuthenticationError):
            server.openai.completions.create(**{"model": "tiny", "prompt": "a"})
        assert server.http.post("/tokenize", json={"prompt": "a"}).status_code == 401
        assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize("keys", [[""], ["first", " \t"]])
def test_a_blank_key_opens_no_server(keys):
    with pytest.raises(ConfigError, match="blank"):
        ServerConfig("tiny", ["tiny"], api_keys=keys)


def test_too_many_requests_are_told_when_to_come_again(slow):
    with running(slow, max_requests=2) as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"stream": True, "n": 2}):
            answer = server.http.post("/v1/completions", json=LONG)
            assert answer.status_code == 429
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert int(answer.headers["retry-after"]) >= 1
        assert server.until(lambda: server.num_held == 0)
        assert server.http.post("/v1/completions", json=LONG | {"max_tokens": 2}).status_code == 200


def test_draining_refuses_what_is_new_and_ends_what_runs(slow):
    with running(slow) as server:
        http = server.http
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=LONG | {"stream": True, "max_tokens": 60}
        ) as told:
            lines = told.iter_lines()
            next(lines)
            server.server.handle_exit(signal.SIGTERM, None)
            answer = http.post("/v1/completions", json=LONG)
            assert answer.status_code == 503
            assert "retry-after" in answer.headers
            assert http.get("/health").status_code == 503
            assert list(lines)[-2] == "data: [DONE]"
        assert server.until(lambda: not server.thread.is_alive())
        assert server.server.exit_status == 0


def test_draining_is_told_before_a_full_queue(slow):
    with running(slow, max_requests=2) as server:
        asked = LONG | {"stream": True, "n": 2, "max_tokens": 60}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=asked) as told:
            lines = told.iter_lines()
            next(lines)
            http = server.http
            assert http.post("/v1/completions", json=LONG).status_code == 429
            server.server.handle_exit(signal.SIGTERM, None)
            assert http.post("/v1/completions", json=LONG).status_code == 503
            assert list(lines)[-2] == "data: [DONE]"
        assert server.until(lambda: not server.thread.is_alive())


def test_draining_has_an_end(slow):
    with (
        running(slow, drain_seconds=0.2) as server,
        httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"stream": True}) as told,
    ):
        lines = told.iter_lines()
        next(lines)
        server.server.handle_exit(signal.SIGTERM, None)
        rest = [line for line in lines if line]
        assert "service_unavailable_error" in rest[-2]
        assert rest[-1] == "data: [DONE]"


def test_a_failing_engine_is_told_to_everybody():
    with LLM("tiny", **SMALL) as llm, running(llm) as server:
        compute = llm.engine.runner.compute

        def fail(step):
            if llm.engine.counts.num_steps > 5:
                raise RuntimeError("the device is gone")
            return compute(step)

        llm.engine.runner.compute = fail
        answers = []

        def ask() -> None:
            answers.append(httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=20))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [500] * 4
        assert "the device is gone" in answers[0].json()["error"]["message"]
        assert server.until(lambda: server.server.exit_status == 1)


def test_one_requests_failure_is_its_own(llm, monkeypatch):
    add = llm.engine.add_request

    def fail(request_id, ids, params, **others):
        if params.seed == 13:
            raise RuntimeError("nobody thought of this")
        add(request_id, ids, params, **others)

    monkeypatch.setattr(llm.engine, "add_request", fail)
    with running(llm) as server:
        asked = {"prompt": "a", "max_tokens": 2}
        answer = server.http.post("/v1/completions", json=asked | {"seed": 13})
        assert answer.status_code == 500
        assert "nobody thought" not in answer.text
        assert server.http.post("/v1/completions", json=asked).status_code == 200
        assert server.http.get("/health").status_code == 200


def test_a_model_without_a_template_answers_no_chats(llm, monkeypatch):
    monkeypatch.setattr(llm.get_tokenizer(), "chat_template", None)
    asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    with running(llm) as server:
        answer = server.http.post("/v1/chat/completions", json=asked)
        assert answer.status_code == 400
        assert "no chat template" in answer.json()["error"]["message"]
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with running(llm, chat_template=template) as server:
        told = server.http.post("/tokenize", json={"messages": asked["messages"]}).json()["tokens"]
        assert told == llm.get_tokenizer()("Hello", add_special_tokens=False).input_ids


# --- the command


@contextlib.contextmanager
def started(log: Path, *options: str, program: tuple[str, ...] = ("-m", "minillm")) -> Iterator[tuple[Any, str]]:
    """The command in a process of its own, once it answers, and its address; it writes to the log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *program, "serve", "tiny", "--port", str(port), "--device", "cpu", *options]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(httpx.HTTPError):
                    httpx.get(f"{url}/health").raise_for_status()
                    break
                time.sleep(0.1)
            yield process, url
        finally:
            process.kill()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_the_command_serves_and_drains(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[-1]['content'] }}")
    with started(
        tmp_path / "log",
        "--served-model-name",
        "mine",
        "--api-key",
        "k",
        "--chat-template",
        str(template),
        "--enforce-eager",
    ) as (process, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="k") as client:
            assert [model.id for model in client.models.list()] == ["mine"]
            asked = {"model": "mine", "messages": [{"role": "user", "content": "Once"}], "max_tokens": 300}
            stream = client.chat.completions.create(stream=True, extra_body={"ignore_eos": True}, **asked)
            next(iter(stream))
            process.send_signal(signal.SIGTERM)
            assert list(stream)[-1].choices[0].finish_reason == "length"
        assert process.wait(timeout=20) == 0


# --- signals, under load

STREAM = LONG | {"stream": True}


class Clients:
    """Threads that each read a stream to its end; `ends` are the last two events, and the pieces, of each."""

    def __init__(self, url: str, count: int, **asked: object) -> None:
        self.ends: list[tuple[str, str, int]] = []
        self.errors: list[Exception] = []
        self._begun = threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._read, args=(url, STREAM | asked)) for _ in range(count)]
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            assert self._begun.acquire(timeout=60)

    def _read(self, url: str, asked: dict[str, object]) -> None:
        lines: list[str] = []
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as told:
                for line in filter(None, told.iter_lines()):
                    if not lines:
                        self._begun.release()
                    lines.append(line)
            self.ends.append((lines[-2], lines[-1], len(lines)))
        except httpx.HTTPError as error:
            self.errors.append(error)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(timeout=90)
            assert not thread.is_alive()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_sigterm_under_load_lets_every_stream_end(tmp_path):
    with started(tmp_path / "log", "--enforce-eager", "--drain-seconds", "120") as (process, url):
        clients = Clients(url, 24, n=2, max_tokens=100)
        process.send_signal(signal.SIGTERM)
        refusals = 0
        while process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):  # it may have ended meanwhile
                answer = httpx.post(f"{url}/v1/completions", json=LONG, timeout=10)
                if answer.status_code == 503:
                    assert int(answer.headers["retry-after"]) >= 1
                    refusals += 1
                else:
                    assert not refusals, "once it drains it takes nothing"
            time.sleep(0.1)
        clients.join()
        assert refusals
        assert not clients.errors
        assert len(clients.ends) == 24
        for last, done, _ in clients.ends:
            assert '"finish_reason":"length"' in last
            assert done == "data: [DONE]"
        assert process.wait(timeout=20) == 0


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_draining_under_load_has_an_end(tmp_path):
    with started(tmp_path / "log", "--enforce-eager", "--drain-seconds", "0.3") as (process, url):
        clients = Clients(url, 24, n=8)  # far more than 0.3 seconds' work
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        clients.join()
        assert not clients.errors
        assert len(clients.ends) == 24
        assert all(done == "data: [DONE]" for _, done, _ in clients.ends)
        assert any("service_unavailable_error" in last for last, _, _ in clients.ends)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_the_second_sigterm_ends_it_at_once(tmp_path):
    with started(tmp_path / "log", "--enforce-eager", "--drain-seconds", "600") as (process, url):
        clients = Clients(url, 24, n=8)
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while httpx.get(f"{url}/health").status_code != 503 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 1
        clients.join()
        assert not clients.errors
        assert all("the server was stopped" in last for last, _, _ in clients.ends)
        assert "Exception in ASGI application" not in (tmp_path / "log").read_text()


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("busy", [True, False])
def test_a_rank_that_dies_ends_every_request_and_the_server(tmp_path, busy):
    with started(tmp_path / "log", "-tp", "2", "--max-model-len", "512") as (process, url):
        (rank,) = [child for child in psutil.Process(process.pid).children() if "rank" in " ".join(child.cmdline())]
        clients = Clients(url, 24 if busy else 0, n=8)
        rank.kill()
        assert process.wait(timeout=30) == 1
        clients.join()
        assert not clients.errors
        assert all("rank 1 was ended by signal 9" in last for last, _, _ in clients.ends)
        assert len(clients.ends) == (24 if busy else 0)
        assert not rank.is_running()


FAILING = """
import sys
import time
from minillm.cli import main
from minillm.engine.runner import ModelRunner

compute, steps = ModelRunner.compute, []

def fail(self, step):
    time.sleep(0.01)  # all eight are there before the first one's 400 tokens
    if len(step.scheduled) == 8:
        steps.append(step)
    if len(steps) > 20:
        raise RuntimeError("the device is gone")
    return compute(self, step)

ModelRunner.compute = fail
sys.exit(main())
"""


def test_the_process_of_a_failed_engine_ends_with_status_one(tmp_path):
    with started(tmp_path / "log", "--enforce-eager", program=("-c", FAILING)) as (process, url):
        clients = Clients(url, 8)
        assert process.wait(timeout=30) == 1
        clients.join()
        assert not clients.errors
        assert len(clients.ends) == 8
        for last, done, _ in clients.ends:
            assert "the device is gone" in last
            assert done == "data: [DONE]"


def test_what_the_command_refuses(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for options, told in (
            (["--port", str(taken.getsockname()[1])], "cannot be listened on"),
            (["--chat-template", str(tmp_path / "none")], "no template"),
        ):
            command = [sys.executable, "-m", "minillm", "serve", "tiny", "--device", "cpu", "--enforce-eager", *options]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 1
            assert told in done.stderr


def test_without_the_extra_it_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("minillm.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(MissingExtraError, match="serve"):
        import minillm.server  # noqa: F401
