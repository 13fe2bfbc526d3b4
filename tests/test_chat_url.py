"""minillm chat --url: the command in a process of its own, against a server in this one."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from minillm import LLM, cli, client
from minillm.errors import ServerError
from tests.server.conftest import SMALL, forget_proxies, running

STORY = "Tell me a story about Mia and a red kite."


@pytest.fixture(scope="module")
def server():
    with LLM("tiny", **SMALL) as llm, running(llm, api_keys=["secret"], served_names=["tiny", "small"]) as server:
        server.key = "secret"
        yield server


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    forget_proxies(monkeypatch)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("COLUMNS", "200")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-u", "-m", "minillm", "chat", "--temperature", "0", *map(str, arguments)]


def chat(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60, check=False, **options)


def says(server, *messages: str, model: str = "tiny", **params) -> str:
    """What OpenAI's client gets for a conversation that the user begins."""
    roles = ("user", "assistant")
    talk = [{"role": roles[index % 2], "content": text} for index, text in enumerate(messages)]
    found = server.openai.chat.completions.create(model=model, messages=talk, **{"temperature": 0} | params)
    return found.choices[0].message.content


def test_a_quick_answer_and_its_counts(server):
    done = chat("--url", server.url, "-q", STORY, "--stats")
    assert done.returncode == 0, done.stderr
    assert done.stdout == says(server, STORY) + "\n"
    usage = server.openai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": STORY}], temperature=0
    ).usage
    cells = [cell.strip() for cell in done.stderr.splitlines()[-2].split("│")]
    assert cells[1:4] == ["tiny", str(usage.prompt_tokens), str(usage.completion_tokens)]
    assert cells[4].endswith(" s")
    assert float(cells[5]) > 0


def test_the_sampling_options_are_passed_on(server):
    given = ("--temperature", 0.9, "--top-p", 0.95, "--top-k", 30, "--min-p", 0.01, "--seed", 7, "--max-tokens", 25)
    done = chat("--url", f"{server.url}/v1/", "-m", "small", "-q", STORY, *given)
    extra = {"top_k": 30, "min_p": 0.01}
    params = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 25, "extra_body": extra}
    assert (
        done.stdout == says(server, STORY, model="small", **params) + "\n" != says(server, STORY, max_tokens=25) + "\n"
    )


PIECE = b'data: {"choices": [{"delta": {"content": "Once"}}]}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        ((), {}),
        (
            ("--temperature", "0", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--seed", "0"),
            {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 0},
        ),
    ],
)
def test_what_is_not_given_goes_unsaid_and_all_that_is_given_is_said(monkeypatch, capsys, typed, sent):
    asked = []
    with saying(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + PIECE, asked) as url:
        monkeypatch.setattr("sys.argv", ["minillm", "chat", "--url", url, "-m", "m", "-q", STORY, *typed])
        assert cli.run(cli.app) == 0
    assert capsys.readouterr().out == "Once\n"
    talk = [{"role": "user", "content": STORY}]
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    assert [json.loads(body) for body in asked] == [{"model": "m", "messages": talk} | stream | sent]


def test_the_likeliest_of_all_tokens_can_be_asked_for(server):
    neutral = ("--top-k", 0, "--top-p", 1, "--min-p", 0)
    assert chat("--url", server.url, "-q", STORY, *neutral).stdout == says(server, STORY) + "\n"


def test_it_remembers_the_conversation_and_ends_at_exit(server):
    done = chat("--url", server.url, "--max-tokens", 12, input=f"{STORY}\n\nAnd then?\n/exit\nnever read\n")
    assert done.returncode == 0, done.stderr
    first = says(server, STORY, max_tokens=12)
    second = says(server, STORY, first, "And then?", max_tokens=12)
    assert done.stdout == f"> {first}\n> > {second}\n> "
    assert "tiny" in done.stderr


def test_a_system_prompt_is_sent_first(server):
    talk = [{"role": "system", "content": "Mia had a kite."}, {"role": "user", "content": STORY}]
    found = server.openai.chat.completions.create(model="tiny", messages=talk, temperature=0, max_tokens=9)
    done = chat("--url", server.url, "-q", STORY, "--system-prompt", "Mia had a kite.", "--max-tokens", 9)
    assert done.stdout == found.choices[0].message.content + "\n"


def test_ctrl_c_stops_the_answer_here_and_there_and_not_the_session(server, monkeypatch):
    step = server.llm.engine.step

    def slowly():
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(server.llm.engine, "step", slowly)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    arguments = command("--url", server.url, "--stats")
    # No buffer here: communicate would not see what lies in it.
    process = subprocess.Popen(
        arguments, bufsize=0, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    process.stdin.write(STORY.encode() + b"\n")
    process.stdin.flush()
    out = b""
    while len(out) < 30:  # it writes
        out += process.stdout.read(1)
    assert server.num_held > 0
    process.send_signal(signal.SIGINT)
    while b"[stopped]" not in out:
        out += process.stdout.read(1)
    assert server.until(lambda: server.num_held == 0 and server.service.engine.num_unfinished == 0)
    monkeypatch.undo()
    out, err = process.communicate(b"What?\n/exit\n", timeout=60)
    assert process.returncode == 0, err
    assert out.count(b"> ") == 2
    assert len(out.split(b"> ")[1]) > 2
    assert b"\xe2\x94\x82 ? " in err  # the server did not say how many tokens the stopped answer had


def test_a_message_that_does_not_fit_loses_nothing(server):
    done = chat("--url", server.url, "--max-tokens", 5, input=f"{STORY}\n{'x ' * 900}\nWhat?\n")
    first = says(server, STORY, max_tokens=5)
    assert done.returncode == 0
    assert "maximum context length" in done.stderr
    assert done.stdout == f"> {first}\n> > {says(server, STORY, first, 'What?', max_tokens=5)}\n> \n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--dtype", "float32"), "--dtype is for a model that is loaded here"),
        (("--device", "cpu"), "--device is for a model that is loaded here"),
        (("-m", "large"), "does not exist"),
        (("--top-p", "3"), "top_p"),
        (("--api-key", "wrong"), "API key"),
        (("--url", "127.0.0.1:8000"), "like http://127.0.0.1:8000"),
        (("--url", "http://127.0.0.1:1"), "is the server running?"),
        (("--url", "http://127.0.0.1:1\n"), "is no URL"),
    ],
)
def test_errors_are_one_sentence(server, arguments, sentence):
    done = chat("--url", server.url, "-q", STORY, *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_key_is_a_servers(server, monkeypatch):
    done = chat("--api-key", "secret", "-q", STORY)
    assert done.returncode == 1
    assert "name the server by --url" in done.stderr
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "API key" in chat("--url", server.url, "-q", STORY).stderr
    assert chat("--url", server.url, "-q", STORY, "--api-key", "secret", "--max-tokens", 3).returncode == 0


@contextlib.contextmanager
def saying(answer: bytes, asked: list[bytes] | None = None) -> Iterator[str]:
    """A server that says this to every request, and hangs up; it appends what was posted to `asked`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if asked is not None:
                asked.append(body)
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    "ask", [lambda at: at.models(), lambda at: at.tokenize("Leo", "m")], ids=["models", "tokenize"]
)
def test_a_server_that_says_nothing_is_not_waited_for(monkeypatch, ask):
    monkeypatch.setattr(client, "REPLY_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServerError, match="has said nothing for"):
            ask(client.Endpoint(url))


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 999\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "said", "sentence"),
    [
        (STREAM + b'data: {"choices": [{"delta": {"content": "Once"}}]}\n\n', "Once\n", "broke off"),
        (STREAM + b'data: {"error": {"message": "no memory"}}\n\n', "", "broke the answer off: no memory"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "", "is this a server like OpenAI's?"),
        (b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\n{}", "", "answers 500"),
        (b"", "", "broke off"),
    ],
)
def test_servers_that_break_off_or_are_none(answer, said, sentence):
    with saying(answer) as url:
        done = chat("--url", url, "-m", "m", "-q", STORY)
        assert done.returncode == 1
        assert done.stdout == said
        assert sentence in done.stderr
        listed = chat("--url", url, "-q", STORY)
        assert "/v1/models answers 501" in listed.stderr


def test_it_needs_no_torch(server):
    done = chat("--url", server.url, "-q", STORY, "--max-tokens", 2, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0
    assert "httpx" in done.stderr
    for module in ("torch", "transformers", "numpy"):
        assert f" {module}\n" not in done.stderr


def test_without_httpx_it_says_what_to_install():
    code = "import sys; sys.modules['httpx'] = None; from minillm import cli; sys.exit(cli.run(cli.app))"
    arguments = [sys.executable, "-c", code, "chat", "--url", "http://127.0.0.1:8000", "-q", STORY]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "pip install 'minillm-engine[serve]'" in done.stderr
    assert done.stderr.count("\n") == 1
