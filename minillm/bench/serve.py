"""`minillm bench serve`: a load on any server with OpenAI's HTTP interface, as `vllm bench serve` measures it.

The requests are sent at their times, whether earlier ones are answered or not: a server that is too slow is seen as
growing latency. `measure` is for programs and notebooks.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractAsyncContextManager, aclosing, closing, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from tqdm.auto import tqdm

from minillm.bench.results import check_writable, write_json
from minillm.bench.serving import METRICS, OBJECTIVES, Record, ServeResult
from minillm.bench.traffic import (
    WORDS,
    TimedRequest,
    arrival_times,
    poisson,
    random_requests,
    trace_requests,
)
from minillm.client import CHAT_COMPLETIONS, COMPLETIONS, STREAM, Endpoint, Event, async_events
from minillm.errors import ConfigError, InvalidRequestError, ServerError

__all__ = ["Interrupted", "Load", "Measurement", "ServeResult", "TimedRequest", "measure", "poisson"]

DEFAULT_NUM_PROMPTS, DEFAULT_INPUT_LEN, DEFAULT_OUTPUT_LEN = 1000, 32, 128
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
BACKENDS = {"openai": COMPLETIONS, "vllm": COMPLETIONS, "openai-chat": CHAT_COMPLETIONS}
"""vLLM's names of what is asked how, and the paths."""
WARM_UP_TOKENS = 8
SHOWN_ERRORS = 5


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is sent where.

    Attributes:
        endpoint: a path that ends in ``completions``; in ``chat/completions``: prompts are texts.
        model: as the server calls it; the first that it serves when None.
        max_concurrency: requests on their way at the same time; others wait here, and their clock with them.
        num_warmups: short requests that go before, one after the other, unmeasured.
        ignore_eos: answers go on to their full length: a field that vLLM's and minillm's servers know.
        api_key: the environment's OPENAI_API_KEY when None.

    Raises:
        ConfigError, InvalidRequestError: what cannot be sent.
    """

    base_url: str = "http://127.0.0.1:8000"
    endpoint: str = COMPLETIONS
    model: str | None = None
    requests: Sequence[TimedRequest]
    max_concurrency: int | None = None
    num_warmups: int = 1
    ignore_eos: bool = False
    api_key: str | None = None

    def __post_init__(self) -> None:
        if not self.endpoint.endswith("completions"):
            raise ConfigError(f"the endpoint must be /v1/completions or /v1/chat/completions, not {self.endpoint!r}")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"max_concurrency must be at least 1, not {self.max_concurrency}")
        if self.num_warmups < 0:
            raise ConfigError(f"num_warmups must be at least 0, not {self.num_warmups}")
        if not self.requests:
            raise InvalidRequestError("there are no requests to send")
        if not all(math.isfinite(request.at_s) for request in self.requests):
            raise InvalidRequestError("a request's time must be a finite number of seconds")
        if is_chat(self.endpoint) and not all(isinstance(request.prompt_ids, str) for request in self.requests):
            raise InvalidRequestError("a chat takes texts, not token ids: make the requests without vocab_size")

    @property
    def request_rate(self) -> float:
        """Requests a second; infinite when all are sent at once."""
        last = max(request.at_s for request in self.requests)
        return len(self.requests) / last if last > 0 else math.inf

    def body(self, request: TimedRequest, model: str) -> dict[str, Any]:
        """What is posted for a request."""
        asked = {"model": model, "max_tokens": request.max_tokens, **STREAM}
        if self.ignore_eos:
            asked["ignore_eos"] = True
        if is_chat(self.endpoint):
            return asked | {"messages": [{"role": "user", "content": request.prompt_ids}]}
        return asked | {"prompt": request.prompt_ids}


def is_chat(endpoint: str) -> bool:
    """Whether requests to this path are conversations."""
    return endpoint.endswith("chat/completions")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a measurement; `result` is what was measured until then."""

    def __init__(self, result: ServeResult) -> None:
        super().__init__()
        self.result = result


def measure(load: Load, *, use_tqdm: bool = False) -> ServeResult:
    """Send a load and wait until all is answered or has failed; warm-ups go before, unmeasured.

    It runs in a thread of its own, so that it can be called where an event loop runs, as in notebooks.

    Raises:
        ServerError: the server cannot be reached, or refuses a warm-up.
        Interrupted: Ctrl-C; it holds what was measured.
    """
    measurement = Measurement(load, use_tqdm=use_tqdm)
    loop = asyncio.new_event_loop()
    task = loop.create_task(measurement.run())
    with closing(loop), ThreadPoolExecutor(1) as pool:
        running = pool.submit(loop.run_until_complete, task)
        try:
            while not running.done():
                wait([running], timeout=0.2)  # Windows lets no Ctrl-C through while it waits
        except KeyboardInterrupt:
            loop.call_soon_threadsafe(task.cancel)
            wait([running])
            raise Interrupted(measurement.result) from None
        running.result()
    return measurement.result


class Measurement:
    """A load on its way.

    Args:
        clock: seconds from anywhere, as time goes for the event loop that runs it.
        transport: httpx's way to the server, where it is not the network.
    """

    def __init__(
        self,
        load: Load,
        *,
        use_tqdm: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._load = load
        self._endpoint = Endpoint(load.base_url, load.api_key)
        self._model = self._endpoint.models()[0] if load.model is None else load.model
        self._use_tqdm = use_tqdm
        self._clock = clock
        self._transport = transport
        self._start = self._duration = 0.0
        self._records: list[Record] = []

    @property
    def result(self) -> ServeResult:
        """What has been measured so far."""
        records = sorted(self._records, key=lambda record: record.start_s)
        return ServeResult(self._model, records, self._duration, self._load.request_rate, self._load.max_concurrency)

    async def run(self) -> None:
        """Send all, and wait for the answers.

        Raises:
            ServerError: the server cannot be reached, or refuses a warm-up.
        """
        async with httpx.AsyncClient(**self._endpoint.client_options, transport=self._transport) as client:
            await self._warm_up(client)
            self._start = self._clock()
            try:
                await self._send_all(client)
            finally:
                self._duration = self._now()

    def _now(self) -> float:
        return self._clock() - self._start

    async def _warm_up(self, client: httpx.AsyncClient) -> None:
        """Short requests, backwards: the server shall not remember the beginning of one that is measured."""
        request = min(self._load.requests, key=lambda one: len(one.prompt_ids) + one.max_tokens)
        short = TimedRequest(0.0, request.prompt_ids[::-1], min(request.max_tokens, WARM_UP_TOKENS))
        for _ in range(self._load.num_warmups):
            await self._answer(client, short, Record(0.0))

    async def _send_all(self, client: httpx.AsyncClient) -> None:
        limit = self._load.max_concurrency
        gate = nullcontext() if limit is None else asyncio.Semaphore(limit)
        with tqdm(total=len(self._load.requests), disable=not self._use_tqdm) as bar:
            async with asyncio.TaskGroup() as group:
                for request in sorted(self._load.requests, key=lambda one: one.at_s):
                    await asyncio.sleep(max(0.0, request.at_s - self._now()))
                    group.create_task(self._send(client, request, gate, bar))

    async def _send(
        self, client: httpx.AsyncClient, request: TimedRequest, gate: AbstractAsyncContextManager[None], bar: Any
    ) -> None:
        async with gate:
            record = Record(self._now())
            try:
                await self._answer(client, request, record)
            except ServerError as error:
                record.error = str(error)
            self._records.append(record)
            bar.update()

    async def _answer(self, client: httpx.AsyncClient, request: TimedRequest, record: Record) -> None:
        """Ask, and write down when the pieces come.

        Raises:
            ServerError: the answer does not come, breaks off, or cannot be counted.
        """
        asked = self._load.body(request, self._model)
        async with aclosing(async_events(client, self._load.endpoint, asked)) as events:
            async for event in events:
                if _is_piece(event):
                    record.pieces_s.append(self._now())
                usage = event.get("usage") or {}
                record.input_tokens = usage.get("prompt_tokens") or record.input_tokens
                record.output_tokens = usage.get("completion_tokens") or record.output_tokens
        if not record.pieces_s:
            raise ServerError("the answer holds no token")
        if not record.output_tokens:
            raise ServerError("the answer ends without usage (stream_options.include_usage): tokens cannot be counted")


def _is_piece(event: Event) -> bool:
    """Whether it brings tokens (whose text may be empty), and not only says whose turn it is, or that all is said."""
    for choice in event.get("choices") or ():
        delta = choice.get("delta")
        if delta is None:  # a completion's
            return True
        return any(value for name, value in delta.items() if name != "role") or bool(delta and "role" not in delta)
    return False


@dataclass(frozen=True)
class Shown:
    """What is printed and saved of a result.

    Attributes:
        metrics: of `METRICS`.
        percentiles: of each.
        objectives: milliseconds, by the names of `OBJECTIVES`.
    """

    metrics: list[str]
    percentiles: list[float]
    objectives: dict[str, float]

    @classmethod
    def parse(cls, metrics: str, percentiles: str, objectives: Sequence[str]) -> Shown:
        """From what was typed: names and numbers with commas, and NAME:MILLISECONDS.

        Raises:
            ConfigError: something else was typed.
        """
        names = metrics.split(",")
        if unknown := [name for name in names if name not in METRICS]:
            raise ConfigError(f"--percentile-metrics are of {','.join(METRICS)}, not {unknown[0]!r}")
        numbers = [_number(text) for text in percentiles.split(",")]
        if not all(0 <= number <= 100 for number in numbers):
            raise ConfigError(f"--metric-percentiles are numbers from 0 to 100, with commas, not {percentiles!r}")
        parted = {name: _number(limit) for name, _, limit in (text.partition(":") for text in objectives)}
        if not set(parted) <= set(OBJECTIVES) or not all(limit >= 0 for limit in parted.values()):
            raise ConfigError(
                f"--goodput is one or several of {', '.join(OBJECTIVES)} with milliseconds, as ttft:500 tpot:50, "
                f"not {' '.join(objectives)!r}"
            )
        return cls(names, numbers, parted)


def _number(text: str) -> float:
    """NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


@dataclass(frozen=True)
class Target:
    """Where the load goes, as typed; None where nothing was.

    Attributes:
        backend: of `BACKENDS`.
        base_url: instead of host and port.
        path: the backend's when None.

    Raises:
        ConfigError: options that contradict each other.
    """

    backend: str | None
    base_url: str | None
    host: str | None
    port: int | None
    path: str | None

    def __post_init__(self) -> None:
        if self.base_url is not None and (self.host is not None or self.port is not None):
            raise ConfigError("--base-url holds host and port: leave it out, or --host and --port")
        if self.backend is None:
            return
        if self.backend not in BACKENDS:
            raise ConfigError(f"--backend must be one of {', '.join(BACKENDS)}, not {self.backend!r}")
        if self.path is not None and is_chat(self.path) != is_chat(BACKENDS[self.backend]):
            raise ConfigError(f"--backend {self.backend} asks {BACKENDS[self.backend]}, not {self.path}: leave one out")

    @property
    def url(self) -> str:
        """The server's."""
        if self.base_url is not None:
            return self.base_url
        host = DEFAULT_HOST if self.host is None else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port or DEFAULT_PORT}"

    @property
    def endpoint(self) -> str:
        """The path of what is asked."""
        return BACKENDS[self.backend or "openai"] if self.path is None else self.path

    @property
    def label(self) -> str:
        """The backend's name."""
        return self.backend or ("openai-chat" if is_chat(self.endpoint) else "openai")


@dataclass(frozen=True)
class ResultFile:
    """Whether and where a result is saved, as typed; None where nothing was.

    Attributes:
        save: write a file; its name tells what was measured, where `name` is None.
        folder: made if need be; the current one when None.
        output_json: the file's path, instead of the others.

    Raises:
        ConfigError: options that contradict each other, or a file that cannot be written.
    """

    save: bool
    folder: Path | None
    name: str | None
    output_json: Path | None

    def __post_init__(self) -> None:
        is_placed = self.folder is not None or self.name is not None
        if is_placed and not self.save:
            raise ConfigError("--result-dir and --result-filename are for --save-result: give it too")
        if is_placed and self.output_json is not None:
            raise ConfigError("--output-json is a path: leave it out, or --result-dir and --result-filename")
        check_writable(self.output_json)

    def path(self, target: Target, load: Load, model: str) -> Path | None:
        """The file, in a folder that exists; None: save nothing. The name is as vLLM's where none was typed.

        Raises:
            ConfigError: it cannot be written.
        """
        if self.output_json is not None or not self.save:
            return self.output_json
        limit = "" if load.max_concurrency is None else f"-concurrency{load.max_concurrency}"
        what = f"{target.label}-{load.request_rate:g}qps{limit}-{Path(model).name}"
        path = (self.folder or Path()) / (self.name or f"{what}-{datetime.now():%Y%m%d-%H%M%S}.json")
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"--result-dir {self.folder} cannot be made: {error.strerror or error}") from error
        check_writable(path)
        return path


@dataclass(frozen=True)
class Dataset:
    """Where requests come from, as typed; None where nothing was.

    Attributes:
        name: "random", or "trace": times and lengths from the file `path`.

    Raises:
        ConfigError: options that contradict each other.
    """

    name: str
    path: Path | None
    num_prompts: int | None
    input_len: int | None
    output_len: int | None
    range_ratio: float | None
    request_rate: float | None
    burstiness: float | None
    seed: int

    def __post_init__(self) -> None:
        if self.name not in ("random", "trace"):
            raise ConfigError(f"--dataset-name must be random or trace, not {self.name!r}")
        if (self.name == "trace") != (self.path is not None):
            raise ConfigError("--dataset-name trace and --dataset-path, a CSV file of times and lengths, go together")
        of_random = (self.input_len, self.output_len, self.range_ratio, self.request_rate, self.burstiness)
        if self.name == "trace" and any(option is not None for option in of_random):
            raise ConfigError(
                "a trace has times and lengths of its own: leave --request-rate, --burstiness, --random-… out"
            )

    def requests(self, tokens: Sequence[int] | Sequence[str]) -> list[TimedRequest]:
        """The requests, with prompts of these tokens or words.

        Raises:
            InvalidRequestError: numbers out of range, or a file that is no trace.
        """
        if self.path is not None:
            return trace_requests(self.path, self.num_prompts, tokens, self.seed)
        rate = math.inf if self.request_rate is None else self.request_rate
        burstiness = 1.0 if self.burstiness is None else self.burstiness
        times = arrival_times(self.num_prompts or DEFAULT_NUM_PROMPTS, rate, burstiness, self.seed)
        lengths = (self.input_len or DEFAULT_INPUT_LEN, self.output_len or DEFAULT_OUTPUT_LEN)
        return random_requests(times, *lengths, self.range_ratio or 0.0, tokens, self.seed)


def main(
    target: Target,
    dataset: Dataset,
    shown: Shown,
    file: ResultFile,
    *,
    model: str | None,
    api_key: str | None,
    vocab_size: int | None,
    max_concurrency: int | None,
    num_warmups: int,
    ignore_eos: bool,
    disable_tqdm: bool,
) -> None:
    """Measure, print, and save; after Ctrl-C what was measured until then.

    Args:
        vocab_size: prompts are of token ids below it; when None, of ids that the server tells.

    Raises:
        ConfigError, InvalidRequestError: options that contradict each other, or that no request can be made of.
        ServerError: the server cannot be reached, refuses a warm-up, or answers none.
        Interrupted: Ctrl-C.
    """
    server = Endpoint(target.url, api_key)
    name = server.models()[0] if model is None else model
    load = Load(
        base_url=target.url,
        endpoint=target.endpoint,
        model=name,
        requests=dataset.requests(_tokens(server, target.endpoint, name, vocab_size)),
        max_concurrency=max_concurrency,
        num_warmups=num_warmups,
        ignore_eos=ignore_eos,
        api_key=api_key,
    )
    output_json = file.path(target, load, name)
    try:
        result = measure(load, use_tqdm=not disable_tqdm)
    except Interrupted as interrupted:
        _report(interrupted.result, shown, output_json)
        raise
    _report(result, shown, output_json)
    if not result.num_completed:
        raise ServerError(f"{target.url} answered none of {result.num_failed} requests: {result.errors[0]}")


def _tokens(server: Endpoint, path: str, model: str, vocab_size: int | None) -> Sequence[int] | Sequence[str]:
    """What prompts are drawn from: ids of the vocabulary, ids that the server makes of words, or words."""
    if is_chat(path):
        if vocab_size is not None:
            raise ConfigError("--vocab-size is for prompts of token ids: a chat takes texts")
        return WORDS
    if vocab_size is not None:
        return range(vocab_size)
    ids = server.tokenize(" ".join(WORDS), model)
    if ids:
        return sorted(set(ids))
    Console(stderr=True).print(
        "the server tells no token ids (/tokenize): prompts are words, which may be more tokens, unless --vocab-size "
        "is given",
        style="yellow",
        soft_wrap=True,
    )
    return WORDS


def _report(result: ServeResult, shown: Shown, output_json: Path | None) -> None:
    """Print the table and what failed, and write the file."""
    if output_json is not None:
        content = {"date": f"{datetime.now():%Y%m%d-%H%M%S}"}
        write_json(output_json, content | result.as_json(shown.metrics, shown.percentiles, shown.objectives))
    out = Console(highlight=False)
    out.print(result.table(shown.metrics, shown.percentiles, shown.objectives))
    kinds = Counter(result.errors).most_common()
    for error, count in kinds[:SHOWN_ERRORS]:
        out.print(f"[red]failed[/red] {count} × {escape(error)}", soft_wrap=True)
    if len(kinds) > SHOWN_ERRORS:
        out.print(f"and for {len(kinds) - SHOWN_ERRORS} more reasons")
    if output_json is not None:
        out.print(f"saved in {escape(str(output_json))}", soft_wrap=True)
