"""A server in this process, on a free port, as a client meets it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import openai
import pytest

from minillm import LLM
from minillm.server.serve import Server, background
from minillm.server.service import ServerConfig, Service

SMALL = {"dtype": "float32", "device": "cpu", "max_num_seqs": 16, "max_num_batched_tokens": 64, "enforce_eager": True}


@dataclass
class Running:
    """A server, and who talks to it."""

    llm: LLM
    service: Service
    server: Server
    thread: threading.Thread
    url: str
    key: str = "none"
    clients: list = field(default_factory=list)

    @property
    def openai(self) -> openai.OpenAI:
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)
        self.clients.append(client)
        return client

    @property
    def http(self) -> httpx.Client:
        client = httpx.Client(base_url=self.url, timeout=30)
        self.clients.append(client)
        return client

    @property
    def num_held(self) -> int:
        pool = self.llm.engine.scheduler.pool
        return pool.num_blocks - pool.num_free

    def until(self, happened, seconds: float = 10.0) -> bool:
        """Whether it happens in time."""
        deadline = time.monotonic() + seconds
        while not happened() and time.monotonic() < deadline:
            time.sleep(0.002)
        return happened()


@contextlib.contextmanager
def running(llm: LLM, drain_seconds: float = 10.0, **options) -> Iterator[Running]:
    config = ServerConfig(**{"model": "tiny", "served_names": ["tiny"]} | options)
    with background(llm, config, drain_seconds=drain_seconds) as server:
        (thread,) = (thread for thread in threading.enumerate() if thread.name == f"server on {server.config.port}")
        found = Running(llm, server.service, server, thread, server.url)
        try:
            yield found
        finally:
            for client in found.clients:
                client.close()


def forget_proxies(monkeypatch):
    """A client of a server on this machine asks it directly."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    forget_proxies(monkeypatch)


@pytest.fixture(scope="session")
def llm():
    with LLM("tiny", **SMALL) as llm:
        yield llm


@pytest.fixture(scope="session")
def reference():
    """The same model, asked directly."""
    with LLM("tiny", **SMALL) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm):
    with running(llm) as server:
        yield server


@pytest.fixture
def nothing_is_left_behind(server):
    yield
    assert server.until(lambda: server.num_held == 0)
    assert not server.llm.engine.has_unfinished_requests
