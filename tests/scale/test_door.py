"""The parts of `minillm serve --replicas` that need no cluster: the door before scripted replicas, and the router."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("ray", reason="needs the extra scale: pip install -e '.[scale]'")

from ray.exceptions import ActorDiedError, RayTaskError

from minillm.errors import ConfigError, EngineDeadError
from minillm.scale import door as door_module
from minillm.scale.door import ATTEMPTS, Door, door_app, prompt_of
from minillm.scale.router import PIECE, beginnings
from minillm.scale.serve import Scaling
from minillm.server.service import ServerConfig

JSON = [(b"content-type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


def start(headers) -> dict:
    return {"type": "http.response.start", "status": 200, "headers": headers}


def body(text: str, *, more: bool) -> dict:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


def dead() -> Exception:
    return ActorDiedError()


def task_error(cause: Exception) -> Exception:
    """As Ray raises what a replica has raised."""
    return RayTaskError("answer", "its traceback", cause).as_instanceof_cause()


class Response:
    def __init__(self, script):
        self._script = iter(script)
        self.is_cancelled = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        step = next(self._script, None)
        await asyncio.sleep(0)
        if step is None:
            raise StopAsyncIteration
        if step == "wait":
            await asyncio.sleep(3600)
        if isinstance(step, Exception):
            raise step
        return [step]

    def cancel(self):
        self.is_cancelled = True


class Handle:
    """What stands for Ray's handle: the n-th request meets the n-th script."""

    def __init__(self, *scripts):
        self._scripts = iter(scripts)
        self.asked: list = []
        self.responses: list[Response] = []

    def options(self, *, stream: bool):
        assert stream
        return self

    @property
    def answer(self):
        return self

    def remote(self, request) -> Response:
        self.asked.append(request)
        self.responses.append(Response(next(self._scripts)))
        return self.responses[-1]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(door_module, "PAUSE_SECONDS", 0.0)


def ask(handle: Handle, do: Callable | None = None, **config) -> httpx.Response:
    """A door's answer to one request, while something is done to it."""
    door = Door(handle, ServerConfig("tiny", ["tiny"], **config), 2)

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(door_app(door), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            task = asyncio.create_task(client.post("/v1/completions", json={"prompt": "Once"}))
            if do is not None:
                while not handle.asked:
                    await asyncio.sleep(0)
                for _ in range(20):
                    await asyncio.sleep(0)
                do(door)
            return await task

    answer = asyncio.run(run())
    assert door.num_in_flight == 0
    assert all(one.is_cancelled for one in handle.responses), "nobody is left to write for nobody"
    return answer


@pytest.mark.parametrize("death", [dead, lambda: task_error(EngineDeadError("its engine"))])
def test_a_request_that_has_not_begun_is_handed_on(death):
    handle = Handle([death()], [death()], [start(JSON), body("{}", more=False)])
    assert ask(handle).json() == {}
    assert len(handle.asked) == 3
    assert json.loads(handle.asked[0].body) == {"prompt": "Once"}


def test_a_request_that_kills_whoever_takes_it_is_given_up():
    handle = Handle(*[[dead()]] * ATTEMPTS)
    answer = ask(handle)
    assert answer.status_code == 500
    assert f"{ATTEMPTS} replicas have failed" in answer.json()["error"]["message"]


def test_a_stream_that_has_begun_ends_with_an_error():
    handle = Handle([start(EVENTS), body("data: {}\n\n", more=True), dead()])
    lines = [line for line in ask(handle).text.splitlines() if line]
    assert lines[0] == "data: {}"
    assert "has failed" in json.loads(lines[1].removeprefix("data: "))["error"]["message"]
    assert lines[2:] == ["data: [DONE]"]


def test_a_fault_of_the_request_is_not_tried_again():
    assert ask(Handle([task_error(ValueError("a bug"))])).status_code == 500


def test_what_takes_too_long_is_told_so_at_the_end():
    def stop(door: Door) -> None:
        door.is_draining = True
        door.abort_all("the time is over")

    waiting = ask(Handle(["wait"]), stop)
    assert (waiting.status_code, waiting.json()["error"]["message"]) == (503, "the time is over")
    streaming = ask(Handle([start(EVENTS), body("data: {}\n\n", more=True), "wait"]), stop)
    assert "the time is over" in streaming.text
    assert streaming.text.endswith("data: [DONE]\n\n")


def test_the_key_is_asked_for_at_the_door():
    handle = Handle()
    assert ask(handle, api_keys=["secret"]).status_code == 401
    assert not handle.asked


@given(st.text(max_size=300), st.text(max_size=300), st.text(max_size=300))
def test_beginnings_are_equal_where_whole_pieces_are(shared, one, other):
    mine, others = beginnings(shared + one), beginnings(shared + other)
    equal = len(os.path.commonprefix([shared + one, shared + other])) // PIECE  # noqa: RUF071  (letters, no paths)
    assert len(mine) == len(shared + one) // PIECE
    assert mine[:equal] == others[:equal]
    assert not set(mine[equal:]) & set(others[equal:])


def test_the_next_turn_of_a_conversation_begins_as_the_last():
    turns = [{"role": "user", "content": "Tell me a long story about Mia and her red kite, please."}]
    later = [*turns, {"role": "assistant", "content": "Once."}, {"role": "user", "content": "Go on."}]
    first, second = (beginnings(prompt_of(json.dumps({"messages": asked}).encode())) for asked in (turns, later))
    assert first
    assert second[: len(first)] == first


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"model": "tiny"}'])
def test_a_body_without_a_prompt_has_no_beginning(body):
    assert beginnings(prompt_of(body)) == []


@pytest.mark.parametrize("given", [(2, 1, None), (2, None, 3), (None, 2, None), (None, 3, 2)])
def test_numbers_of_replicas_that_contradict_each_other(given):
    with pytest.raises(ConfigError):
        Scaling.of(*given)


def test_numbers_of_replicas():
    assert Scaling.of(3, None, None) == Scaling(3, 3)
    assert Scaling.of(None, None, 3) == Scaling(1, 3)
    assert Scaling.of(None, 2, 3) == Scaling(2, 3)
