"""Errors in OpenAI's form."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException

from minillm.errors import (
    EngineDeadError,
    InvalidRequestError,
    MinillmError,
    OverloadedError,
    ShuttingDownError,
    TokenizerError,
)
from minillm.server.protocol import Error, ErrorResponse
from minillm.server.service import ContextLengthError, UnknownModelError

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1

STATUSES: dict[type[MinillmError], int] = {
    UnknownModelError: 404,  # before its base
    InvalidRequestError: 400,
    TokenizerError: 400,
    OverloadedError: 429,
    ShuttingDownError: 503,
    EngineDeadError: 500,
}
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
"""OpenAI's types of errors by status; others are the server's own."""


def told(error: Exception) -> ErrorResponse:
    """An error in OpenAI's form."""
    if not isinstance(error, MinillmError):
        log.exception("a request failed", exc_info=error)
        return error_body(500, "the server could not answer this request: its log says why")
    if isinstance(error, UnknownModelError):
        return error_body(404, str(error), param="model", code="model_not_found")
    code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
    return error_body(status(error), str(error), code=code)


def status(error: Exception) -> int:
    """The HTTP status that says what kind of error it is."""
    return next((number for kind, number in STATUSES.items() if isinstance(error, kind)), 500)


def error_body(number: int, message: str, *, param: str | None = None, code: str | None = None) -> ErrorResponse:
    """An error of this status. A text that UTF-8 cannot hold is escaped: it may be the client's."""
    readable = message.encode("utf-8", "backslashreplace").decode()
    where = None if param is None else param.encode("utf-8", "backslashreplace").decode()
    kind = KINDS.get(number, "server_error")
    return ErrorResponse(error=Error(message=readable, type=kind, param=where, code=code))


def error_response(number: int, error: ErrorResponse, headers: dict[str, str] | None = None) -> JSONResponse:
    """The response; where trying again helps it says when."""
    if number in (429, 503):
        headers = {**(headers or {}), "Retry-After": str(RETRY_AFTER_SECONDS)}
    return JSONResponse(error.model_dump(), number, headers)


async def _on_error(_: Request, error: Exception) -> Response:
    return error_response(status(error), told(error))


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for it"
    headers = dict(error.headers) if error.headers else None
    return error_response(error.status_code, error_body(error.status_code, str(error.detail)), headers)


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError), "registered for it"
    message, param = explain(error.errors())
    return error_response(400, error_body(400, message, param=param))


def explain(errors: Sequence[Any]) -> tuple[str, str | None]:
    """What is wrong, in one sentence, and the field.

    Args:
        errors: pydantic's. Where a field may be one of several things it tells of each; the deepest is the likeliest,
            and among those one that is not of another type altogether.
    """
    error = max(errors, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    kind, where = error["type"], _path(error)
    if kind == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']}", None
    if kind == "extra_forbidden":
        return f"Unrecognized request argument supplied: {where}", where
    if kind == "none_required":
        return f"{where} is not implemented by this server: leave it out", where
    if kind == "literal_error":
        return f"{where}: only {error['ctx']['expected']} is implemented by this server", where
    if kind == "missing":
        return f"you must provide {where or 'a body'}", where or None
    return f"{where or 'the body'}: {error['msg']}", where or None


def _path(error: Any) -> str:
    """``messages[0].content`` of ``("body", "messages", 0, "content", "list[TextPart]")``."""
    path = ""
    names = error["loc"][1:]
    for at, name in enumerate(names):
        is_last = at == len(names) - 1
        if isinstance(name, int):
            path += f"[{name}]"
        elif (is_last and error["type"] == "extra_forbidden") or _is_field(name):
            path += f".{name}" if path else name
    return path


def _is_field(name: str) -> bool:
    """Whether it is a field, and no kind among which a field may choose."""
    return name.isidentifier() and name.islower() and name not in ("str", "int", "float", "bool", "none", "list")


def add_error_handlers(app: Starlette) -> None:
    """Make every error an `ErrorResponse`."""
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(MinillmError, _on_error)
    app.add_exception_handler(Exception, _on_error)
