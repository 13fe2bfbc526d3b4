"""The page at `/`: its three files, what it asks for first, and what it watches.

It is an ordinary client: it talks by the routes that everybody has. Only what it shows of the engine's inside has
routes of its own, which are not part of the OpenAPI schema.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from itertools import islice
from pathlib import Path

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse

from minillm.engine.engine import Engine
from minillm.engine.params import SamplingParams
from minillm.engine.request import Request
from minillm.errors import MinillmError
from minillm.server.engine_thread import EngineThread
from minillm.server.events import EventStream
from minillm.server.protocol import ChatFields, LiveRequest, LiveSnapshot, PageSettings
from minillm.server.service import Service

FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
"""Path → file and type. They hold nothing secret, so no key is needed: the page itself asks for one."""

FOLDER = Path(__file__).with_name("page")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
SECONDS_BETWEEN_LOOKS = 0.2
"""At least."""
MOST_SHARE = 0.05
"""Of the engine's time, for looks: one that takes long, at a large pool, is taken less often."""
MOST_WAITING = 50
"""Waiting requests that are told of one by one."""


class Watch:
    """Looks at the engine a few times a second while somebody watches: one look for all who do."""

    def __init__(self, engine: EngineThread) -> None:
        self._engine = engine
        self._begun = -float("inf")
        self._look: asyncio.Task[LiveSnapshot] | None = None
        self.seconds_between = SECONDS_BETWEEN_LOOKS

    async def latest(self) -> LiveSnapshot:
        """How things stand, or stood a moment ago."""
        now = time.monotonic()
        if self._look is None or (self._look.done() and now - self._begun >= self.seconds_between):
            self._begun = now
            self._look = asyncio.create_task(self._engine.ask(self._timed))
        return await asyncio.shield(self._look)  # whoever leaves does not end the look of the others

    def _timed(self, engine: Engine) -> LiveSnapshot:
        begun = time.perf_counter()
        found = snapshot(engine)
        self.seconds_between = max(SECONDS_BETWEEN_LOOKS, (time.perf_counter() - begun) / MOST_SHARE)
        return found


def snapshot(engine: Engine) -> LiveSnapshot:
    """Blocks and queue, to be looked at between two steps."""
    scheduler, counts = engine.scheduler, engine.counts
    pool = scheduler.pool
    return LiveSnapshot(
        time=engine.clock(),
        num_blocks=pool.num_blocks,
        num_held=pool.num_blocks - pool.num_free,
        block_size=pool.block_size,
        found_again=runs(block for block, content in enumerate(pool.hashes) if content is not None),
        running=[_request(request) for request in scheduler.running],
        waiting=[_request(request) for request in islice(scheduler.waiting, MOST_WAITING)],
        num_waiting=len(scheduler.waiting),
        generation_tokens=counts.generation_tokens,
        prompt_tokens=counts.prompt_tokens,
        prefix_cache_hits=counts.prefix_cache_hits,
        num_preemptions=counts.num_preemptions,
    )


def _request(request: Request) -> LiveRequest:
    return LiveRequest(
        name=request.name,
        prompt=len(request.prompt_token_ids),
        cached=request.num_cached_tokens or 0,
        computed=request.num_computed_tokens,
        written=len(request.output_token_ids),
        max_tokens=request.max_tokens,
        preemptions=request.metrics.num_preemptions,
        blocks=list(request.table.blocks),
    )


def runs(blocks: Iterable[int]) -> list[int]:
    """Blocks that follow each other as first and count: 7, 8, 9, 2 is 7, 3, 2, 1."""
    found: list[int] = []
    following = -1
    for block in blocks:
        if block == following:
            found[-1] += 1
        else:
            found += (block, 1)
        following = block + 1
    return found


def settings(service: Service) -> PageSettings:
    """What the page begins with."""
    params = SamplingParams(**service.defaults)
    return PageSettings(
        model=service.config.served_names[0],
        max_model_len=service.llm.max_model_len,
        chat_refusal=_chat_refusal(service),
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(0, params.top_k),
    )


def _chat_refusal(service: Service) -> str | None:
    """Why the model cannot be talked to; None where it can."""
    try:
        service.conversation(ChatFields.model_validate({"messages": [{"role": "user", "content": "Hello"}]}))
    except MinillmError as error:
        return str(error)
    return None


def page_router(service: Service) -> APIRouter:
    """The page's routes."""
    router = APIRouter(include_in_schema=False)
    watch = Watch(service.engine)
    for path, (name, media_type) in FILES.items():
        router.add_api_route(path, _giver(FOLDER / name, media_type))

    @router.get("/page/settings")
    async def page_settings() -> PageSettings:
        return await run_in_threadpool(settings, service)

    @router.get("/live")
    async def live() -> EventStream:
        return EventStream(_snapshots(service, watch))

    return router


def _giver(path: Path, media_type: str) -> Callable[[], FileResponse]:
    def give() -> FileResponse:
        return FileResponse(path, media_type=media_type, headers=HEADERS)

    return give


async def _snapshots(service: Service, watch: Watch) -> AsyncIterator[LiveSnapshot]:
    while not service.is_drained:
        yield await watch.latest()
        await asyncio.sleep(watch.seconds_between)
