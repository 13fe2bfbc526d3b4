"""Models that several processes run together: the same answers, a share of the memory, and an end when one dies."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import httpx
import psutil
import pytest
import torch
import transformers

from minillm import LLM, BeamSearchParams, SamplingParams, get_tokenizer
from minillm.engine import ranks
from minillm.errors import ConfigError, RankError
from minillm.models.source import resolve
from tests.helpers import TokenComparison, randomise, reference_greedy
from tests.helpers import answers as is_served
from tests.models.families import FAMILIES, SMALL

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["Once upon a time", "Once upon a time there was a cat", "One sunny morning Mia", "Sam"] * 2
PARAMS = [SamplingParams(temperature=0, max_tokens=24, logprobs=2, prompt_logprobs=1)] * 6
PARAMS += [SamplingParams(n=3, temperature=0.9, seed=7, max_tokens=24)] * 2
SIZES = {"dtype": "float32", "device": "cpu", "block_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 24}


def answers(llm):
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    beams = llm.beam_search("Tom found a", BeamSearchParams(beam_width=3, max_tokens=8))[0].sequences
    return [[one.token_ids for one in output.outputs] for output in outputs], [beam.tokens for beam in beams], outputs


@pytest.fixture(scope="module")
def alone():
    with LLM("tiny", num_gpu_blocks_override=24, max_model_len=64, **SIZES) as llm:
        found = answers(llm)
        assert llm.engine.counts.num_preemptions > 0
        return found


def children():
    return [child for child in psutil.Process().children() if "minillm.engine.rank" in " ".join(child.cmdline())]


def test_two_processes_answer_as_one(alone):
    with LLM("tiny", tensor_parallel_size=2, num_gpu_blocks_override=24, max_model_len=64, **SIZES) as llm:
        assert len(children()) == 1
        sockets = [one for process in (psutil.Process(), *children()) for one in process.net_connections()]
        assert {one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN} <= {"127.0.0.1", "::1"}
        tokens, beams, outputs = answers(llm)
        traffic, counts = llm.engine.runner.leader.traffic, llm.engine.counts
        before, hidden = asdict(traffic), llm.engine.runner.decoder.config.hidden_size
        llm.generate([[5]], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), use_tqdm=False)
    assert tokens == alone[0]
    assert beams == alone[1]
    assert counts.num_preemptions > 0
    for mine, right in zip(outputs, alone[2], strict=True):
        if right.prompt_logprobs is not None:
            expected = [entry and {t: one.logprob for t, one in entry.items()} for entry in right.prompt_logprobs]
            got = [entry and {t: one.logprob for t, one in entry.items()} for entry in mine.prompt_logprobs]
            assert got[0] is None
            for one, two in zip(got[1:], expected[1:], strict=True):
                assert one == pytest.approx(two, abs=1e-4)
    # One token: the embedding's sum, two for each of six layers, and the head's parts.
    assert traffic.all_reduces - before["all_reduces"] == 1 + 2 * 6
    assert traffic.all_reduce_bytes - before["all_reduce_bytes"] == (1 + 2 * 6) * hidden * 4
    assert traffic.all_gathers - before["all_gathers"] == 1
    assert not children()


def check_family(name, folder, report, device):
    """Two ranks write what transformers does, with so little memory that some are preempted."""
    reference = FAMILIES[name](folder)
    prompts = [[token % 160 for token in range(7 * at, 8 * at + 1 + 9 * (at % 7))] for at in range(20)]
    sizes = {"dtype": "float32", "device": device, "max_num_seqs": 20, "max_model_len": 100}
    sizes |= {"num_gpu_blocks_override": 24, "max_num_batched_tokens": 64}
    compared = TokenComparison()
    with LLM(folder, skip_tokenizer_init=True, tensor_parallel_size=2, **sizes) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
        assert llm.engine.counts.num_preemptions > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        compared.add(output.outputs[0].token_ids, *reference_greedy(reference, prompt, 24))
    report(f"two ranks x family, {device}", f"{name:34} {compared}")


@pytest.mark.ranks_all
@pytest.mark.parametrize("name", FAMILIES)
def test_two_processes_equal_transformers(name, tmp_path, report):
    check_family(name, tmp_path, report, "cpu")


def test_ctrl_c_waits_for_the_ranks_and_the_engine_goes_on(alone):
    with LLM("tiny", tensor_parallel_size=2, max_model_len=512, **SIZES) as llm:
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["Once upon a time"] * 600, SamplingParams(max_tokens=400, ignore_eos=True), use_tqdm=False)
        assert not llm.engine.unfinished
        (output,) = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
        assert output.outputs[0].token_ids == alone[0][0][0]
        with pytest.raises(ConfigError, match="divided among several processes"):
            _ = llm.decoder
    assert not children()


def test_a_failure_within_a_step_ends_all(monkeypatch):
    with LLM("tiny", tensor_parallel_size=2, max_model_len=64, **SIZES) as llm:
        monkeypatch.setattr(llm.engine.runner.decoder, "hidden", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.generate("Once", use_tqdm=False)
        monkeypatch.undo()
        with pytest.raises(RankError, match="rank 0 failed in the middle of a step"):
            llm.generate("Once", use_tqdm=False)
        assert not children()


def test_nothing_is_left_of_an_llm_that_nobody_closed():
    llm = LLM("tiny", tensor_parallel_size=2, max_model_len=64, **SIZES)
    assert len(children()) == 1
    del llm
    gc.collect()
    assert not children()


def test_another_model_after_it_and_quantised(alone):
    for _ in range(2):
        with LLM("tiny", tensor_parallel_size=2, quantization="int8", max_model_len=64, **SIZES) as llm:
            (output,) = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
            assert len(output.outputs[0].token_ids) == 8
    assert not children()


def test_what_cannot_be_divided_is_refused_before_anything_starts(tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    randomise(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"4 ranks: tensor_parallel_size may be 1, 2$"):
        LLM(tmp_path, tensor_parallel_size=4, skip_tokenizer_init=True, device="cpu")
    with pytest.raises(ConfigError, match="tensor_parallel_size must be a whole number of at least 1"):
        LLM(tmp_path, tensor_parallel_size=0)
    assert not children()


def test_a_rank_that_cannot_load_is_told_of(tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not this")
    with pytest.raises(Exception, match=r"cannot be read|rank 1 ended with status 1"):
        LLM(tmp_path, tensor_parallel_size=2, skip_tokenizer_init=True, device="cpu")
    assert not children()


@pytest.mark.parametrize(("sent", "message"), [(signal.SIGKILL, "signal 9"), (signal.SIGSTOP, "does not answer")])
def test_a_rank_that_dies_or_hangs_ends_every_request(monkeypatch, sent, message):
    monkeypatch.setattr(ranks, "STEP_SECONDS", 5.0)
    with LLM("tiny", tensor_parallel_size=2, max_model_len=512, **SIZES) as llm:
        (child,) = children()
        threading.Timer(0.5, lambda: os.kill(child.pid, sent)).start()
        with pytest.raises(RankError, match=message):
            llm.generate(["Once upon a time"] * 600, SamplingParams(max_tokens=400, ignore_eos=True), use_tqdm=False)
        with pytest.raises(RankError, match=message):
            llm.generate("Again", use_tqdm=False)
    assert not children()


def test_no_rank_outlives_rank_0():
    program = (
        "from minillm import LLM\n"
        "llm = LLM('tiny', tensor_parallel_size=2, device='cpu', max_model_len=64)\n"
        "print(llm.engine.runner.leader.crew.pids, flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        (pid,) = json.loads(process.stdout.readline())
        assert psutil.pid_exists(pid)
        process.kill()
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=30)
    assert not psutil.pid_exists(pid)


@pytest.mark.ranks_all
def test_three_processes_of_smollm2_equal_transformers(report):
    """Its three heads of keys and values, one for each."""
    path = resolve("smollm2-135m")
    folder, gguf = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf).eval()
    prompts = [get_tokenizer(path)(text).input_ids for text in ("The capital of France is", "One, two, three,")]
    compared = TokenComparison()
    with LLM(path, tensor_parallel_size=3, max_model_len=64, dtype="float32", device="cpu") as llm:
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert len(children()) == 2
    for prompt, output in zip(prompts, outputs, strict=True):
        compared.add(output.outputs[0].token_ids, *reference_greedy(reference, prompt, 24))
    report("three ranks", f"SmolLM2-135M: {compared}")


def test_torchrun_serves(alone, free_port, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "minillm"]
    options = ["--port", str(free_port), "--max-model-len", "64", "--dtype", "float32", "--device", "cpu"]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            [*command, "serve", "tiny", "-tp", "2", *options],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
    try:
        url = f"http://127.0.0.1:{free_port}"
        deadline = time.monotonic() + 120
        while not is_served(f"{url}/health"):
            assert run.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        asked = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0, "return_token_ids": True}
        answer = httpx.post(f"{url}/v1/completions", json=asked, trust_env=False).json()
        assert answer["choices"][0]["token_ids"] == alone[0][0][0]
        ranks_of_run = psutil.Process(run.pid).children(recursive=True)
        assert len(ranks_of_run) >= 2
    finally:
        run.terminate()
        run.wait(60)
    psutil.wait_procs(ranks_of_run, timeout=20)
    assert not [one for one in ranks_of_run if one.is_running()]


def test_torchrun_starts_them_as_well(alone, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import json\n"
        "from minillm import LLM, SamplingParams\n"
        "from minillm.errors import ConfigError\n"
        "with LLM('tiny', tensor_parallel_size=2, dtype='float32', device='cpu', max_model_len=64) as llm:\n"
        "    (output,) = llm.generate('Once upon a time', SamplingParams(temperature=0, max_tokens=24))\n"
        "print(json.dumps(output.outputs[0].token_ids))\n"
        "try:\n"
        "    LLM('tiny', tensor_parallel_size=2, device='cpu')\n"
        "except ConfigError as error:\n"
        "    print(json.dumps(str(error)))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        timeout=120,
        check=True,
        text=True,
    )
    tokens, error = [json.loads(line) for line in ran.stdout.splitlines()]  # of rank 0 alone
    assert tokens == alone[0][0][0]
    assert "ended with the first model" in error
