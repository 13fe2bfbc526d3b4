"""On a GPU: decode steps are replayed from graphs, and it makes no difference to what is written."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.engine.cuda_graphs import DecodeGraphs
from minillm.engine.outputs import CompletionOutput
from minillm.engine.params import SamplingParams
from minillm.llm import LLM
from tests.models.families import FAMILIES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

RNG = random.Random(0)
PROMPTS = [[RNG.randrange(160) for _ in range(length)] for length in (60, 3, 17)]
SIZES = {"dtype": "float32", "device": "cuda", "max_num_seqs": 4, "max_model_len": 100, "num_gpu_blocks_override": 64}
OTHER_WAYS: tuple[dict[str, Any], ...] = (
    {"attention_backend": "triton", "enforce_eager": True},
    {"attention_backend": "reference"},
)


@pytest.fixture
def replays(monkeypatch) -> list[int]:
    """The batch size of each graph that is replayed, as it happens."""
    sizes = []
    replay = DecodeGraphs.replay

    def counted(graphs: DecodeGraphs, size: int) -> torch.Tensor:
        sizes.append(size)
        return replay(graphs, size)

    monkeypatch.setattr(DecodeGraphs, "replay", counted)
    return sizes


def write(folder: Path, lengths: list[int], **options: Any) -> tuple[list[CompletionOutput], int]:
    """Each prompt's answer of so many tokens, drawn so that many different ones come; the number of decode steps."""
    params = [
        SamplingParams(temperature=2.0, seed=seed, max_tokens=length, logprobs=0) for seed, length in enumerate(lengths)
    ]
    with LLM(folder, skip_tokenizer_init=True, trace=True, **SIZES, **options) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        steps = [step for step in llm.trace.steps if all(part.count == 1 for part in step.parts)]
    return [output.outputs[0] for output in outputs], len(steps)


def chosen_logprobs(answer: CompletionOutput) -> list[float]:
    return [of_step[token].logprob for token, of_step in zip(answer.token_ids, answer.logprobs, strict=True)]


@pytest.mark.parametrize("name", ["gemma3", "opt", "gpt2"])
@pytest.mark.parametrize("keys_per_split", [256, 16])
def test_graphs_equal_eager_steps_and_the_reference(keys_per_split, name, tmp_path, replays, monkeypatch, report):
    """Windows and learned positions; three sequences in a graph of four; keys of a sequence whole and in parts."""
    from minillm.kernels.gpu import paged_attention

    monkeypatch.setattr(paged_attention, "MIN_KEYS_PER_SPLIT", keys_per_split)
    FAMILIES[name](tmp_path)
    expected, steps = write(tmp_path, [24] * 3, attention_backend="triton")
    assert replays == [4] * steps == [4] * 23
    assert len({token for answer in expected for token in answer.token_ids}) > 20
    replays.clear()
    farthest = 0.0
    for options in OTHER_WAYS:
        answers, steps = write(tmp_path, [24] * 3, **options)
        assert steps == 23
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
        for ours, graphs in zip(answers, expected, strict=True):
            pairs = zip(chosen_logprobs(ours), chosen_logprobs(graphs), strict=True)
            farthest = max(farthest, *(abs(one - other) for one, other in pairs))
    assert replays == []
    assert farthest < 1e-3
    report("CUDA: graphs, eager steps, the reference", f"{name}: log-probabilities at most {farthest:.1e} apart")


def test_each_decode_step_takes_the_smallest_graph_that_holds_it(tmp_path, replays):
    """Requests end one after the other."""
    FAMILIES["llama"](tmp_path)
    _, steps = write(tmp_path, [24, 12, 6])
    assert replays == [4] * 5 + [2] * 6 + [1] * 12
    assert steps == len(replays)
