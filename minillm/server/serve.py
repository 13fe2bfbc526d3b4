"""`minillm serve`: an application on a port, until it is told to stop.

The first SIGTERM or Ctrl-C drains: new requests get 503, running ones end, or are stopped when the time is over. The
second stops at once.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

import uvicorn
from starlette.applications import Starlette

from minillm.engine.ranks import follows_torchrun
from minillm.errors import ConfigError, MinillmError
from minillm.llm import LLM
from minillm.server.app import create_app
from minillm.server.service import ServerConfig, Service

LAST_WORDS_SECONDS = 5
"""How long connections have to take what was written for them, when everything has ended."""


class Drainable(Protocol):
    """What can be served: a `Service`, or what hands requests on to several."""

    is_draining: bool

    @property
    def is_drained(self) -> bool:
        """Whether nothing is, and nothing more will be, answered."""

    @property
    def error(self) -> BaseException | None:
        """Why nothing will be answered any more."""

    def abort_all(self, reason: str) -> None:
        """Stop everything; whoever waits is told the reason."""


Served = TypeVar("Served", bound=Drainable)


class Server(uvicorn.Server, Generic[Served]):
    """uvicorn, which goes on answering while it drains, and ends when the engine fails.

    Args:
        app: whose `state.service` is what it serves.
        drain_seconds: how long running requests have, once it has been told to stop.
    """

    def __init__(self, app: Starlette, *, host: str, port: int, drain_seconds: float, log_level: str = "info") -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_level=log_level,
                timeout_graceful_shutdown=LAST_WORDS_SECONDS,
                lifespan="on",
                ws="none",
            )
        )
        self.service: Served = app.state.service
        self._drain_seconds = drain_seconds
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, stop at the second."""
        if self._deadline is None:
            self.service.is_draining = True
            self._deadline = time.monotonic() + self._drain_seconds
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; True to end."""
        stop = await super().on_tick(counter)
        if self.force_exit:
            self.service.abort_all("the server was stopped")
        elif self._deadline is not None and time.monotonic() > self._deadline:
            self.service.abort_all("the server is shutting down, and the answer took too long")
        return stop or self.service.error is not None or self.service.is_drained

    @property
    def url(self) -> str:
        """Where it listens; OpenAI's clients take this and `/v1`."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.config.port}"

    @property
    def exit_status(self) -> int:
        """0 where all that was asked has been answered or told."""
        return 1 if self.force_exit or self.service.error is not None else 0


def load(**arguments: Any) -> LLM:
    """An `LLM`, made in a thread that ends.

    OpenMP keeps a team of threads for every thread that has computed. Where there are more of them than cores they no
    longer wait for each other actively, and on a CPU the engine's steps take half as long again: its thread must be the
    only one that computes.

    Raises:
        SystemExit: `torchrun` has started this process for another rank than 0, and rank 0 has ended.
    """
    if follows_torchrun():
        LLM(**arguments)
    with ThreadPoolExecutor(max_workers=1) as loader:
        return loader.submit(LLM, **arguments).result()


def serve(llm: LLM, config: ServerConfig, *, host: str, port: int, drain_seconds: float) -> int:
    """Serve until a signal comes or the engine fails.

    Returns:
        The process's exit status: 0, or 1 where it was stopped at once or the engine failed.
    """
    server: Server[Service] = Server(create_app(llm, config), host=host, port=port, drain_seconds=drain_seconds)
    server.run()
    server.service.engine.join()  # uvicorn, told to stop at once, has not let the application do it
    return server.exit_status


@contextlib.contextmanager
def background(llm: LLM, config: ServerConfig, *, drain_seconds: float = 10.0) -> Iterator[Server[Service]]:
    """A server in a thread of this process, on a free port of this machine: for notebooks and tests.

    Meanwhile the engine is the server's, and nobody else may drive it. At the end clients have `LAST_WORDS_SECONDS`.
    Signals do not reach a server in a thread; `handle_exit` is what they would call.

    Raises:
        MinillmError: it did not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        server: Server[Service] = Server(
            create_app(llm, config), host=host, port=port, drain_seconds=drain_seconds, log_level="warning"
        )
        thread = threading.Thread(target=server.run, args=([listener],), name=f"server on {port}", daemon=True)
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.005)
            if not server.started:
                raise MinillmError("the server did not start: its log says why")
            yield server
        finally:
            server.should_exit = True
            thread.join()


def check_port(host: str, port: int) -> None:
    """Raise ConfigError where somebody else has the port; uvicorn would end the process with a log line."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise ConfigError(f"{host}:{port} cannot be listened on: {error.strerror or error}. Choose another") from error


def read_chat_template(given: str) -> str:
    """A chat template: a file's text, or, where it holds a brace, what is given itself.

    Raises:
        ConfigError: neither.
    """
    if "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {given!r} is no template, and no file that can be read: {error}") from error
