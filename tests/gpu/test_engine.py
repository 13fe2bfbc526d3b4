"""On a GPU: the engine equals transformers on the CPU, memory is measured, and closing gives it back."""

from __future__ import annotations

import random

import pytest
import torch
import transformers

from minillm.engine.params import BeamSearchParams, SamplingParams
from minillm.errors import OutOfMemoryError
from minillm.llm import LLM
from tests.helpers import TokenComparison, reference_greedy
from tests.models.families import FAMILIES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

RNG = random.Random(0)
PROMPTS = [[RNG.randrange(160) for _ in range(RNG.choice((1, 2, 5, 15, 16, 17, 40, 60)))] for _ in range(16)]
PROMPTS += [PROMPTS[3] + [7], PROMPTS[3], (PROMPTS[6] * 60)[:48], (PROMPTS[6] * 60)[:48]]
SETTINGS = (
    {"block_size": 16, "max_num_batched_tokens": 64, "enable_prefix_caching": True, "num_gpu_blocks_override": 14},
    {"block_size": 8, "max_num_batched_tokens": 20, "enable_prefix_caching": False, "num_gpu_blocks_override": 24},
)
SIZES = {"dtype": "float32", "device": "cuda", "max_num_seqs": 20, "max_model_len": 100}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_with_preemption(name, tmp_path, report):
    reference = FAMILIES[name](tmp_path)
    expected = [reference_greedy(reference, prompt, 24) for prompt in PROMPTS]
    compared, preemptions = TokenComparison(), []
    for settings in SETTINGS:
        with LLM(tmp_path, skip_tokenizer_init=True, **SIZES, **settings) as llm:
            outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
            preemptions.append(llm.engine.counts.num_preemptions)
        for output, (tokens, gaps) in zip(outputs, expected, strict=True):
            compared.add(output.outputs[0].token_ids, tokens, gaps)
    assert min(preemptions) > 0
    report("CUDA: paged engine x family (20 prompts x 2 settings)", f"{name:34} {compared}; {preemptions} preemptions")


def test_draws_and_beams_are_the_cpus():
    answers = []
    for device in ("cpu", "cuda"):
        with LLM("tiny", dtype="float32", device=device, max_model_len=256) as llm:
            params = SamplingParams(n=3, temperature=0.9, top_p=0.9, top_k=40, seed=1, max_tokens=40)
            (output,) = llm.generate("Once upon a time", params, use_tqdm=False)
            (beams,) = llm.beam_search("Once upon a time", BeamSearchParams(beam_width=4, max_tokens=20))
            answers.append(([answer.text for answer in output.outputs], [beam.text for beam in beams.sequences]))
    assert answers[0] == answers[1]


def test_memory_is_measured_kept_to_and_given_back(report):
    torch.cuda.empty_cache()
    before, total = torch.cuda.mem_get_info()
    for _ in range(2):
        with LLM("tiny", gpu_memory_utilization=0.15, max_num_seqs=20_000, max_num_batched_tokens=20_000) as llm:
            prompts = [[token % 200 for token in range(500)]] * 100
            llm.generate(prompts, SamplingParams(max_tokens=4, top_p=0.9), use_tqdm=False)
            free, _ = torch.cuda.mem_get_info()
            used = (total - free) / total
            kept = llm._runner.kv.num_bytes / 2**30
        assert 0.12 < used <= 0.16
    after, _ = torch.cuda.mem_get_info()
    assert before - after < 2**28
    report("CUDA: memory", f"{used:.1%} used where 15 % were asked for, {kept:.1f} GiB of keys and values")


def test_large_logits_are_counted_in(tmp_path, report):
    """A vocabulary of 150,000 and many sequences: a step's logits, and those of the graphs, are gigabytes."""
    config = transformers.LlamaConfig(
        vocab_size=150_000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    torch.cuda.empty_cache()
    prompts = [[row, *range(20)] for row in range(512)]
    params = SamplingParams(max_tokens=8, top_p=0.9, top_k=100, seed=0)
    with LLM(tmp_path, skip_tokenizer_init=True, gpu_memory_utilization=0.2, max_num_seqs=512) as llm:
        torch.cuda.reset_peak_memory_stats()
        llm.generate(prompts, params, use_tqdm=False)
        free, total = torch.cuda.mem_get_info()
        others = total - free - torch.cuda.memory_reserved()
        used, held = (others + torch.cuda.max_memory_allocated()) / total, (total - free) / total
    assert used <= 0.2
    assert held <= 0.235, "PyTorch's allocator may keep some of what was given back"
    told = f"{used:.1%} used and {held:.1%} held where 20 % were asked for, with a vocabulary of 150,000"
    report("CUDA: memory", told)


def test_no_room_says_what_to_change():
    with pytest.raises(OutOfMemoryError, match="gpu_memory_utilization"):
        LLM("tiny", gpu_memory_utilization=0.0001)
