"""minillm serve: every flag arrives where it belongs. No model is loaded, nothing is served."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import minillm.llm
import minillm.server.serve
from minillm import cli

SIGNATURE = inspect.signature(minillm.llm.LLM)
ENGINE_FLAGS = [
    ("--max-model-len 128", {"max_model_len": 128}),
    ("--max-num-seqs 3", {"max_num_seqs": 3}),
    ("--max-num-batched-tokens 96", {"max_num_batched_tokens": 96}),
    ("--block-size 8", {"block_size": 8}),
    ("--no-enable-prefix-caching", {"enable_prefix_caching": False}),
    ("--enable-prefix-caching", {"enable_prefix_caching": True}),
    ("--enforce-eager", {"enforce_eager": True}),
    ("--seed 7", {"seed": 7}),
    ("--gpu-memory-utilization 0.5", {"gpu_memory_utilization": 0.5}),
    ("--quantization int8", {"quantization": "int8"}),
    ("--trust-remote-code", {"trust_remote_code": True}),
    ("--dtype float32", {"dtype": "float32"}),
    ("--device cpu", {"device": "cpu"}),
    ("--attention-backend reference", {"attention_backend": "reference"}),
    ("--kv-cache-memory-bytes 123456", {"kv_cache_memory_bytes": 123456}),
]
SERVER_FLAGS = [
    ("--served-model-name a", {"served_names": ["a"]}),
    ("--served-model-name a b", {"served_names": ["a", "b"]}),
    ("--served-model-name a --served-model-name b c", {"served_names": ["a", "b", "c"]}),
    ("--served-model-name=a b --seed 1", {"served_names": ["a", "b"]}),
    ("--api-key k", {"api_keys": ["k"]}),
    ("--api-key k l --served-model-name a b", {"api_keys": ["k", "l"], "served_names": ["a", "b"]}),
    ("--chat-template {{messages}}", {"chat_template": "{{messages}}"}),
    ("--max-unfinished-requests 9", {"max_requests": 9}),
    ("--trust-request-chat-template", {"trust_request_chat_template": True}),
]


class Recorder:
    """What `LLM` and `serve` were called with."""

    engine: dict[str, Any]
    config: dict[str, Any]
    where: dict[str, Any]

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        served = object()
        recorder = self

        class FakeLLM:
            def __init__(self, *args: Any, **options: Any) -> None:
                recorder.engine = SIGNATURE.bind(*args, **options).arguments
                assert "unknown" not in recorder.engine

            def __enter__(self) -> object:
                return served

            def __exit__(self, *_: object) -> None:
                pass

        def serve(llm: object, config: Any, **where: Any) -> int:
            assert llm is served
            recorder.config, recorder.where = vars(config), where
            return 3

        monkeypatch.setattr(minillm.server.serve, "LLM", FakeLLM)
        monkeypatch.setattr(minillm.server.serve, "serve", serve)

    def run(self, *arguments: object) -> int:
        self._monkeypatch.setattr("sys.argv", ["minillm", "serve", *map(str, arguments)])
        return cli.run(cli.app)


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.delenv("MINILLM_API_KEY", raising=False)
    return Recorder(monkeypatch)


def test_without_flags_all_is_as_llm_and_the_server_have_it(recorder, free_port):
    assert recorder.run("--port", free_port) == 3
    assert recorder.engine.pop("model") == "tiny"
    assert recorder.engine == {name: SIGNATURE.parameters[name].default for name in recorder.engine}
    assert recorder.where == {"host": "127.0.0.1", "port": free_port, "drain_seconds": 30.0}
    assert recorder.config["served_names"] == ["tiny"]
    assert recorder.config["api_keys"] == []


@pytest.mark.parametrize(("typed", "expected"), ENGINE_FLAGS)
def test_engine_flags_are_arguments_of_llm(recorder, free_port, typed, expected):
    recorder.run("--port", free_port)
    without = recorder.engine
    assert recorder.run("some/model", "--port", free_port, *typed.split()) == 3
    assert recorder.engine == without | {"model": "some/model"} | expected


@pytest.mark.parametrize(("typed", "expected"), SERVER_FLAGS)
def test_server_flags_reach_the_server(recorder, free_port, typed, expected):
    recorder.run("some/model", "--port", free_port)
    without = recorder.config
    assert recorder.run("some/model", "--port", free_port, *typed.split()) == 3
    assert recorder.config == without | expected


def test_where_it_listens_and_how_it_ends(recorder, free_port):
    assert recorder.run("--host", "localhost", "--port", free_port, "--drain-seconds", 1.5) == 3
    assert recorder.where == {"host": "localhost", "port": free_port, "drain_seconds": 1.5}


def test_a_template_is_read_from_a_file(recorder, free_port, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}")
    assert recorder.run("--port", free_port, "--chat-template", tmp_path / "t.jinja") == 3
    assert recorder.config["chat_template"] == "{{ messages[0].content }}"


def test_a_model_after_a_flag_is_no_second_value(recorder, free_port):
    assert recorder.run("--port", free_port, "--api-key", "k", "some/model") == 3
    assert recorder.engine["model"] == "some/model"
    assert recorder.config["api_keys"] == ["k"]


def test_keys_of_the_environment(recorder, free_port, monkeypatch):
    monkeypatch.setenv("MINILLM_API_KEY", "k l")
    assert recorder.run("--port", free_port) == 3
    assert recorder.config["api_keys"] == ["k l"], "one key"


def test_two_models_are_refused(recorder, free_port, capsys):
    assert recorder.run("some/model", "--port", free_port, "another/model") == 2
    assert "another/model" in capsys.readouterr().err
