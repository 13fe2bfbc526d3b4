"""Replicas on Ray, as a client of `minillm serve --replicas 2` meets them; one is killed under load."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

pytest.importorskip("ray", reason="needs the extra scale: pip install -e '.[scale]'")

from minillm import LLM, SamplingParams

pytestmark = pytest.mark.scale

ROOT = Path(__file__).parents[2]
STARTS = 4
"""Ray 2.60 gives its own agents 15 seconds to start, which on a busy machine may be too short (ray issue 65983)."""
SEATS = 16
CLIENTS = 200
PROMPTS = [f"{when} {who} walked to the market with a" for when in ("Once", "One day", "Long ago") for who in
           ("Mia", "Leo", "Anna", "Tom", "Ben", "Sara", "a girl", "a boy")]  # fmt: skip


def environment() -> dict[str, str]:
    """Without proxies: everything is on this machine."""
    mine = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    mine.pop("RAY_ADDRESS", None)
    return mine | {"PYTHONPATH": str(ROOT)}


@dataclass
class Command:
    process: subprocess.Popen
    url: str

    def replicas(self) -> list[psutil.Process]:
        """Those that answer: Ray gives processes such titles."""
        return [one for one in descendants(self.process.pid) if "ServeReplica" in " ".join(one.cmdline())]

    def counts(self, name: str) -> dict[str, float]:
        """A counter of every replica."""
        text = httpx.get(f"{self.url}/metrics", timeout=30, trust_env=False).text
        lines = re.findall(rf'^minillm:{name}_total{{.*replica="(\w+)"}} (\S+)$', text, re.MULTILINE)
        return {replica: float(value) for replica, value in lines}

    def ask(self, prompt: str, **fields) -> dict:
        asked = {"prompt": prompt, "temperature": 0} | fields
        answer = httpx.post(f"{self.url}/v1/completions", json=asked, timeout=60, trust_env=False)
        assert answer.status_code == 200, answer.text
        return answer.json()


def descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def until(happened, seconds: float, every: float = 0.1) -> bool:
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(every)
    return happened()


def is_healthy(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=10, trust_env=False).status_code == 200
    return False


def did_not_start(log: Path) -> bool:
    return "timed out during startup" in log.read_text()


@contextlib.contextmanager
def running(log: Path) -> Iterator[Command]:
    """The command, at a free port, from its start on; whatever is left of it at the end is killed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    options = f"--port {port} --dtype float32 --enforce-eager --max-num-seqs {SEATS} --kv-cache-memory-bytes {2**24}"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "minillm", "serve", "tiny", "--replicas", "2", *options.split()],
            cwd=ROOT,
            env=environment(),
            stdout=file,
            stderr=file,
        )
    try:
        yield Command(process, f"http://127.0.0.1:{port}")
    finally:
        left = descendants(process.pid)
        process.kill()
        process.wait()
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    log = tmp_path_factory.mktemp("scale") / "log"
    for _ in range(STARTS):
        with running(log) as command:
            assert until(lambda: is_healthy(command.url) or command.process.poll() is not None, 300, 1.0), (
                log.read_text()
            )
            if command.process.poll() is None:
                yield command
                return
        assert did_not_start(log), log.read_text()
    pytest.fail(log.read_text())


@pytest.fixture(scope="module")
def texts():
    """What one engine answers."""
    with LLM("tiny", dtype="float32", enforce_eager=True, max_num_seqs=SEATS, device="cpu") as llm:
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        return {one.prompt: one.outputs[0].text for one in llm.generate(PROMPTS, params, use_tqdm=False)}


def test_ray_listens_on_this_machine_only(command):
    """But for a port of each replica, for other deployments, which Ray opens everywhere and guards by a token."""
    replicas = {one.pid for one in command.replicas()}
    others = {command.process.pid, *(one.pid for one in descendants(command.process.pid))} - replicas
    listening = [one for one in psutil.net_connections("tcp") if one.status == "LISTEN"]
    assert {one.laddr.ip.removeprefix("::ffff:") for one in listening if one.pid in others} == {"127.0.0.1"}
    assert sum(one.laddr.ip == "::" for one in listening if one.pid in replicas) == len(replicas) == 2


def test_a_prompt_goes_where_its_beginning_has_been_computed(command, report):
    before = command.counts("prefix_cache_hits")
    found = []
    for group in range(20):
        shared = f"In house number {group} " + "there lived a cat and a dog and a bird and a mouse. " * 4
        command.ask(shared + "The cat", max_tokens=1)
        usage = command.ask(shared + "A dog and", max_tokens=1)["usage"]
        found.append(usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"])
    hits = {replica: count - before[replica] for replica, count in command.counts("prefix_cache_hits").items()}
    report("routing by prefix", f"share of the second prompts found: {min(found):.0%} at least; tokens: {hits}")
    assert min(found) > 0.7  # one that went to the other replica would have found nothing
    assert len(hits) == 2
    assert all(hits.values())


@dataclass
class Seen:
    """What one client has of its answer."""

    text: str = ""
    error: str | None = None
    is_whole: bool = False


async def stream(client: httpx.AsyncClient, prompt: str, seen: Seen) -> None:
    asked = {"prompt": prompt, "temperature": 0, "max_tokens": 40, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/completions", json=asked) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if not line:
                continue
            assert not seen.is_whole, "nothing comes after [DONE]"
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                seen.is_whole = True
            elif "error" in (event := json.loads(data)):
                seen.error = event["error"]["message"]
            else:
                seen.text += event["choices"][0]["text"]


def test_a_replica_is_killed_under_load_and_no_request_is_lost(command, texts, report):
    asked = [PROMPTS[at % len(PROMPTS)] for at in range(CLIENTS)]
    seen = [Seen() for _ in asked]

    async def load() -> int:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=command.url, timeout=120, limits=limits, trust_env=False) as client:
            tasks = [asyncio.create_task(stream(client, *one)) for one in zip(asked, seen, strict=True)]
            while sum(bool(one.text) for one in seen) < SEATS:
                await asyncio.sleep(0.005)
            command.replicas()[0].kill()
            begun = sum(bool(one.text) for one in seen)
            await asyncio.gather(*tasks)
            return begun

    start = time.monotonic()
    begun = asyncio.run(load())
    kinds = collections.Counter("broken off" if one.error else "whole" for one in seen)
    report("a replica killed", f"{CLIENTS} clients, {begun} streams begun at the kill: {dict(kinds)}, "
                               f"{time.monotonic() - start:.1f} s")  # fmt: skip
    for prompt, one in zip(asked, seen, strict=True):
        assert one.is_whole
        if one.error is None:
            assert one.text == texts[prompt]
        else:
            assert "failed" in one.error
            assert one.text, "a request that had not begun to stream is retried"
            assert texts[prompt].startswith(one.text)
    assert 0 < kinds["broken off"] < CLIENTS / 2 < kinds["whole"]
    assert until(lambda: len(command.counts("generation_tokens")) == 2, 120), "Ray starts another in its place"


def test_sigterm_lets_what_runs_end(command, texts):
    processes = descendants(command.process.pid)

    async def last() -> Seen:
        seen = Seen()
        async with httpx.AsyncClient(base_url=command.url, timeout=60, trust_env=False) as client:
            task = asyncio.create_task(stream(client, PROMPTS[0], seen))
            while not seen.text:
                await asyncio.sleep(0.001)
            command.process.send_signal(signal.SIGTERM)
            await task
        return seen

    seen = asyncio.run(last())
    assert (seen.text, seen.error) == (texts[PROMPTS[0]], None)
    assert command.process.wait(60) == 0
    assert until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes), 30)
