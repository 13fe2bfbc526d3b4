"""The routes: what comes in is checked, handed to the engine's thread, and given back in OpenAI's form."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Protocol, TypeVar, cast

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minillm import __version__
from minillm.checks import check_token_ids
from minillm.engine.outputs import RequestOutput
from minillm.errors import MinillmError
from minillm.llm import LLM
from minillm.server import responses
from minillm.server.engine_thread import RequestStream
from minillm.server.errors import add_error_handlers, error_body, error_response, status, told
from minillm.server.events import EventStream
from minillm.server.page import FILES, page_router
from minillm.server.protocol import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    DetokenizeResponse,
    ErrorResponse,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
    TokenizeTextRequest,
    VersionResponse,
)
from minillm.server.service import ServerConfig, Service, merged, whole

MAX_BODY_BYTES = 8 * 2**20
BODY_TOO_LARGE = f"the body has more than {MAX_BODY_BYTES} bytes"
BODY_SECONDS = 60.0
"""A client that sends its body more slowly holds a connection for nothing."""
CLIENT_HAS_GONE = 499  # nginx's number; nobody reads it
OPEN_PATHS = ("/health", "/version", "/metrics", "/docs", "/openapi.json", *FILES)
"""What needs no key."""
UNCOUNTED_PATHS = (*OPEN_PATHS, "/live")
"""What is answered however many requests are in flight: it holds next to nothing."""
PIECE_BYTES = 2**16

DESCRIPTION = "What the server takes and gives. /docs shows it by Swagger UI, which the browser loads from the network."

Result = TypeVar("Result")


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of the work; None, and the work is cancelled, where the client goes away before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- routes


def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


Serving = Annotated[Service, Depends(_service)]
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The request cannot be answered."},
    401: {"model": ErrorResponse, "description": "The API key is missing or wrong."},
    404: {"model": ErrorResponse, "description": "There is no such model."},
    408: {"model": ErrorResponse, "description": "The request's body does not arrive."},
    413: {"model": ErrorResponse, "description": "The request's body is too large."},
    429: {"model": ErrorResponse, "description": "Too many requests wait: try again after Retry-After seconds."},
    500: {"model": ErrorResponse, "description": "The engine has failed."},
    503: {"model": ErrorResponse, "description": "The server is shutting down."},
}
router = APIRouter(responses=ERRORS)


def _streaming(piece: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """What the page says of an answer that may be a stream of such pieces."""
    kinds = [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in (piece, ErrorResponse)]
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": kinds},
        "description": "A piece; an error, where the answer cannot be written to its end; `[DONE]` is the last.",
    }
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {
        200: {
            "content": {"text/event-stream": {"itemSchema": event}},
            "description": "The answer, or with stream=true its pieces.",
        }
    }


EXPOSITION: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format."}
}


@router.post("/v1/completions", response_model=Completion, responses=_streaming(Completion))
async def completions(asked: CompletionRequest, request: Request, service: Serving) -> Response:
    """Continue one or several texts."""
    service.check_ready(asked.num_answers)
    name = service.model_name(asked.model)
    params = asked.to_params(service.defaults)
    prompts = await run_in_threadpool(service.prompts, asked)
    answer = responses.Answer(
        responses.new_id("cmpl"),
        name,
        service.decode,
        echoes=[service.decode(ids) if text is None else text for text, ids in prompts] if asked.echo else None,
        only_prompt=asked.only_prompt,
        return_token_ids=bool(asked.return_token_ids),
        tells_prompt_logprobs=asked.prompt_logprobs is not None,
    )
    streams = await service.begin(answer.id, prompts, params, asked.max_tokens)
    if asked.stream:
        chunks = responses.completion_chunks(answer, merged(streams), include_usage=asked.wants_usage)
        return EventStream(chunks, streams)
    return await _whole(request, streams, lambda outputs: responses.completion(answer, outputs))


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=_streaming(ChatCompletionChunk))
async def chat_completions(asked: ChatCompletionRequest, request: Request, service: Serving) -> Response:
    """Answer a conversation."""
    service.check_ready(asked.num_answers)
    name = service.model_name(asked.model)
    params = asked.to_params(service.defaults)
    prompt = await run_in_threadpool(service.conversation, asked)
    answer = responses.Answer(
        responses.new_id("chatcmpl"),
        name,
        service.decode,
        tells_prompt_logprobs=asked.prompt_logprobs is not None,
        top_logprobs=asked.top_logprobs or 0,
        tool_choice=asked.tool_choice,
        return_token_ids=bool(asked.return_token_ids),
    )
    streams = await service.begin(answer.id, [prompt], params, asked.token_limit)
    if asked.stream:
        chunks = responses.chat_chunks(answer, merged(streams), include_usage=asked.wants_usage)
        return EventStream(chunks, streams)
    return await _whole(request, streams, lambda outputs: responses.chat_completion(answer, outputs[0]))


async def _whole(
    request: Request, streams: Sequence[RequestStream], answer: Callable[[list[RequestOutput]], BaseModel]
) -> Response:
    """The answer that is made of all outputs, if somebody still waits for it."""
    outputs = await unless_disconnected(request, whole(streams))
    if outputs is None:
        return Response(status_code=CLIENT_HAS_GONE)
    return Response(answer(outputs).model_dump_json(), media_type="application/json")


@router.get("/v1/models")
async def models(service: Serving) -> ModelList:
    """The names of the model that is served."""
    return ModelList(data=[_card(service, name) for name in service.config.served_names])


@router.get("/v1/models/{model:path}")
async def model(model: str, service: Serving) -> ModelCard:
    """One of these names."""
    return _card(service, service.model_name(model))


def _card(service: Service, name: str) -> ModelCard:
    return ModelCard(
        id=name, created=service.created, root=service.config.model, max_model_len=service.llm.max_model_len
    )


@router.post("/tokenize")
async def tokenize(asked: TokenizeRequest, service: Serving) -> TokenizeResponse:
    """The tokens of a text, or of a conversation."""
    service.model_name(asked.model)
    if isinstance(asked, TokenizeTextRequest):
        ids = await run_in_threadpool(service.encode, asked.prompt, special=asked.add_special_tokens is not False)
    else:
        _, ids = await run_in_threadpool(service.conversation, asked)
    names = cast(list[str], service.tokenizer.convert_ids_to_tokens(ids)) if asked.return_token_strs else None
    return TokenizeResponse(count=len(ids), max_model_len=service.llm.max_model_len, tokens=ids, token_strs=names)


@router.post("/detokenize")
async def detokenize(asked: DetokenizeRequest, service: Serving) -> DetokenizeResponse:
    """The text of tokens."""
    service.model_name(asked.model)
    check_token_ids(asked.tokens, service.llm.engine.vocab_size, "tokens")
    return DetokenizeResponse(prompt=await run_in_threadpool(service.decode, asked.tokens))


@router.get("/health", response_class=Response)
async def health(service: Serving) -> Response:
    """200 while requests are taken and answered, else 503."""
    try:
        service.check_ready()
    except MinillmError as error:
        return error_response(503, error_body(503, str(error)))
    return Response()


@router.get("/version")
async def version() -> VersionResponse:
    """The version of minillm."""
    return VersionResponse(version=__version__)


@router.get("/metrics", response_class=Response, responses=EXPOSITION)
async def metrics(service: Serving) -> Response:
    """How things stand, for Prometheus."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


# --- the whole


class Guarded(Protocol):
    """What stands behind a `Gate`: a `Service`, or what hands requests on to several."""

    config: ServerConfig
    num_in_flight: int

    def check_in_flight(self) -> None:
        """Raise MinillmError where no more requests are taken now."""


class Gate:
    """Before everything: the API key, the size of the body and how long it may take, and how many are in flight."""

    def __init__(self, app: ASGIApp, service: Guarded) -> None:
        self.app = app
        self._service = service
        self._keys = [key.encode() for key in service.config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope["path"], dict(scope["headers"]))
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        is_counted = scope["path"] not in UNCOUNTED_PATHS
        self._service.num_in_flight += is_counted
        try:
            await self.app(scope, _limited(receive), _in_pieces(send))
        finally:
            self._service.num_in_flight -= is_counted

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> Response | None:
        if self._keys and path not in OPEN_PATHS and not self._has_key(headers.get(b"authorization", b"")):
            body = error_body(
                401, "the API key is missing or wrong: send 'Authorization: Bearer KEY'", code="invalid_api_key"
            )
            return error_response(401, body, {"WWW-Authenticate": "Bearer"})
        if int(headers.get(b"content-length", b"0")) > MAX_BODY_BYTES:  # digits: the HTTP layer has looked
            return error_response(413, error_body(413, BODY_TOO_LARGE))
        if path not in UNCOUNTED_PATHS:
            try:
                self._service.check_in_flight()
            except MinillmError as error:
                return error_response(status(error), told(error))
        return None

    def _has_key(self, header: bytes) -> bool:
        """Compares with every key, in a time that tells nothing."""
        scheme, _, shown = header.partition(b" ")
        found = [hmac.compare_digest(shown.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(found)


def _limited(receive: Receive) -> Receive:
    """The same messages, or HTTPException where the body is too large or too slow."""
    received, is_whole = 0, False
    deadline = asyncio.get_running_loop().time() + BODY_SECONDS

    async def limited() -> Message:
        nonlocal received, is_whole
        try:
            async with asyncio.timeout_at(None if is_whole else deadline):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"the body has not come within {BODY_SECONDS:g} seconds") from None
        received += len(message.get("body", b""))
        is_whole = not message.get("more_body", False)
        if received > MAX_BODY_BYTES:
            raise HTTPException(413, BODY_TOO_LARGE)
        return message

    return limited


def _in_pieces(send: Send) -> Send:
    """The same response, a large body in pieces: each waits for the client, so none ends before it is nearly read."""

    async def pieces(message: Message) -> None:
        body, start = message.get("body", b""), 0
        while len(body) - start > PIECE_BYTES:
            await send({"type": message["type"], "body": body[start : start + PIECE_BYTES], "more_body": True})
            start += PIECE_BYTES
        await send({**message, "body": body[start:]} if start else message)

    return pieces


def create_app(llm: LLM, config: ServerConfig) -> FastAPI:
    """The application; `app.state.service` is what it serves. The LLM stays the caller's, to close."""
    service = Service(llm, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            await service.engine.close()

    app = FastAPI(
        title="minillm",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.openapi_version = "3.2.0"  # the first to say what the events of a stream are
    app.state.service = service
    app.include_router(router)
    app.include_router(page_router(service))
    app.add_middleware(Gate, service=service)
    add_error_handlers(app)
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        """The schema, with a stream's pieces, and with what needs a key.

        Without FastAPI's own 422: what is invalid here is a 400.
        """
        schema = plain()
        _, pieces = models_json_schema(
            [(ChatCompletionChunk, "serialization")], ref_template="#/components/schemas/{model}"
        )
        schema["components"]["schemas"] = pieces["$defs"] | schema["components"]["schemas"]
        if config.api_keys:
            schema["components"]["securitySchemes"] = {"api_key": {"type": "http", "scheme": "bearer"}}
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if config.api_keys and path not in OPEN_PATHS:
                    operation["security"] = [{"api_key": []}]
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app
