"""Answers that come in pieces: server-sent events, each a JSON object, the last one [DONE]."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from minillm.server.engine_thread import RequestStream
from minillm.server.errors import told
from minillm.server.service import abort

DONE_EVENT = "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Server-sent events; whatever ends it stops the requests behind it.

    Their common id is told at once, in OpenAI's header: a request may wait long for its first piece.
    """

    def __init__(self, chunks: AsyncIterator[BaseModel], streams: Sequence[RequestStream] = ()) -> None:
        super().__init__(_events(chunks), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        if streams:
            self.headers["X-Request-Id"] = streams[0].request_id.rpartition("-")[0]
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            abort(self._streams)


async def _events(chunks: AsyncIterator[BaseModel]) -> AsyncIterator[str]:
    """Each chunk as an event; an error is one too, since the status has gone out."""
    try:
        async for chunk in chunks:
            yield f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"
    except Exception as error:
        yield error_event(error)
    yield DONE_EVENT


def error_event(error: Exception) -> str:
    """That an answer cannot be written to its end."""
    return f"data: {told(error).model_dump_json()}\n\n"
