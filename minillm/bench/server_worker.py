"""minillm's server behind the protocol of `worker.py`: what serving costs beside `LLM`.

The server is a process of its own, as users start it; this one is the client of all requests, each a stream.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time

import httpx

import minillm
from minillm.bench.worker import Ask, Clock, Measured, serve
from minillm.client import COMPLETIONS, STREAM, Endpoint, async_events


class MinillmServer:
    """`minillm serve` on the CPU, without prefix caching: a repetition would find the prompts of the run before."""

    def __init__(self, model: str, dtype: str, threads: int, max_model_len: int) -> None:
        self.version = f"minillm serve {minillm.__version__}"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        options = {"dtype": dtype, "device": "cpu", "max-model-len": max_model_len, "port": port}
        self.command = [sys.executable, "-m", "minillm", "serve", model, "--no-enable-prefix-caching"]
        self.command += [f"--{name}={value}" for name, value in options.items()]
        self.process = subprocess.Popen(self.command)  # its threads are as many as the environment says
        self.url = f"http://127.0.0.1:{port}"
        self._wait()

    def _wait(self) -> None:
        with httpx.Client(base_url=self.url, trust_env=False) as client:
            while self.process.poll() is None:
                try:
                    client.get("/health").raise_for_status()
                    return
                except httpx.HTTPError:
                    time.sleep(0.1)
        raise RuntimeError(f"the server ended with status {self.process.returncode}")

    def run(self, asks: list[Ask]) -> Measured:
        return asyncio.run(self._run(asks))

    async def _run(self, asks: list[Ask]) -> Measured:
        async with httpx.AsyncClient(**Endpoint(self.url).client_options, trust_env=False) as client:
            clock = Clock()
            answers = await asyncio.gather(*(self._answer(client, ask, clock) for ask in asks))
            return clock.stop(list(answers))

    @staticmethod
    async def _answer(client: httpx.AsyncClient, ask: Ask, clock: Clock) -> list[int]:
        prompt, count = ask
        asked = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        tokens: list[int] = []
        async for event in async_events(client, COMPLETIONS, asked | STREAM):
            for choice in event["choices"]:  # none in the last event, which counts tokens
                tokens += choice["token_ids"]
                clock.token()
        return tokens


if __name__ == "__main__":
    serve(MinillmServer)
