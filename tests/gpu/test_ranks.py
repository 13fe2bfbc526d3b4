"""On two GPUs: two ranks answer as one does, each with its share of the memory; one that dies ends it."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from minillm.engine import ranks
from minillm.engine.params import BeamSearchParams, SamplingParams
from minillm.errors import ConfigError, MinillmError
from minillm.llm import LLM
from tests.engine.test_ranks import check_family
from tests.models.families import FAMILIES

two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")


@two
@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_equal_transformers(name, tmp_path, report):
    check_family(name, tmp_path, report, "cuda")


@two
def test_draws_beams_and_measured_memory():
    answers, rooms = [], []
    for size in (1, 2):
        sizes = {"max_model_len": 256, "gpu_memory_utilization": 0.1, "tensor_parallel_size": size}
        with LLM("tiny", dtype="float32", device="cuda", **sizes) as llm:
            params = SamplingParams(n=3, temperature=0.9, top_p=0.9, top_k=40, seed=1, max_tokens=40)
            (output,) = llm.generate("Once upon a time", params, use_tqdm=False)
            (beams,) = llm.beam_search("Once upon a time", BeamSearchParams(beam_width=4, max_tokens=20))
            answers.append(([answer.text for answer in output.outputs], [beam.text for beam in beams.sequences]))
            rooms.append(llm.engine.scheduler.pool.num_blocks)
    assert answers[0] == answers[1]
    assert rooms[1] > 1.8 * rooms[0]  # a block takes half as much on each


@two
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_it(monkeypatch, sent):
    monkeypatch.setattr(ranks, "STEP_SECONDS", 5.0)
    with LLM("tiny", tensor_parallel_size=2, device="cuda", max_model_len=512) as llm:
        (pid,) = llm.engine.runner.leader.crew.pids
        threading.Timer(0.5, lambda: os.kill(pid, sent)).start()
        with pytest.raises(MinillmError, match=r"rank 1|does not answer"):
            llm.generate(["Once upon a time"] * 3000, SamplingParams(max_tokens=400, ignore_eos=True), use_tqdm=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(ConfigError, match=r"GPUs here: take fewer ranks"):
        LLM("tiny", tensor_parallel_size=2 if torch.cuda.device_count() < 2 else 64, device="cuda")
