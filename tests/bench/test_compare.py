"""minillm bench compare from end to end on the model that ships; no speed is tested."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from minillm.bench import compare, worker
from minillm.bench.comparison import Comparison, Options, Result, Run
from minillm.bench.limits import Rates, model_config
from minillm.bench.peers import Contender, ModelFiles, contenders, write_gguf
from minillm.bench.processes import EngineFailedError
from minillm.bench.report import as_json, remarks, table
from minillm.bench.workloads import Ask, Workload, workload
from minillm.errors import ConfigError
from minillm.models.gguf import iterate_gguf, metadata
from minillm.models.source import BUNDLED, resolve

pytestmark = pytest.mark.skipif(os.name != "posix", reason="stops processes by signals")

TINY = BUNDLED["tiny"]
HERE = contenders(None, None, TINY)


@pytest.mark.parametrize(
    "name", ["minillm", "minillm-int8", "minillm-server", "transformers", "transformers-continuous"]
)
def test_an_engine_behind_the_protocol(name, tmp_path):
    asks = [Ask([5, 17, 3, *row], count) for row, count in (([99, 42], 4), ([7], 9), ([120, 11, 2, 64], 1))]
    with HERE[name].start(1, tmp_path / "log") as process:
        with pytest.raises(EngineFailedError, match="nothing has been loaded"):
            process.ask({"run": asks}, 120)
        version = HERE[name].load(process, ModelFiles(TINY, tmp_path), "float32", 1, 32)
        assert version.startswith(name.partition("-")[0])
        first, again = (process.ask({"run": asks}, 120) for _ in range(2))
        with pytest.raises(EngineFailedError, match="Error"):
            process.ask({"run": [([], 4)]}, 120)
    assert [len(answer) for answer in first["answers"]] == [4, 9, 1]
    assert first["answers"] == again["answers"]
    assert 0 < first["first_token_seconds"] <= first["seconds"]


def test_compare(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "RETRIES_IN_ALL", 1)
    small = Workload("W1", "small", [Ask([5, 17, 3], 4)])
    several = Workload("W2", "several", [Ask([5, 17, 3], 4), Ask([9], 3)])
    monkeypatch.setattr(compare, "workload", lambda name, vocab_size: {"W1": small, "W2": several}[name])
    monkeypatch.setattr(compare, "measure_rates", lambda dtype: Rates(1e10, 1e11))
    monkeypatch.setattr(compare, "QUIET_SECONDS", 0.0)
    options = Options(
        "tiny",
        dtypes=["float32"],
        workloads=["W1", "W2"],
        engines=["minillm", "transformers", "vllm"],
        vllm=Path(sys.executable),  # where there is no vllm
        repeats=2,
        threads=1,
        output_json=tmp_path / "out.json",
        plot=tmp_path / "out.png",
    )
    compare.main(options)
    said = capsys.readouterr()
    assert "W2" in said.out
    assert "100%" in said.out
    assert "failed" in said.out
    assert "vllm failed in float32: ModuleNotFoundError: No module named 'vllm'" in said.out
    told = " ".join(said.out.split())  # how quiet the machine was is not for a test to know
    assert "runs were discarded because" in told or "what other processes did meanwhile" in told
    found = json.loads((tmp_path / "out.json").read_text())
    kept = {(one["engine"], one["workload"]): one for one in found["results"]}
    assert len(kept) == 6
    for engine in ("minillm", "transformers"):
        assert len(kept[engine, "W2"]["runs"]) == 2
        assert kept[engine, "W1"]["tokens_per_second"] > 0
    assert "ModuleNotFoundError" in kept["vllm", "W1"]["error"]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dtypes": ["float64"]}, "float64"),
        ({"dtypes": []}, "at least one"),
        ({"workloads": ["W7"]}, "W7"),
        ({"workloads": ["W4"]}, "context of 512"),
        ({"engines": ["ollama"]}, "no engine ollama"),
        ({"vllm": Path("no/such/python")}, "--vllm must name the Python"),
        ({"llama_cpp": Path()}, "--llama-cpp must name the Python"),
        ({"threads": 10_000}, "--threads 10000"),
        ({"output_json": Path("no/such/folder/out.json")}, "cannot be written"),
        ({"plot": Path("no/such/folder/out.png")}, "cannot be written"),
    ],
)
def test_what_cannot_be_compared(change, sentence):
    options = Options("tiny", workloads=["W1"], threads=1)
    with pytest.raises(ConfigError, match=sentence):
        compare.main(replace(options, **change))


def test_a_run_that_others_disturb_is_repeated(monkeypatch):
    class Busy:
        peak_bytes = 5

        def reset_peak(self):
            pass

        def ask(self, message, timeout):
            return {"first_token_seconds": 0.1, "seconds": 1.0, "answers": [[1]]}

    loads = iter([0.7, 0.3, 0.5, 0.6, 0.05])

    class Clock:
        @classmethod
        def now(cls, worker):
            return cls()

        def others_since(self, start):
            return next(loads)

    monkeypatch.setattr(compare, "CpuTime", Clock)
    monkeypatch.setattr(compare, "QUIET_SECONDS", 0.0)
    work = Workload("W", "", [Ask([1], 1)])
    run = compare._quiet_run(Busy(), work, retries=2)
    assert (run.others, run.discarded, run.was_quiet) == (0.3, 2, False)
    run = compare._quiet_run(Busy(), work, retries=2)
    assert (run.others, run.discarded, run.was_quiet) == (0.05, 1, True)


def told(results: list[Result]) -> Comparison:
    config = model_config(resolve("tiny"))
    options = Options("tiny", dtypes=["float32"])
    works = list({result.work.name: result.work for result in results}.values())
    return Comparison(options, config, works, {}, results, {"float32": Rates(1e9, 1e10)})


def run(first: float, seconds: float, answers: list[list[int]], others: float = 0.0) -> Run:
    return Run(first, seconds, answers, 2_000_000, others, 0)


def test_medians_ratios_and_what_is_said():
    work = Workload("W1", "one", [Ask([1, 2], 5)])
    ours = Result("minillm", "float32", work, [run(1.0, 3.0, [[1, 2, 3, 4, 5]]), run(2.0, 3.0, [[1, 2, 3, 4, 5]])])
    peer = Result("peer", "float32", work, [run(3.0, 7.0, [[1, 2, 9, 4, 5]], others=0.8)])
    broken = Result("broken", "float32", work, error="SIGILL [really]")
    assert ours.tokens_per_second == (4 / 2 + 4 / 1) / 2
    assert peer.same_tokens(ours) == 2 / 5
    comparison = told([ours, peer, broken])
    drawn = table(comparison, "float32")
    rows = list(zip(*(list(column.cells) for column in drawn.columns), strict=True))
    assert rows[1] == ("W1", "peer", "3.000", "1.0", "3.00×", "0.50×", "2", "40%")
    assert rows[2][:4] == ("W1", "broken", "", "failed")
    assert rows[3][1] == "limit"
    lines = list(remarks(comparison))
    assert any("broken failed in float32" in line and "SIGILL" in line for line in lines)
    assert [one.get("error") for one in as_json(comparison)["results"]] == [None, None, "SIGILL [really]"]


def test_many_requests_count_all_the_time():
    work = workload("W3", 100)
    result = Result("minillm", "float32", work, [run(1.0, 4.0, [[0] * 32] * 32)])
    assert result.tokens_per_second == 32 * 32 / 4.0


def test_a_gguf_file_in_another_dtype(tmp_path):
    source = tmp_path / "quantised.gguf"
    numbers = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_block_count(3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ç"])
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("matrix", gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.add_tensor("vector", numbers[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = {name: next(iter(tensor.blocks())) for name, tensor in iterate_gguf(source)}
    for dtype in ("float32", "bfloat16"):
        target = tmp_path / f"{dtype}.gguf"
        write_gguf(source, target, dtype)
        found = {name: next(iter(tensor.blocks())) for name, tensor in iterate_gguf(target)}
        assert {name: str(tensor.dtype) for name, tensor in found.items()} == {
            "matrix": f"torch.{dtype}",
            "vector": "torch.float32",
        }
        assert (found["matrix"] == stored["matrix"].to(found["matrix"].dtype)).all()
        assert (found["vector"] == stored["vector"]).all()
        header = metadata(target)
        assert header | {"general.file_type": 0} == metadata(source) | {"general.file_type": 0}
        assert header["general.file_type"] == {"float32": 0, "bfloat16": 32}[dtype]


def test_llama_cpp_needs_a_gguf_file(tmp_path):
    peer = Contender("llama.cpp", Path(sys.executable), (worker.__file__, "llama.cpp"), "gguf")
    with (
        peer.start(1, tmp_path / "log") as process,
        pytest.raises(EngineFailedError, match=r"give --model a \.gguf file"),
    ):
        peer.load(process, ModelFiles(TINY, tmp_path), "float32", 1, 32)


def test_engines_that_there_are(tmp_path):
    python = Path(sys.executable)
    assert list(contenders(python, python, tmp_path / "x.gguf")) == [
        "minillm",
        "minillm-int8",
        "minillm-int4",
        "minillm-server",
        "transformers",
        "transformers-continuous",
        "vllm",
        "llama.cpp",
        "llama.cpp-as-stored",
    ]
    there = contenders(None, python, tmp_path)
    assert list(there)[-1] == "llama.cpp"
    assert [one.name for one in compare._chosen(there, None)] == [
        "minillm",
        "transformers",
        "transformers-continuous",
        "llama.cpp",
    ]
    assert [one.name for one in compare._chosen(there, ["llama.cpp", "minillm-int4"])] == ["minillm-int4", "llama.cpp"]
