"""Offline batches on Ray Data: the job is killed, and started again does only what is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs the extra scale: pip install -e '.[scale]'")

from minillm import LLM, SamplingParams
from minillm.errors import ConfigError, MinillmError
from minillm.scale import generate_dataset
from minillm.scale.cluster import share_of_cores
from minillm.scale.dataset import note_job
from tests.scale.test_scale import ROOT, STARTS, did_not_start, environment, until

pytestmark = pytest.mark.scale

ROWS, PIECE, TOKENS = 96, 8, 48
JOB = f"""
import sys
from minillm import SamplingParams
from minillm.scale import generate_dataset
params = SamplingParams(temperature=0, max_tokens={TOKENS}, ignore_eos=True)
generate_dataset(*sys.argv[1:], sampling_params=params, rows_per_piece={PIECE}, dtype="float32", enforce_eager=True)
"""


def start(log: Path, *arguments: Path) -> subprocess.Popen:
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-c", JOB, *map(str, arguments)],
            cwd=ROOT,
            env=environment(),
            start_new_session=True,
            stdout=file,
            stderr=file,
        )


def run_until(happened: Callable[[], bool], log: Path, *arguments: Path) -> int | None:
    """Run a job until something has happened, and then kill it; its exit status where it has ended before."""
    for _ in range(STARTS):
        job = start(log, *arguments)
        try:
            assert until(lambda: happened() or job.poll() is not None, 240, every=0.02), log.read_text()  # noqa: B023
        finally:
            status = job.poll()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            job.wait()
        if not did_not_start(log):
            return status
    pytest.fail(log.read_text())


def written(folder: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in sorted(folder.glob("*.json*"))} if folder.exists() else {}


def test_a_job_that_is_killed_goes_on_where_it_was(tmp_path, report):
    prompts = {number: f"{number} children went to" for number in range(ROWS)}
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers"
    source.write_text("".join(json.dumps({"id": at, "prompt": prompt}) + "\n" for at, prompt in prompts.items()))
    begun = time.monotonic()
    log = tmp_path / "log"
    status = run_until(lambda: len(written(output)) >= 2, log, source, output)
    assert status is None, f"it was to be killed in the middle: {log.read_text()}"
    first_seconds = time.monotonic() - begun
    before = written(output)
    assert run_until(lambda: False, log, source, output) == 0, log.read_text()
    after = written(output)
    rows = [json.loads(line) for text in after.values() for line in text.splitlines()]
    kept = [json.loads(line)["id"] for path in before.keys() & after.keys() for line in before[path].splitlines()]
    seconds = time.monotonic() - begun - first_seconds
    report("a job killed", f"{len(kept)} of {ROWS} rows kept; {first_seconds:.0f} s until then, {seconds:.0f} s after")
    assert sorted(row["id"] for row in rows) == list(prompts)
    assert len(kept) >= PIECE
    assert all(after[path] == before[path] for path in before.keys() & after.keys())
    with LLM("tiny", dtype="float32", enforce_eager=True, device="cpu") as llm:
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        outputs = llm.generate(list(prompts.values()), params, use_tqdm=False)
    assert {row["id"]: row["generated_text"] for row in rows} == {
        at: output.outputs[0].text for at, output in zip(prompts, outputs, strict=True)
    }
    assert {row["finish_reason"] for row in rows} == {"length"}


def test_a_folder_belongs_to_one_job(tmp_path):
    folder = tmp_path / "answers"
    note_job(folder, {"model": "tiny", "params": SamplingParams(max_tokens=4), "device": "cpu"})
    note_job(folder, {"model": "tiny", "params": SamplingParams(max_tokens=8)})  # nothing has been written yet
    (tmp_path / "answers.finished").mkdir()
    (tmp_path / "answers.finished" / "ids.parquet").touch()
    note_job(folder, {"model": "tiny", "params": SamplingParams(max_tokens=8), "device": "cuda"})
    for other in ({"model": "tiny", "params": None}, {"model": "small", "params": SamplingParams(max_tokens=8)}):
        with pytest.raises(ConfigError, match=r"another job \(.* was .*, now .*answers.job and answers.finished"):
            note_job(folder, other)
    (tmp_path / "answers.job").unlink()
    with pytest.raises(ConfigError, match="another job"):
        note_job(folder, {"model": "tiny"})


def test_a_function_among_the_parameters_is_known_again(tmp_path):
    (tmp_path / "answers").mkdir()
    params = [SamplingParams(logits_processors=[lambda tokens, logits: logits]) for _ in range(2)]
    note_job(tmp_path / "answers", {"params": params[0]})
    (tmp_path / "answers" / "0.json").touch()
    note_job(tmp_path / "answers", {"params": params[1]})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sampling_params": {"max_tokens": 4}}, "must be SamplingParams, not dict"),
        ({"sampling_params": SamplingParams(n=2)}, "a row has one answer"),
        ({"output": "s3://bucket/answers"}, "a folder that all machines see"),
        ({"replicas": 0}, "replicas"),
    ],
)
def test_what_cannot_be_is_told_before_ray_starts(tmp_path, changed, message):
    with pytest.raises(MinillmError, match=message):
        generate_dataset(tmp_path / "prompts.jsonl", **{"output": tmp_path / "answers"} | changed)


@pytest.mark.parametrize(
    ("cores", "models", "spare", "share"),
    [
        ([2], 1, 0, 2.0),
        ([2], 2, 0, 1.0),
        ([2], 3, 0, 0.5),  # two on one core, one on the other
        ([8], 3, 2, 2.0),
        ([4, 4], 3, 0, 2.0),  # not 8 / 3: no machine has room for two of that
        ([16, 2], 2, 0, 8.0),
        ([3, 3], 2, 2, 2.0),
        ([2], 1, 2, 0.0),
    ],
)
def test_models_share_cores_machine_by_machine(cores, models, spare, share):
    assert share_of_cores(cores, models, spare) == share
