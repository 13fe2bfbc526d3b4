"""Many at once: clients that leave, clients that are slow, requests that are none."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import socket
import threading

import httpx
import psutil
import pytest
import torch

from minillm import LLM, SamplingParams
from minillm.engine.request import Request
from minillm.server import app as app_module
from minillm.server import service as service_module
from minillm.server.engine_thread import EngineThread, RequestStream
from tests.server.conftest import SMALL, running
from tests.server.malformed import junk, malformed
from tests.server.raw import Connection, completion
from tests.server.raw import request as http_request

MiB = 2**20
NUM_CLIENTS = 500
NUM_ROUNDS = 5
NUM_MALFORMED = 10_000
PROMPTS = ["Once upon a time", "Mia had a red kite.", "Leo", "One sunny morning Tom went to the market and"]


@pytest.fixture(scope="module")
def server():
    large = SMALL | {"max_num_seqs": 64, "max_num_batched_tokens": 512}
    with LLM("tiny", **large) as llm, running(llm) as server:
        llm.engine.runner.kv.store.zero_()  # its memory is taken as it is used: all of it now, so that growth is growth
        yield server


def requests_in_memory():
    return [found for found in gc.get_objects() if type(found) in (RequestStream, Request)]


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(server):
    before = requests_in_memory()  # tests of other files that failed may hold some
    yield
    assert server.until(lambda: server.num_held == 0)
    assert not server.llm.engine.has_unfinished_requests
    assert not server.llm.engine.scheduler.has_requests
    assert server.service.engine.num_unfinished == 0
    assert server.until(lambda: not server.server.server_state.connections)
    gc.collect()
    assert not [found for found in requests_in_memory() if not any(found is one for one in before)]


def resident() -> int:
    """Bytes of memory of this process, in which the server runs."""
    gc.collect()
    return psutil.Process().memory_info().rss


def handles() -> tuple[int, int]:
    """Open files, and threads beside those that a pool keeps for the next call."""
    pooled = [thread for thread in threading.enumerate() if thread.name.startswith("AnyIO worker")]
    return psutil.Process().num_fds(), threading.active_count() - len(pooled)


# --- clients that leave


def asks() -> list[dict[str, object]]:
    """Requests of different lengths, some for several answers, every other one drawn by a seed."""
    rng = random.Random(0)
    return [
        {
            "prompt": rng.choice(PROMPTS), "max_tokens": rng.randint(1, 10), "n": rng.choice([1, 1, 1, 2, 3]),
            "seed": at, "temperature": 0.8 * (at % 2), "ignore_eos": True,
        }
        for at in range(50)
    ]  # fmt: skip


def expected(llm: LLM, asked: list[dict[str, object]]) -> list[list[str]]:
    params = [SamplingParams(**{name: one[name] for name in one if name != "prompt"}) for one in asked]
    made = llm.generate([str(one["prompt"]) for one in asked], params, use_tqdm=False)
    return [[answer.text for answer in output.outputs] for output in made]


async def client(url: str, asked: dict[str, object], leaves: str, rng: random.Random) -> list[str] | None:
    """The answers; None of a client that leaves before it has them."""
    texts = [""] * int(str(asked["n"]))
    async with Connection.to(url) as connection:
        await connection.send(completion(stream=True, **asked))
        if leaves == "at once":
            await asyncio.sleep(rng.random() * 0.2)
            return None
        assert (await connection.head())[0] == 200
        async for event in connection.events():
            if event == "[DONE]":
                return texts
            (choice,) = json.loads(event)["choices"]
            texts[choice["index"]] += choice["text"]
            if leaves == "midway":
                return None
    raise AssertionError("the stream has no end")


async def one_round(url: str, asked: list[dict[str, object]], seed: int) -> list[tuple[str, int, list[str] | None]]:
    rng = random.Random(seed)
    ways = [rng.choice(["stays", "stays", "stays", "at once", "midway"]) for _ in range(NUM_CLIENTS)]
    found = await asyncio.gather(
        *(client(url, asked[at % len(asked)], way, random.Random(at)) for at, way in enumerate(ways))
    )
    return [(way, at % len(asked), texts) for at, (way, texts) in enumerate(zip(ways, found, strict=True))]


def test_five_hundred_clients_of_whom_many_leave(server, reference):
    asked = asks()
    right = expected(reference, asked)
    before, memory = handles(), []
    for seed in range(NUM_ROUNDS):
        for way, at, texts in asyncio.run(one_round(server.url, asked, seed)):
            assert texts == (right[at] if way == "stays" else None)
        assert server.until(lambda: server.num_held == 0)
        assert server.service.engine.num_unfinished == 0
        memory.append(resident())
    assert max(memory[2:]) <= memory[1] + 16 * MiB, [size // MiB for size in memory]
    assert server.until(lambda: handles() == before), (handles(), before)


def test_the_blocks_of_a_client_that_leaves_are_free_before_the_next_step(server, monkeypatch):
    noticed, freed, engine = [], [], server.llm.engine
    forget, abort = EngineThread.abort, engine.abort

    def noticing(thread: EngineThread, request_id: str) -> None:
        noticed.append(engine.counts.num_steps)
        forget(thread, request_id)

    def freeing(request_id: str):
        output = abort(request_id)
        freed.append((engine.counts.num_steps, server.num_held))
        return output

    monkeypatch.setattr(EngineThread, "abort", noticing)
    monkeypatch.setattr(engine, "abort", freeing)

    async def leave() -> None:
        async with Connection.to(server.url) as connection:
            await connection.send(completion(prompt="Leo", max_tokens=400, ignore_eos=True, stream=True))
            await connection.head()
            await anext(connection.events())

    for count in range(1, 6):
        asyncio.run(leave())
        assert server.until(lambda count=count: len(freed) == count)
        assert freed[-1][0] - noticed[-1] <= 1  # the step that was being computed when it was noticed
        assert freed[-1][1] == 0


# --- clients that are slow


def test_a_client_that_does_not_read_is_kept_its_answer_and_no_more(server):
    """The network's buffers are made small, so that the answer waits in the server; the engine does not wait."""
    num_tokens, asked = 300, {"prompt": "Leo", "n": 4, "ignore_eos": True, "logprobs": 20, "seed": 1, "stream": True}
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(30)
        client.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        assert server.until(lambda: server.server.server_state.connections)
        (connection,) = server.server.server_state.connections
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.sendall(completion(max_tokens=num_tokens, **asked))
        assert server.until(lambda: server.service.engine._streams)
        (stream,) = list(server.service.engine._streams.values())
        assert server.until(lambda: not server.service.engine.num_unfinished, 60)
        assert server.num_held == 0
        assert asyncio.run(good(server.url)), "others are answered"
        assert num_tokens / 2 < stream._outputs.qsize() <= num_tokens, "an output for each step"
        told = b""
        while b"[DONE]" not in told[-100:]:
            told += client.recv(2**16)
        assert told.count(b'"finish_reason":"length"') == 4
        assert stream._outputs.empty()


def connect(server, before: int) -> socket.socket:
    """A connection whose buffers are small on both sides."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(30)
    client.connect(("127.0.0.1", server.server.config.port))
    assert server.until(lambda: len(server.server.server_state.connections) == before + 1)
    for connection in server.server.server_state.connections:
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return client


ANSWERED = {"prompt": "Leo", "max_tokens": 300, "ignore_eos": True, "logprobs": 20, "seed": 1}
STALLED = {
    "a stream": completion(stream=True, **ANSWERED),
    "a whole answer": completion(**ANSWERED),
    "a body that does not come": http_request("/v1/completions", b"{}")[:-1],
}


@pytest.mark.parametrize("kind", STALLED)
def test_requests_count_until_their_response_has_ended(reference, monkeypatch, kind):
    """The engine has ended those whose clients do not read, or never heard of them; the server still holds them."""
    monkeypatch.setattr(service_module, "SPARE_REQUESTS", 0)
    with running(reference, max_requests=3) as server, contextlib.ExitStack() as stack:
        service, before = server.service, reference.engine.counts.generation_tokens
        for count in range(3):
            client = stack.enter_context(connect(server, count))
            client.sendall(STALLED[kind])
            assert server.until(lambda count=count: service.num_in_flight == count + 1)
        written = 0 if kind == "a body that does not come" else 3 * 300
        assert server.until(lambda: reference.engine.counts.generation_tokens == before + written, 60)
        assert server.until(lambda: not service.engine.num_unfinished)

        async def refused_before_its_body() -> tuple[int, dict[str, str], bytes]:
            async with Connection.to(server.url) as connection:
                await connection.send(completion(prompt="Leo").partition(b"{")[0])
                return await asyncio.wait_for(connection.answer(), 10)

        status, headers, body = asyncio.run(refused_before_its_body())
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        assert json.loads(body)["error"]["type"] == "rate_limit_error"
        http = server.http
        for path in ("/health", "/metrics", "/", "/page.js"):
            assert http.get(path).status_code == 200
        with http.stream("GET", "/live") as live:
            assert next(live.iter_lines()).startswith("data: {")
        assert service.num_in_flight == 3
        stack.close()
        assert server.until(lambda: service.num_in_flight == 0)
        assert asyncio.run(good(server.url))


def test_a_large_answer_arrives_whole(server):
    """It is sent in pieces."""
    answer = httpx.post(f"{server.url}/v1/completions", json=ANSWERED, timeout=60)
    assert len(answer.content) == int(answer.headers["content-length"]) > 2 * app_module.PIECE_BYTES
    assert [len(choice["logprobs"]["tokens"]) for choice in answer.json()["choices"]] == [300]


def test_a_body_that_does_not_come_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.5)

    async def drip() -> tuple[int, bytes, bytes]:
        async with Connection.to(server.url) as connection:
            head, _, body = completion(prompt="Leo", max_tokens=2).partition(b"\r\n\r\n")
            await connection.send(head + b"\r\n\r\n")
            answer = asyncio.ensure_future(connection.answer())
            for at in range(len(body) - 1):
                if answer.done():
                    break
                await connection.send(body[at : at + 1])
                await asyncio.sleep(0.1)
            status, _, told = await answer
            return status, told, await connection.reader.read()

    status, told, rest = asyncio.run(drip())
    assert status == 408
    assert json.loads(told)["error"]["type"] == "invalid_request_error"
    assert rest == b"", "the connection is closed"


# --- requests that are none


async def refused(connection: Connection, data: bytes) -> None:
    await connection.send(data)
    status, _, body = await connection.answer()
    assert 400 <= status < 500, (status, data[:300], body[:300])
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}, data[:300]
    assert error["message"], data[:300]


async def refuse_all(url: str, requests: list[bytes]) -> None:
    """Eight connections, on which one request follows the other."""

    async def work(own: list[bytes]) -> None:
        for start in range(0, len(own), 100):
            async with Connection.to(url) as connection:
                for data in own[start : start + 100]:
                    await asyncio.wait_for(refused(connection, data), 60)

    await asyncio.gather(*(work(requests[at::8]) for at in range(8)))


async def survive(url: str, data: bytes) -> list[int]:
    """The statuses that are answered to bytes that are not HTTP, until the connection is closed."""
    async with Connection.to(url) as connection:
        try:
            await connection.send(data)
            connection.writer.write_eof()
            told = await asyncio.wait_for(connection.reader.read(), 30)
        except (ConnectionError, OSError):
            return []
        return [int(line.split()[1]) for line in told.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]


async def good(url: str) -> str:
    async with Connection.to(url) as connection:
        await connection.send(completion(prompt=PROMPTS[0], max_tokens=8, temperature=0))
        status, _, body = await connection.answer()
        assert status == 200
        return json.loads(body)["choices"][0]["text"]


def test_ten_thousand_malformed_requests(server):
    rng = random.Random(0)
    num_junk = NUM_MALFORMED // 10
    before, memory = asyncio.run(good(server.url)), []
    for _ in range(5):
        requests = [malformed(rng) for _ in range((NUM_MALFORMED - num_junk) // 5)]
        asyncio.run(refuse_all(server.url, requests))
        for data in (junk(rng) for _ in range(num_junk // 5)):
            statuses = asyncio.run(survive(server.url, data))
            assert all(400 <= status < 500 for status in statuses), (statuses, data[:300])
        assert asyncio.run(good(server.url)) == before
        memory.append(resident())
    assert max(memory[2:]) <= memory[1] + 16 * MiB, [size // MiB for size in memory]


def test_bodies_that_are_too_large(server):
    async def large(data: bytes) -> tuple[int, str]:
        async with Connection.to(server.url) as connection:
            connection.writer.write(data)
            status, _, body = await connection.answer()
            return status, json.loads(body)["error"]["message"]

    head = b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\n"
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    for data in (
        head + b"content-length: 99999999999\r\n\r\n",
        head + b"transfer-encoding: chunked\r\n\r\n" + chunk * 129,
    ):
        status, message = asyncio.run(large(data))
        assert status == 413
        assert "bytes" in message


CHOICE = b'{"prompt": "a", "structured_outputs": {"choice": ['


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("completions", b'{"prompt": [' + b"1.5," * 1_500_000 + b"1]}", "prompt[0]"),
        ("completions", b'{"prompt": [' + b"[]," * 1_500_000 + b"[]]}", "prompt"),
        ("completions", b'{"prompt": "' + b"a " * 3_000_000 + b'"}', "maximum context length"),
        ("completions", b'{"prompt": "a", "bad_words": [' + b'"a",' * 1_500_000 + b'"a"]}', "bad_words"),
        ("completions", CHOICE + b"1," * 3_000_000 + b"1]}}", "choice[0]"),
        ("completions", CHOICE + b'"a",' * 1_500_000 + b'"a"]}}', "choice"),
        ("completions", b'{"prompt": "a", "stop": "' + b"a" * 5_000_000 + b'"}', "stop"),
        ("completions", b'{"prompt": "a"' + b"".join(b',"%d":1' % at for at in range(500_000)) + b"}", "entries"),
        ("chat/completions", b'{"messages": [' + b"1," * 3_000_000 + b"1]}", "messages[0]"),
    ],
)  # fmt: skip
def test_large_bodies_are_refused_without_being_gone_through(server, path, body, told):
    start = resident()
    answer = httpx.post(
        f"{server.url}/v1/{path}", content=body, headers={"content-type": "application/json"}, timeout=60
    )
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]
    assert resident() < start + 256 * MiB


# --- requests that fail


def test_logits_that_are_no_numbers_end_their_own_request_alone(server, reference, monkeypatch):
    compute = server.llm.engine.runner.compute

    def spoil(step):
        logits = compute(step)
        writers = [part.request for part in step.scheduled if part.samples]
        for row, request in enumerate(writers):
            if request.params.seed == 13:
                with torch.inference_mode():
                    logits.next[row] = float("nan")
        return logits

    monkeypatch.setattr(server.llm.engine.runner, "compute", spoil)
    asked = [{"prompt": PROMPTS[at % 4], "max_tokens": 12, "n": 1, "seed": at, "ignore_eos": True} for at in range(20)]
    right = expected(reference, asked)

    async def ask(one: dict[str, object]) -> tuple[int, dict]:
        async with Connection.to(server.url) as connection:
            await connection.send(completion(**one))
            status, _, body = await connection.answer()
            return status, json.loads(body)

    async def ask_all() -> list[tuple[int, dict]]:
        return await asyncio.gather(*map(ask, asked))

    for at, (status, body) in enumerate(asyncio.run(ask_all())):
        if at == 13:
            assert status == 400
            assert "not numbers" in body["error"]["message"]
        else:
            assert [choice["text"] for choice in body["choices"]] == right[at]
