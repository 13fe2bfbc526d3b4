"""minillm bench serve: its arithmetic on a scripted server in virtual time, its requests on a real one."""

from __future__ import annotations

import asyncio
import http.server
import json
import math
import signal
import socket
import statistics
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from selectors import DefaultSelector

import httpx
import numpy as np
import pytest

from minillm import cli
from minillm.bench.serve import (
    Interrupted,
    Load,
    Measurement,
    ServeResult,
    Target,
    TimedRequest,
    measure,
    poisson,
)
from minillm.bench.serving import Record
from minillm.bench.traffic import WORDS, arrival_times, random_requests, trace_requests
from minillm.client import Endpoint
from minillm.errors import ConfigError, InvalidRequestError, ServerError
from minillm.simulate.trace import load_trace
from tests.helpers import SHARED
from tests.server.conftest import SMALL, forget_proxies, running

# --- virtual time, and a server that answers by a script


class VirtualSelector(DefaultSelector):
    """Waits for nothing: the time that it was to wait has passed at once."""

    now = 0.0

    def select(self, timeout=None):
        self.now += timeout or 0.0
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.selector = VirtualSelector()
        super().__init__(self.selector)

    def time(self):
        return self.selector.now


@dataclass
class Script:
    """What is said to a request: pairs of seconds to wait and what then comes; an exception breaks the answer off."""

    steps: list[tuple[float, object]]
    status: int = 200
    content_type: str = "text/event-stream"


class Stream(httpx.AsyncByteStream):
    def __init__(self, script: Script):
        self.script = script

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for seconds, what in self.script.steps:
            await asyncio.sleep(seconds)
            if isinstance(what, Exception):
                raise what
            yield what if isinstance(what, bytes) else f"data: {json.dumps(what)}\n\n".encode()


@dataclass
class ScriptedServer(httpx.AsyncBaseTransport):
    """Answers warm-ups at once, and then by the scripts, in turn."""

    scripts: list[Script]
    num_warmups: int = 1
    asked: list[dict] = field(default_factory=list)

    async def handle_async_request(self, request):
        self.asked.append(json.loads(await request.aread()))
        measured = len(self.asked) - 1 - self.num_warmups
        script = answer([0.0]) if measured < 0 else self.scripts[measured]
        headers = {"content-type": script.content_type}
        return httpx.Response(script.status, headers=headers, stream=Stream(script), request=request)


def piece(text="a", reason=None):
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}


def usage(prompt=3, new=1):
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": new}}


def answer(waits, prompt=3, new=None) -> Script:
    """A completion whose pieces come so many seconds after each other; usage and the end follow half a second later."""
    new = len(waits) if new is None else new
    steps = [(seconds, piece()) for seconds in waits]
    return Script([*steps, (0.5, usage(prompt, new)), (0.0, b"data: [DONE]\n\n")])


def virtually(scripts, requests, **options) -> tuple[ServeResult, list[dict]]:
    """The result, and what was asked; the warm-up first."""
    load = Load(**{"model": "m", "requests": requests} | options)
    server = ScriptedServer(scripts, load.num_warmups)
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        measurement = Measurement(load, clock=runner.get_loop().time, transport=server)
        runner.run(measurement.run())
    return measurement.result, server.asked


def at(*times, prompt=(1, 2, 3)):
    return [TimedRequest(seconds, list(prompt), 8) for seconds in times]


def test_every_metric_by_hand():
    scripts = [answer([0.25, 0.125, 0.5]), answer([1.0]), answer([0.5, 0.25], prompt=4, new=5)]
    found, _ = virtually(scripts, at(0.0, 0.5, 2.0))
    assert found.num_completed == 3
    assert found.num_failed == 0
    assert [record.start_s for record in found.records] == [0.0, 0.5, 2.0]
    assert found.ttft_s.tolist() == [0.25, 1.0, 0.5]
    assert found.e2e_s.tolist() == [0.875, 1.0, 0.75]
    assert found.itl_s.tolist() == [0.125, 0.5, 0.25]
    assert found.tpot_s.tolist() == [0.625 / 2, 0.25 / 4]  # not of the answer of one token
    assert found.duration_s == 2.0 + 0.75 + 0.5
    assert (found.input_tokens, found.output_tokens) == (10, 9)
    assert found.peak_concurrency == 2
    assert found.request_rate == 1.5
    assert found.per_second(found.output_tokens) == 9 / 3.25
    good = {
        (): 3,
        (("ttft_s", 0.5),): 2,
        (("tpot_s", 0.0625),): 2,  # the answer of one token always keeps to it
        (("e2e_s", 0.9),): 2,
        (("ttft_s", 0.5), ("tpot_s", 0.1)): 1,
        (("e2e_s", 0.1),): 0,
    }
    for objectives, count in good.items():
        assert found.goodput(**dict(objectives)) == count / 3.25


def test_requests_are_sent_at_their_times_whether_others_are_answered_or_not():
    found, _ = virtually([answer([10.0])] * 4, at(3.0, 0.0, 1.0, 2.0))
    assert [record.start_s for record in found.records] == [0.0, 1.0, 2.0, 3.0]
    assert found.peak_concurrency == 4
    assert found.duration_s == 13.5


def test_a_limit_of_concurrency_holds_requests_back_and_their_clocks():
    found, _ = virtually([answer([1.0])] * 4, at(0.0, 0.0, 0.0, 5.0), max_concurrency=2)
    assert [record.start_s for record in found.records] == [0.0, 0.0, 1.5, 5.0]  # when the usage has come, too
    assert found.ttft_s.tolist() == [1.0] * 4
    assert found.peak_concurrency == 2


def test_what_is_asked():
    requests = [TimedRequest(0.0, [1, 2, 3], 20), TimedRequest(0.0, [7, 8, 9, 10], 30)]
    _, asked = virtually([answer([0.0])] * 2, requests, ignore_eos=True)
    common = {"model": "m", "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    assert asked == [  # the warm-up is short, and no beginning of what is measured
        common | {"prompt": [3, 2, 1], "max_tokens": 8},
        common | {"prompt": [1, 2, 3], "max_tokens": 20},
        common | {"prompt": [7, 8, 9, 10], "max_tokens": 30},
    ]
    del common["ignore_eos"]
    said = [TimedRequest(0.0, "how are you", 5)]
    _, asked = virtually([answer([0.0])], said, endpoint="/v1/chat/completions")
    assert asked[1] == common | {"messages": [{"role": "user", "content": "how are you"}], "max_tokens": 5}


def test_a_chats_first_event_may_be_no_token():
    def delta(**fields):
        return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}

    turn, last = delta(role="assistant", content=""), {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    steps = [
        (1.0, turn),
        (1.0, delta(content="a")),
        (1.0, delta(content="")),
        (1.0, delta(role="assistant", content="b")),
    ]
    script = Script([*steps, (1.0, last), (1.0, usage(3, 3))])
    found, _ = virtually([script], [TimedRequest(0.0, "hi", 5)], endpoint="/v1/chat/completions")
    assert found.records[0].pieces_s == [2.0, 3.0, 4.0]


FAILURES = {
    "429: too many": Script([(0.0, b'{"error": {"message": "too many"}}')], status=429),
    "503: Service Unavailable": Script([], status=503),
    "no stream": Script([(0.0, b"<html>welcome</html>")], content_type="text/html"),
    "broke the answer off: out of memory": Script([(0.1, piece()), (0.1, {"error": {"message": "out of memory"}})]),
    "broke off: gone": Script([(0.1, piece()), (0.1, httpx.RemoteProtocolError("gone"))]),
    "is the server running": Script([(0.0, httpx.ConnectError("refused"))]),
    "not JSON": Script([(0.0, b"data: {oh\n\n")]),
    "no piece": Script([(0.0, b"data: 3\n\n")]),
    "holds no token": Script([(0.0, usage())]),
    "without usage": Script([(0.0, piece())]),
}


def test_failures_are_counted_told_and_in_no_metric():
    scripts = [answer([0.25]), *FAILURES.values(), answer([0.5])]
    found, _ = virtually(scripts, at(*range(len(scripts))))
    assert found.num_completed == 2
    assert found.num_failed == len(FAILURES)
    for expected, error in zip(FAILURES, found.errors, strict=True):
        assert expected in error
    assert found.ttft_s.tolist() == [0.25, 0.5]
    assert found.output_tokens == 2


def test_a_comment_and_an_unknown_field_of_a_stream_are_passed_over():
    script = Script([(0.0, b": ping\n\n"), (0.0, b"event: x\nid: 3\n"), (1.0, piece()), (0.0, usage())])
    found, _ = virtually([script], at(0.0))
    assert found.errors == []
    assert found.ttft_s.tolist() == [1.0]


@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_at_once_is_not_measured(name):
    class Failing(ScriptedServer):
        async def handle_async_request(self, request):
            script = FAILURES[name]
            headers = {"content-type": script.content_type}
            return httpx.Response(script.status, headers=headers, stream=Stream(script), request=request)

    measurement = Measurement(Load(model="m", requests=at(0.0)), transport=Failing([]))
    with pytest.raises(ServerError, match=name):
        asyncio.run(measurement.run())


# --- results


def result(*ttfts) -> ServeResult:
    return ServeResult("m", [Record(0.0, [ttft, ttft + 1.0], 5, 2) for ttft in ttfts], 10.0)


def test_percentiles_are_linear_between_neighbours():
    values = np.random.default_rng(0).exponential(size=41).tolist()
    found = result(*values)
    # The standard library's own.
    for percent, expected in enumerate(statistics.quantiles(values, n=100, method="inclusive"), 1):
        assert found.percentile("ttft", percent) == pytest.approx(expected)
    assert found.percentile("ttft", 100) == max(values)
    assert found.mean("ttft") == pytest.approx(statistics.mean(values))
    assert found.std("ttft") == pytest.approx(statistics.pstdev(values))


def test_nothing_measured_is_no_number():
    found = ServeResult("m", [], 0.0)
    assert math.isnan(found.percentile("itl", 50))
    assert math.isnan(found.goodput())
    assert found.peak_concurrency == 0
    text = json.dumps(found.as_json(), allow_nan=False)
    assert json.loads(text)["p99_ttft_ms"] is None
    assert found.table().row_count > 0


def test_json_has_vllms_names():
    found = result(0.25, 0.75).as_json(["ttft", "e2el"], [50, 99.9], {"ttft": 500})
    assert found["completed"] == 2
    assert found["request_throughput"] == 0.2
    assert found["request_goodput"] == 0.1
    assert found["output_throughput"] == 0.4
    assert found["total_token_throughput"] == 1.4
    assert found["request_rate"] == "inf"
    assert (found["mean_ttft_ms"], found["median_ttft_ms"], found["std_ttft_ms"]) == (500, 500, 250)
    assert found["p50_e2el_ms"] == 1500
    assert found["p99.9_ttft_ms"] == pytest.approx(749.5)
    assert (found["ttfts"], found["itls"], found["errors"]) == ([0.25, 0.75], [[1.0], [1.0]], ["", ""])
    assert "mean_tpot_ms" not in found


def test_wrong_names_are_refused():
    for wrong in (
        lambda: result(1.0).percentile("latency", 50),
        lambda: result(1.0).percentile("ttft", 101),
        lambda: result(1.0).table(["latency"]),
        lambda: result(1.0).table(objectives={"itl": 3}),
    ):
        with pytest.raises(ConfigError):
            wrong()


# --- requests


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_are_a_gamma_process(burstiness):
    times = np.array(arrival_times(20_000, 8.0, burstiness, seed=3))
    gaps = np.diff(times, prepend=0.0)
    assert times[-1] == pytest.approx(20_000 / 8)
    assert (gaps >= 0).all()
    # A gamma distribution of shape k has the mean's 1/k-fold square as variance, and a skewness of 2/sqrt(k).
    assert gaps.mean() == pytest.approx(1 / 8)
    assert gaps.var() * 64 == pytest.approx(1 / burstiness, rel=0.05)
    skewness = ((gaps - gaps.mean()) ** 3).mean() / gaps.std() ** 3
    assert skewness == pytest.approx(2 / math.sqrt(burstiness), rel=0.1)
    neighbours = np.corrcoef(gaps[:-1], gaps[1:])[0, 1]
    assert abs(neighbours) < 0.03  # independent


def test_poisson_counts_in_a_second_have_their_mean_as_variance():
    requests = poisson(20_000, 8.0, 4, 6, seed=1, vocab_size=50)
    counts = np.bincount([int(one.at_s) for one in requests])[:-1]
    assert counts.mean() == pytest.approx(8, rel=0.02)
    assert counts.var() == pytest.approx(8, rel=0.1)
    assert all(len(one.prompt_ids) == 4 and one.max_tokens == 6 for one in requests)
    drawn = np.bincount([token for one in requests for token in one.prompt_ids], minlength=50)
    assert drawn.min() > 0.9 * 80_000 / 50
    assert drawn.max() < 1.1 * 80_000 / 50
    assert len(drawn) == 50


def test_arrivals_at_once_or_evenly_and_again():
    assert arrival_times(3, math.inf, 1.0, 0) == [0, 0, 0]
    assert arrival_times(3, 2.0, math.inf, 0) == [0.5, 1.0, 1.5]
    assert poisson(9, 2.0, 3, 3, 5, 10) == poisson(9, 2.0, 3, 3, 5, 10) != poisson(9, 2.0, 3, 3, 6, 10)
    for num, rate, burstiness in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (1, -1, 1), (1, math.nan, 1)):
        with pytest.raises(InvalidRequestError, match="above 0"):
            arrival_times(num, rate, burstiness, 0)


def test_lengths_within_a_ratio_and_words():
    times = [0.0] * 2000
    requests = random_requests(times, 10, 100, 0.2, WORDS, seed=0)
    assert {len(one.prompt_ids.split()) for one in requests} == set(range(8, 13))
    assert {one.max_tokens for one in requests} == set(range(80, 121))
    for wrong in ((0, 1, 0.0, WORDS), (1, 0, 0.0, WORDS), (1, 1, 1.0, WORDS), (1, 1, 0.0, [])):
        with pytest.raises(InvalidRequestError, match="ratio"):
            random_requests(times, *wrong, seed=0)


def test_traces(tmp_path):
    rows = [(100.5, 5, 7), (101.0, 3, 2), (103.25, 4, 1)]
    forms = {
        "arrival_time,prompt_tokens,output_tokens": [f"{t},{p},{n}" for t, p, n in rows],
        "timestamp_ms,prompt_tokens,output_tokens": [f"{int(t * 1000)},{p},{n if n > 1 else 0}" for t, p, n in rows],
        "TIMESTAMP,ContextTokens,GeneratedTokens": [f"2023-11-16 18:01:{t - 60:011.8f},{p},{n}" for t, p, n in rows],
    }
    for header, lines in forms.items():
        file = tmp_path / "trace.csv"
        file.write_text("\n".join([header, *lines]))
        requests = trace_requests(file, None, range(9), seed=0)
        assert [one.at_s for one in requests] == pytest.approx([0.0, 0.5, 2.75])
        assert [(len(one.prompt_ids), one.max_tokens) for one in requests] == [(5, 7), (3, 2), (4, 1)]
    assert len(trace_requests(file, 2, range(9), seed=0)) == 2
    with pytest.raises(InvalidRequestError, match="holds 3 requests: set --num-prompts"):
        trace_requests(file, 4, range(9), seed=0)
    file.write_text("timestamp_ms,prompt_tokens,output_tokens\n0,3,-1\n")
    with pytest.raises(InvalidRequestError, match=r"trace\.csv"):
        load_trace(file)


def test_real_traces():
    folder = SHARED / "traces"
    if not folder.exists():
        pytest.skip("no shared/traces beside the checkout")
    chats = load_trace(folder / "chat_8min_lengths.csv")
    assert len(chats) == 2026
    assert 400 < chats[-1].time < 480
    assert len(load_trace(folder / "AzureLLMInferenceTrace_conv.csv")) == 19366


@pytest.mark.parametrize(
    "wrong",
    [
        {"endpoint": "/v1/embeddings"},
        {"max_concurrency": 0},
        {"requests": []},
        {"requests": at(math.inf)},
        {"endpoint": "/v1/chat/completions"},
        {"base_url": "localhost:8000"},
        {"base_url": "http://"},
        {"api_key": "ключ"},
    ],
)
def test_a_load_that_cannot_be_sent(wrong):
    with pytest.raises((ConfigError, InvalidRequestError)):
        Measurement(Load(**{"model": "m", "requests": at(0.0)} | wrong))


# --- a real server


@pytest.fixture(scope="module")
def server():
    from minillm import LLM

    with LLM("tiny", **SMALL) as llm, running(llm, api_keys=["secret"]) as server:
        server.key = "secret"
        yield server


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    forget_proxies(monkeypatch)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")


@pytest.fixture
def bench(monkeypatch):
    """bench(arguments…) → the exit status."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["minillm", "bench", "serve", "--disable-tqdm", *map(str, arguments)])
        return cli.run(cli.app)

    return run


def test_tokens_are_what_the_server_writes(server):
    load = Load(base_url=server.url, requests=poisson(12, 200.0, 9, 7, 0, vocab_size=1536), ignore_eos=True)
    found = measure(load)
    assert found.errors == []
    assert found.model == "tiny"
    assert (found.input_tokens, found.output_tokens) == (12 * 9, 12 * 7)
    assert len(found.ttft_s) == len(found.tpot_s) == 12
    assert (found.ttft_s > 0).all()
    assert (found.e2e_s <= found.duration_s).all()
    # A piece is a token, or several, where one alone is no whole character.
    assert 12 <= sum(len(one.pieces_s) for one in found.records) <= 12 * 7
    chat = poisson(3, math.inf, 5, 4, 0)
    found = measure(Load(base_url=f"{server.url}/v1/", endpoint="/v1/chat/completions", requests=chat))
    assert found.num_completed == 3
    assert server.until(lambda: server.num_held == 0)


def test_it_runs_where_an_event_loop_runs(server):
    async def cell():
        return measure(Load(base_url=server.url, requests=poisson(2, math.inf, 4, 3, 0, 100)))

    assert asyncio.run(cell()).num_completed == 2


def test_the_command(server, bench, tmp_path, capsys):
    path = tmp_path / "out.json"
    options = ("--num-prompts", 6, "--random-input-len", 10, "--random-output-len", 5, "--ignore-eos", "--seed", 1)
    limits = ("--request-rate", 100, "--burstiness", 2, "--max-concurrency", 3)
    shown = (
        "--goodput",
        "ttft:60000",
        "tpot:60000",
        "e2el:60000",
        "--metric-percentiles",
        "50,90",
        "--output-json",
        path,
    )
    assert bench("--base-url", server.url, *options, *limits, *shown) == 0
    lines = [line.strip("│").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    rows = {name.strip(): value.strip() for name, value in lines}
    content = json.loads(path.read_text())
    assert rows["Successful requests"] == "6"
    assert rows["Failed requests"] == "0"
    assert rows["Maximum request concurrency"] == "3"
    assert rows["Request rate configured (RPS)"] == "100.00"
    assert rows["Total input tokens"] == "60"
    assert rows["Total generated tokens"] == "30"
    assert rows["Request goodput (req/s)"] == rows["Request throughput (req/s)"]
    for name in ("ttft", "tpot", "itl", "e2el"):
        for row, key in (("Mean", "mean"), ("Median", "median"), ("P50", "p50"), ("P90", "p90")):
            assert rows[f"{row} {name.upper()} (ms)"] == f"{content[f'{key}_{name}_ms']:.2f}"
    assert content["model_id"] == "tiny"
    assert content["input_lens"] == [10] * 6
    assert content["max_concurrent_requests"] <= 3


def test_a_trace_by_command_and_a_saved_result(server, bench, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("arrival_time,prompt_tokens,output_tokens\n0,5,3\n0.1,900,3\n0.2,6,4\n")
    options = (
        "--dataset-name",
        "trace",
        "--dataset-path",
        "t.csv",
        "--vocab-size",
        1536,
        "--save-result",
        "--ignore-eos",
    )
    assert bench("--base-url", server.url, *options) == 0
    assert "failed 1 × " in (said := capsys.readouterr().out)
    assert "maximum context length" in said
    (file,) = tmp_path.glob("openai-15qps-tiny-*.json")
    content = json.loads(file.read_text())
    assert (content["completed"], content["failed"]) == (2, 1)
    assert content["output_lens"] == [3, 0, 4]


@pytest.mark.parametrize(("backend", "path"), [("vllm", "completions"), ("openai-chat", "chat/completions")])
def test_vllms_usual_line(server, bench, tmp_path, monkeypatch, backend, path):
    asked = []
    body = Load.body
    monkeypatch.setattr(Load, "body", lambda load, *about: asked.append(load.endpoint) or body(load, *about))
    where = ("--backend", backend, "--model", "tiny", "--host", "127.0.0.1", "--port", httpx.URL(server.url).port)
    saved = ("--save-result", "--result-dir", tmp_path / "a" / "b", "--result-filename", "out.json")
    options = ("--num-prompts", 3, "--request-rate", 100, "--num-warmups", 2, "--random-output-len", 3)
    assert bench(*where, *options, *saved) == 0
    content = json.loads((tmp_path / "a" / "b" / "out.json").read_text())
    assert (content["completed"], content["failed"], content["model_id"]) == (3, 0, "tiny")
    assert asked == [f"/v1/{path}"] * (2 + 3)


def test_where_a_load_goes():
    nothing = Target(None, None, None, None, None)
    assert (nothing.url, nothing.endpoint, nothing.label) == ("http://127.0.0.1:8000", "/v1/completions", "openai")
    assert Target(None, None, "::1", 81, None).url == "http://[::1]:81"
    assert Target(None, None, None, None, "/v1/chat/completions").label == "openai-chat"
    assert Target("vllm", None, None, None, "/proxy/completions").endpoint == "/proxy/completions"


@pytest.mark.parametrize("num", [0, 1, 3])
def test_warm_ups_are_not_measured(num):
    found, asked = virtually([answer([0.25])], at(0.0), num_warmups=num)
    assert [one.ttft_s for one in found.records] == [0.25]
    assert len(asked) == num + 1
    assert [one["prompt"] for one in asked] == [[3, 2, 1]] * num + [[1, 2, 3]]


def test_warm_ups_are_counted():
    with pytest.raises(ConfigError, match="num_warmups must be at least 0, not -1"):
        Load(requests=at(0.0), num_warmups=-1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--dataset-name", "sonnet"), "must be random or trace"),
        (("--dataset-name", "trace"), "go together"),
        (("--dataset-path", "x.csv"), "go together"),
        (("--dataset-name", "trace", "--dataset-path", "x.csv", "--request-rate", 3), "of its own"),
        (("--dataset-name", "trace", "--dataset-path", "x.csv"), "cannot be read"),
        (("--goodput", "itl:3"), "ttft:500 tpot:50"),
        (("--goodput", "ttft"), "ttft:500 tpot:50"),
        (("--port", 8000), "leave it out, or --host and --port"),
        (("--host", "::1"), "leave it out, or --host and --port"),
        (("--backend", "tgi"), "openai, vllm, openai-chat"),
        (("--backend", "vllm", "--endpoint", "/v1/chat/completions"), "leave one out"),
        (("--backend", "openai-chat", "--endpoint", "/v1/completions"), "leave one out"),
        (("--backend", "openai-chat", "--vocab-size", 9), "a chat takes texts"),
        (("--result-dir", "x"), "for --save-result"),
        (("--result-filename", "x.json"), "for --save-result"),
        (("--save-result", "--result-dir", "x", "--output-json", "y.json"), "--output-json is a path"),
        (("--save-result", "--result-filename", "no/such/folder/out.json"), "a folder that exists"),
        (("--save-result", "--result-dir", "README.md"), "cannot be made"),
        (("--percentile-metrics", "ttft,latency"), "not 'latency'"),
        (("--metric-percentiles", "50,x"), "from 0 to 100"),
        (("--request-rate", 0), "above 0"),
        (("--random-range-ratio", 1), "ratio"),
        (("--output-json", "no/such/folder/out.json"), "a folder that exists"),
        (("--endpoint", "/v1/embeddings"), "/v1/chat/completions"),
        (("--endpoint", "/v1/chat/completions", "--vocab-size", 9), "a chat takes texts"),
        (("--model", "none"), "does not exist"),
        (("--random-input-len", 900), "maximum context length"),
        (("--api-key", "wrong"), "API key"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(server, bench, capsys, arguments, sentence):
    assert bench("--base-url", server.url, "--num-prompts", 2, *arguments) == 1
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.out == ""


def test_nobody_there(bench, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert bench("--base-url", f"http://127.0.0.1:{free.getsockname()[1]}") == 1
    assert "is the server running?" in capsys.readouterr().err


def test_a_server_without_tokenize_gets_words(server, monkeypatch):
    from minillm.bench import serve

    endpoint = Endpoint(server.url)
    ids = serve._tokens(endpoint, "/v1/completions", "tiny", None)
    assert len(set(ids)) == len(ids) > 50
    assert max(ids) < 1536
    assert serve._tokens(endpoint, "/v1/completions", "tiny", 7) == range(7)
    assert serve._tokens(endpoint, "/v1/chat/completions", "tiny", None) == WORDS
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever).start()
        endpoint = Endpoint(f"http://127.0.0.1:{other.server_port}")
        assert serve._tokens(endpoint, "/v1/completions", "tiny", None) == WORDS
        with pytest.raises(ServerError, match="answers 501"):
            endpoint.models()
        other.shutdown()


def test_a_server_that_ends_midway_loses_nothing(bench, capsys):
    from minillm import LLM

    with LLM("tiny", **SMALL) as llm:
        with running(llm, drain_seconds=0.0) as server:
            status = []
            options = ("--num-prompts", 200, "--request-rate", 100, "--random-output-len", 4, "--ignore-eos")
            work = threading.Thread(target=lambda: status.append(bench("--base-url", server.url, *options)))
            work.start()
            assert server.until(lambda: llm.engine.counts.num_steps > 10)
        work.join(timeout=60)
    said = capsys.readouterr().out
    assert status == [0]
    completed, failed = (int(said.split(f"{name} requests")[1].split("│")[1]) for name in ("Successful", "Failed"))
    assert completed >= 1
    assert failed >= 1
    assert completed + failed == 200
    assert "is the server running?" in said


def test_ctrl_c_prints_what_was_measured(server, tmp_path):
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "minillm", "bench", "serve", "--base-url", server.url, "--output-json", str(path)]
    options = ["--num-prompts", "600", "--request-rate", "20", "--random-output-len", "3", "--disable-tqdm"]
    done_before = server.llm.engine.counts.num_steps
    process = subprocess.Popen(
        command + options,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert server.until(lambda: server.llm.engine.counts.num_steps > done_before + 30, 60)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED, err
    content = json.loads(path.read_text())
    assert 1 <= content["completed"] < 600
    assert "Successful requests" in out
    assert server.until(lambda: server.num_held == 0)


def test_ctrl_c_in_a_notebook_ends_the_cell_and_keeps_the_result(server):
    requests = poisson(200, 50.0, 4, 3, 0, 100)
    before = server.llm.engine.counts.num_steps

    def interrupt():
        assert server.until(lambda: server.llm.engine.counts.num_steps > before + 20, 60)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    stopper = threading.Thread(target=interrupt)
    stopper.start()
    with pytest.raises(Interrupted) as interrupted:
        measure(Load(base_url=server.url, requests=requests))
    stopper.join()
    assert 1 <= interrupted.value.result.num_completed < 200
    assert interrupted.value.result.duration_s > 0


def test_neither_pytorch_nor_the_engine_is_imported():
    code = (
        "import sys, minillm.bench.serve\n"
        "print([m for m in sys.modules if m == 'torch' or m.startswith(('transformers', 'minillm.engine'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[]\n", done.stderr
