"""minillm bench throughput and latency, as typed; how fast they are is never tested."""

from __future__ import annotations

import json
import re

import pytest

from minillm import cli

SMALL = ("--dtype", "float32", "--device", "cpu", "--input-len", "5", "--output-len", "3", "--max-num-seqs", "4")


@pytest.fixture
def bench(monkeypatch):
    """bench(arguments…) → the exit status."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["minillm", "bench", *map(str, arguments)])
        return cli.run(cli.app)

    return run


def test_throughput(bench, tmp_path, capsys):
    path = tmp_path / "out.json"
    options = ("--num-prompts", 6, "--num-warmups", 1, "--n", 2, "--disable-detokenize", "--output-json", path)
    assert bench("throughput", *SMALL, *options, "--attention-backend", "reference", "--block-size", 8) == 0
    said = capsys.readouterr().out
    number = r"(\d+\.\d\d)"
    assert re.search(f"Throughput: {number} requests/s, {number} total tokens/s, {number} output tokens/s\n", said)
    assert "Total num prompt tokens:  30\nTotal num output tokens:  36\n" in said
    result = json.loads(path.read_text())
    assert (result["model_id"], result["num_requests"], result["total_num_tokens"]) == ("tiny", 6, 66)
    assert result["tokens_per_second"] == pytest.approx(66 / result["elapsed_time"])


def test_throughput_of_conversations(bench, tmp_path, capsys):
    path = tmp_path / "talks.json"
    talk = [{"value": "Tell me a story about Mia."}, {"value": "Once upon a time there was a kite."}]
    path.write_text(json.dumps([{"conversations": talk}] * 3))
    options = ("--dataset-name", "sharegpt", "--dataset-path", path, "--num-prompts", 3, "--device", "cpu")
    assert bench("throughput", *options) == 0
    assert "Throughput: " in capsys.readouterr().out


def test_latency(bench, tmp_path, capsys):
    path = tmp_path / "out.json"
    options = ("--batch-size", 2, "--num-iters-warmup", 1, "--num-iters", 3, "--output-json", path)
    assert bench("latency", *SMALL, *options) == 0
    said = capsys.readouterr().out
    assert re.search(r"Avg latency: \d+\.\d+ seconds\n", said)
    assert re.findall(r"(\d+)% percentile latency: \d+\.\d+ seconds\n", said) == ["10", "25", "50", "75", "90", "99"]
    result = json.loads(path.read_text())
    assert len(result["latencies"]) == 3
    assert result["percentiles"]["50"] == sorted(result["latencies"])[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("throughput", "--input-len", 500, "--output-len", 50), "lower --input-len or --output-len"),
        (("latency", "--input-len", 500, "--output-len", 50), "lower --input-len or --output-len"),
        (("latency", "--output-json", "no/such/folder/out.json"), "name a file in a folder that exists"),
        (("throughput", "--dataset-name", "sonnet"), "must be random or sharegpt"),
        (("throughput", "--dataset-name", "sharegpt"), "needs --dataset-path"),
        (("throughput", "--dataset-path", "x.json"), "--dataset-name sharegpt only"),
        (
            ("throughput", "--dataset-name", "sharegpt", "--dataset-path", "x.json", "--input-len", 3),
            "--input-len is for",
        ),
        (("throughput", "--dataset-name", "sharegpt", "--dataset-path", "no.json"), "cannot be read as JSON"),
        (("latency", "--attention-backend", "flash"), "flash"),
    ],
)
def test_what_cannot_be_is_one_sentence(bench, capsys, arguments, sentence):
    assert bench(*arguments) == 1
    said = capsys.readouterr().err
    assert "error" in said
    assert sentence in said
    assert "bug" not in said
