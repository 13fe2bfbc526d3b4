"""One replica: an LLM and the server's application around it, in a process that Ray starts, watches and replaces."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import Metric
from ray import serve
from starlette.types import Message, Receive

from minillm.server.app import create_app
from minillm.server.serve import load
from minillm.server.service import ServerConfig, Service


@dataclass(frozen=True)
class Forwarded:
    """A request as the door hands it on.

    Attributes:
        prompt: how its prompt begins, for the router.
        scope: ASGI's, what of it can be sent.
        body: the whole of it.
    """

    prompt: str
    scope: dict[str, Any]
    body: bytes


class Replica:
    """Answers forwarded requests.

    Args:
        arguments: `LLM`'s.
        config: the server's.
    """

    async def __init__(self, arguments: dict[str, Any], config: ServerConfig) -> None:  # type: ignore[misc]
        # Ray Serve awaits it, in the event loop in which everything else is called.
        self._app = create_app(await asyncio.to_thread(load, **arguments), config)
        self._service: Service = self._app.state.service
        self._service.engine.start()
        self._name = serve.get_replica_context().replica_id.unique_id

    def check_health(self) -> None:
        """Called by Ray every second; where it raises EngineDeadError a few times, Ray starts another in its place."""
        self._service.engine.check_alive()

    async def answer(self, request: Forwarded) -> AsyncIterator[list[Message]]:
        """The response's messages as they come, the first ones not before the body has begun.

        Whoever stops listening cancels the request.

        Raises:
            EngineDeadError: nothing of the response has been given, and nothing will be; another replica may answer.
        """
        engine = self._service.engine
        engine.check_alive()
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        work = asyncio.ensure_future(_run(self._app(request.scope, _receiver(request.body), messages.put)))
        work.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            pieces = await _written(messages)
            engine.check_alive()  # else the pieces only say that it has failed
            while pieces:
                yield pieces
                pieces = await _written(messages)
        finally:
            work.cancel()

    def metrics(self) -> list[Metric]:
        """What this replica tells Prometheus, with the label `replica`."""
        families = list(self._service.metrics.registry.collect())
        for family in families:
            family.samples = [one._replace(labels={**one.labels, "replica": self._name}) for one in family.samples]
        return families


async def _run(work: Any) -> None:
    """An application's work; what it raises it has answered, and logged, before."""
    with contextlib.suppress(Exception):
        await work


def _receiver(body: bytes) -> Receive:
    """ASGI's way to read a body that is there. Nothing comes after it: a client that leaves cancels the work."""
    given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return given.pop() if given else await asyncio.Future()

    return receive


async def _written(messages: asyncio.Queue[Message | None]) -> list[Message]:
    """All that is there, as soon as something of the body is; nothing at the end."""
    found: list[Message] = []
    while not found or found[-1]["type"] == "http.response.start" or not messages.empty():
        message = await messages.get()
        if message is None:
            messages.put_nowait(None)
            break
        found.append(message)
    return found
