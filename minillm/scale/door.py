"""The door before the replicas: it reads a request, lets Ray Serve choose who answers it, and passes the answer on.

A request whose replica dies is handed to another as long as nothing of its answer has gone out.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector
from ray.exceptions import RayError, RayTaskError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import Message, Receive, Scope, Send

from minillm.errors import EngineDeadError, MinillmError, OverloadedError, ShuttingDownError
from minillm.scale.replica import Forwarded
from minillm.server.app import Gate, unless_disconnected
from minillm.server.errors import add_error_handlers, error_body, error_response
from minillm.server.events import DONE_EVENT, error_event
from minillm.server.service import SPARE_REQUESTS, ServerConfig

ATTEMPTS = 4
"""How many replicas may die of, or under, a request before it is given up."""
PAUSE_SECONDS = 1.0
"""Before the second attempt, and twice as long before each further one: a dead engine is found out in this time."""
HEALTH_SECONDS = 5.0
"""That a replica has to say how it is."""
MOST_CHARACTERS = 2**16
"""Of a prompt, for the router."""
SENT = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
"""What a replica is told of ASGI's scope."""


class BrokenOffError(EngineDeadError):
    """A replica has died in the middle of an answer."""


class Door:
    """An ASGI application that hands requests on.

    Args:
        handle: of `Replica`s.
        config: the server's.
        most_replicas: each of which may have `config.max_requests`.
    """

    error: BaseException | None = None  # a replica that dies is replaced

    def __init__(self, handle: DeploymentHandle[Any], config: ServerConfig, most_replicas: int) -> None:
        self.config = config
        self.is_draining = False
        self.num_in_flight = 0
        self._handle = handle
        self._most_requests = config.max_requests * most_replicas + SPARE_REQUESTS
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopped: str | None = None

    @property
    def is_drained(self) -> bool:
        """Whether nothing is, and nothing more will be, answered."""
        return self.is_draining and not self.num_in_flight

    def check_in_flight(self) -> None:
        """Raise ShuttingDownError or OverloadedError where no more requests are taken now."""
        if self.is_draining:
            raise ShuttingDownError("the server is shutting down and takes no new requests")
        if self.num_in_flight >= self._most_requests:
            raise OverloadedError(f"{self.num_in_flight} requests are in flight already: try again later")

    def abort_all(self, reason: str) -> None:
        """Stop everything; whoever waits is told the reason."""
        self._stopped = reason
        while self._tasks:  # each once: a second time would cut off what it tells its client
            self._tasks.pop().cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        try:
            body = await request.body()
        except ClientDisconnect:
            return
        forwarded = Forwarded(prompt_of(body), {name: scope[name] for name in SENT if name in scope}, body)
        await unless_disconnected(request, self._forward(forwarded, send))

    async def health(self, request: Request) -> Response:
        """200 while a replica takes requests and answers them, else 503."""
        forwarded = Forwarded("", {name: request.scope[name] for name in SENT if name in request.scope}, b"")
        try:
            self.check_in_flight()
            async with asyncio.timeout(HEALTH_SECONDS):
                messages = [message async for message in self._answer(forwarded)]
        except (TimeoutError, RayError, MinillmError) as error:
            return error_response(503, error_body(503, str(error) or "no replica answers"))
        return Response(status_code=messages[0]["status"] if messages else 503)

    async def metrics(self, request: Request) -> Response:
        """All replicas' figures, each with the label `replica`; 503 while one of them is ending."""
        try:
            found: list[list[Metric]] = await self._handle.broadcast("metrics").results_async()
        except RayError as error:
            return error_response(503, error_body(503, f"a replica does not answer: {error}"))
        registry = CollectorRegistry()
        registry.register(_Merged([family for families in found for family in families]))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def _forward(self, request: Forwarded, send: Send) -> None:
        """Pass the answer on.

        Raises:
            MinillmError: there is none, and nothing has been sent.
            BrokenOffError: what has been sent is no whole answer.
        """
        start: Message | None = None
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in one"
        self._tasks.add(task)
        try:
            async with aclosing(self._answer(request)) as messages:
                async for message in messages:
                    await send(message)
                    start = start or message
        except (asyncio.CancelledError, BrokenOffError) as error:
            told = ShuttingDownError(self._stopped) if self._stopped is not None else error
            if isinstance(told, asyncio.CancelledError) or not _is_stream(start):
                raise told from None
            last = error_event(told) + DONE_EVENT
            await send({"type": "http.response.body", "body": last.encode(), "more_body": False})
        finally:
            self._tasks.discard(task)

    async def _answer(self, request: Forwarded) -> AsyncGenerator[Message]:
        """The messages of an answer, by whichever replica lives to give it.

        Raises:
            EngineDeadError: none did.
            BrokenOffError: one has given only a part.
        """
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
            has_begun = False
            try:
                async with aclosing(self._attempt(request)) as messages:
                    async for message in messages:
                        has_begun = True
                        yield message
                return
            except RayError as error:
                if isinstance(error, RayTaskError) and not isinstance(error, EngineDeadError):
                    raise  # a fault of ours, which would come again
                if has_begun:
                    raise BrokenOffError("the replica that wrote this answer has failed: ask again") from error
        raise EngineDeadError(f"{ATTEMPTS} replicas have failed under this request: the server's log says of what")

    async def _attempt(self, request: Forwarded) -> AsyncGenerator[Message]:
        """The messages of one replica's answer."""
        response = self._handle.options(stream=True).answer.remote(request)
        try:
            async for messages in response:
                for message in messages:
                    yield message
        finally:
            response.cancel()


class _Merged(Collector):
    """Families of metrics, those of the same name as one."""

    def __init__(self, families: list[Metric]) -> None:
        self._families: dict[str, Metric] = {}
        for family in families:
            self._families.setdefault(family.name, family)
            if self._families[family.name] is not family:
                self._families[family.name].samples += family.samples

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        return iter(self._families.values())


def door_app(door: Door) -> Starlette:
    """The application; `app.state.service` is the door. Everything but health and metrics is the replicas'."""
    app = Starlette(
        routes=[Route("/health", door.health), Route("/metrics", door.metrics), Mount("/", door)],
        middleware=[Middleware(Gate, service=door)],
    )
    app.state.service = door
    add_error_handlers(app)
    return app


def prompt_of(body: bytes) -> str:
    """How the prompt or the conversation in a request begins, as JSON; nothing that is long where there is none."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(asked, dict):
        return ""
    return json.dumps(asked.get("messages", asked.get("prompt")))[:MOST_CHARACTERS]


def _is_stream(start: Message | None) -> bool:
    """Whether an answer has begun that consists of events."""
    headers = dict(start["headers"]) if start is not None else {}
    return bytes(headers.get(b"content-type", b"")).startswith(b"text/event-stream")
