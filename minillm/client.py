"""A client of servers with OpenAI's HTTP interface, minillm's own among them (needs the extra `serve`).

`minillm chat --url` and `minillm bench serve` stand on it. Nothing here imports PyTorch.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from minillm.errors import ConfigError, MissingExtraError, ServerError

try:
    import httpx
except ImportError as error:
    raise MissingExtraError("talking to a server", "serve") from error

CONNECT_SECONDS = 10
REPLY_SECONDS = 60
"""For what is no answer of a model, and should come at once."""
COMPLETIONS = "/v1/completions"
CHAT_COMPLETIONS = "/v1/chat/completions"
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
"""Fields of a request that is answered in pieces, and with its counts of tokens at the end."""

Event = dict[str, Any]
"""What one server-sent event holds: a piece of an answer, its usage, or an error."""


@dataclass(frozen=True)
class Endpoint:
    """Where a server is, and the key it wants.

    Attributes:
        url: with or without the ``/v1`` that clients of OpenAI write.
        api_key: the environment's OPENAI_API_KEY when None.

    Raises:
        ConfigError: a URL or a key that is none.
    """

    url: str
    api_key: str | None = None

    def __post_init__(self) -> None:
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{self.url!r} is no URL: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"a server's URL is like http://127.0.0.1:8000, not {self.url!r}")
        if not self.key.isascii():
            raise ConfigError("the API key holds letters that no key has: look at --api-key and OPENAI_API_KEY")

    @property
    def key(self) -> str:
        """The key to send; empty: none."""
        return self.api_key or os.environ.get("OPENAI_API_KEY", "")

    @property
    def client_options(self) -> dict[str, Any]:
        """Arguments of httpx's clients: as many connections as it takes, and answers may take their time."""
        return {
            "base_url": self.url.rstrip("/").removesuffix("/v1"),
            "headers": {"Authorization": f"Bearer {self.key}"} if self.key else {},
            "timeout": httpx.Timeout(None, connect=CONNECT_SECONDS),
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None),
        }

    def models(self) -> list[str]:
        """The names of what it serves.

        Raises:
            ServerError: it cannot be reached, says nothing, refuses, or serves nothing.
        """
        with _what_goes_wrong(self.url), httpx.Client(**self.client_options) as client:
            response = client.get("/v1/models", timeout=_reply_timeout())
            _check(response)
            try:
                names = [str(card["id"]) for card in response.json()["data"]]
            except (ValueError, LookupError, TypeError) as error:
                raise ServerError(f"{response.url} is no list of models: is this a server like OpenAI's?") from error
        if not names:
            raise ServerError(f"{self.url} serves no model")
        return names

    def tokenize(self, text: str, model: str) -> list[int] | None:
        """The token ids of a text, without special ones; None where the server has no ``/tokenize`` as vLLM's.

        Raises:
            ServerError: it cannot be reached, or says nothing.
        """
        asked = {"model": model, "prompt": text, "add_special_tokens": False}
        with _what_goes_wrong(self.url), httpx.Client(**self.client_options) as client:
            response = client.post("/tokenize", json=asked, timeout=_reply_timeout())
        if response.is_error:
            return None
        try:
            return [int(token) for token in response.json()["tokens"]]
        except (ValueError, LookupError, TypeError):
            return None

    def events(self, path: str, body: Mapping[str, Any]) -> Generator[Event, None, None]:
        """The events of a streamed answer; closing the iterator closes the connection, and the server stops.

        Raises:
            ServerError: as soon as something goes wrong.
        """
        with (
            _what_goes_wrong(self.url),
            httpx.Client(**self.client_options) as client,
            client.stream("POST", path, json=body) as response,
        ):
            if not _is_stream(response):
                response.read()
                _check(response)
                raise _no_stream(response)
            for line in response.iter_lines():
                yield from _event(line)


async def async_events(client: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
    """As `Endpoint.events`, over a client that many requests share."""
    with _what_goes_wrong(str(client.base_url)):
        async with client.stream("POST", path, json=body) as response:
            if not _is_stream(response):
                await response.aread()
                _check(response)
                raise _no_stream(response)
            async for line in response.aiter_lines():
                for event in _event(line):
                    yield event


@contextmanager
def _what_goes_wrong(url: str) -> Iterator[None]:
    """httpx's errors as ServerError."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ServerError(f"{url} cannot be reached ({_text(error)}): is the server running?") from error
    except httpx.TimeoutException as error:
        raise ServerError(f"{url} has said nothing for {REPLY_SECONDS:g} seconds: is the server stuck?") from error
    except httpx.HTTPError as error:
        raise ServerError(f"{url} broke off: {_text(error)}") from error


def _reply_timeout() -> httpx.Timeout:
    return httpx.Timeout(REPLY_SECONDS, connect=CONNECT_SECONDS)


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


def _is_stream(response: httpx.Response) -> bool:
    return response.is_success and "text/event-stream" in response.headers.get("content-type", "")


def _no_stream(response: httpx.Response) -> ServerError:
    return ServerError(f"{response.url} answers, but with no stream: is this a server like OpenAI's?")


def _check(response: httpx.Response) -> None:
    """Raise what a response that has been read says, where it says that something is wrong."""
    if response.is_error:
        raise ServerError(f"{response.url} answers {response.status_code}: {_reason(response)}")


def _reason(response: httpx.Response) -> str:
    try:
        content = response.json()
    except ValueError:
        return response.text[:200] or response.reason_phrase
    return _message(content.get("error", content)) if isinstance(content, dict) else str(content)[:200]


def _message(error: Any) -> str:
    """What an error in OpenAI's form says; whatever it holds, where it has another form."""
    return str(error["message"] if isinstance(error, dict) and "message" in error else error)


def _event(line: str) -> Iterator[Event]:
    """The event that a line of a stream holds, if it holds one."""
    field, _, data = line.partition(":")
    if field != "data" or data.strip() == "[DONE]":
        return
    try:
        event = json.loads(data)
    except ValueError as error:
        raise ServerError(f"the server streams what is not JSON: {data[:100]!r}") from error
    if not isinstance(event, dict):
        raise ServerError(f"the server streams what is no piece of an answer: {data[:100]!r}")
    if event.get("error"):
        raise ServerError(f"the server broke the answer off: {_message(event['error'])}")
    yield event


class RemoteChat:
    """A model on a server, which answers conversations, and what its last answer took.

    Args:
        model: as the server calls it; the first that it serves when None.
        fields: what to ask beside the conversation: max_tokens, temperature, …

    Raises:
        ServerError: the server cannot be reached, or serves nothing.
    """

    def __init__(self, endpoint: Endpoint, model: str | None, fields: Mapping[str, Any]) -> None:
        self.name = endpoint.models()[0] if model is None else model
        self._endpoint = endpoint
        self._fields = dict(fields)
        self._usage: dict[str, int] = {}
        self._first_seconds = self._seconds = math.nan

    def answer(self, conversation: Sequence[Mapping[str, str]]) -> Generator[str, None, None]:
        """Pieces of text as they come.

        Raises:
            ServerError: as soon as something goes wrong.
        """
        asked = {"model": self.name, "messages": list(conversation), **STREAM, **self._fields}
        self._usage, self._first_seconds, self._seconds = {}, math.nan, math.nan
        start = time.perf_counter()
        with closing(self._endpoint.events(CHAT_COMPLETIONS, asked)) as events:
            for event in events:
                self._usage = event.get("usage") or self._usage
                if text := _piece(event):
                    self._seconds = time.perf_counter() - start
                    if math.isnan(self._first_seconds):
                        self._first_seconds = self._seconds
                    yield text

    def table(self) -> Table:
        """What the last answer took, as far as it is known: an answer that is stopped comes without its counts."""
        new = self._usage.get("completion_tokens")
        later, seconds = (new or 0) - 1, self._seconds - self._first_seconds
        table = Table("model", "prompt tokens", "new tokens", "first token", "tokens/s")
        table.add_row(
            escape(self.name),
            str(self._usage.get("prompt_tokens", "?")),
            "?" if new is None else str(new),
            "?" if math.isnan(self._first_seconds) else f"{self._first_seconds:.2f} s",
            f"{later / seconds:.1f}" if later > 0 and seconds > 0 else "?",
        )
        return table


def _piece(event: Event) -> str:
    """The text of a piece of a chat's answer; empty where it has none."""
    choices = event.get("choices") or [{}]
    return (choices[0].get("delta") or {}).get("content") or ""
