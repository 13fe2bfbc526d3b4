"""The paged engine against transformers, every family: greedy tokens of prompts submitted together, with preemption."""

from __future__ import annotations

import random

import pytest
import torch

from minillm.cache.block_table import BlockTable
from minillm.cache.contiguous import ContiguousCache
from minillm.engine.params import SamplingParams
from minillm.engine.runner import Chunk
from minillm.llm import LLM
from minillm.models.loader import load_model
from minillm.transformer.kv import PaddedBatch
from tests.helpers import TokenComparison, reference_greedy
from tests.models.families import FAMILIES

NEW = 24
RNG = random.Random(0)
PROMPTS = [[RNG.randrange(160) for _ in range(RNG.choice((1, 2, 5, 15, 16, 17, 40, 60)))] for _ in range(28)]
PROMPTS += [PROMPTS[3] + [7], PROMPTS[3], (PROMPTS[6] * 60)[:48], (PROMPTS[6] * 60)[:48]]  # shared beginnings
SETTINGS = [
    # block_size, chunk (tokens a step), prefix caching, blocks
    {"block_size": 16, "max_num_batched_tokens": 64, "enable_prefix_caching": True, "num_gpu_blocks_override": 14},
    {"block_size": 1, "max_num_batched_tokens": 7, "enable_prefix_caching": False, "num_gpu_blocks_override": 130},
    {"block_size": 8, "max_num_batched_tokens": 7, "enable_prefix_caching": True, "num_gpu_blocks_override": 24},
    {"block_size": 32, "max_num_batched_tokens": 64, "enable_prefix_caching": False, "num_gpu_blocks_override": 7},
    {"block_size": 16, "max_num_batched_tokens": 1, "enable_prefix_caching": True, "num_gpu_blocks_override": 8},
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    reference = FAMILIES[request.param](folder)
    reference.config._attn_implementation = "eager"
    return request.param, folder, [reference_greedy(reference, prompt, NEW) for prompt in PROMPTS]


def test_greedy_tokens_with_preemption(family, report):
    name, folder, expected = family
    compared, preemptions, hits = TokenComparison(), [], 0
    for settings in SETTINGS:
        seats = min(32, settings["max_num_batched_tokens"])
        sizes = {"max_num_seqs": seats, "max_model_len": 100, "dtype": "float32", "device": "cpu"}
        with LLM(folder, skip_tokenizer_init=True, **sizes, **settings) as llm:
            outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=NEW), use_tqdm=False)
            counts, pool = llm.engine.counts, llm.engine.scheduler.pool
            assert pool.num_free == pool.num_blocks
            preemptions.append(counts.num_preemptions)
            hits += counts.prefix_cache_hits
        for output, (tokens, gaps) in zip(outputs, expected, strict=True):
            compared.add(output.outputs[0].token_ids, tokens, gaps)
    assert all(count > 0 for count in preemptions[:4]), preemptions
    assert hits > 0
    report("paged engine x family (32 prompts x 5 settings)", f"{name:34} {compared}; {preemptions} preemptions")


@torch.inference_mode()
def test_paged_logits_equal_contiguous_logits(family):
    _, folder, _ = family
    decoder = load_model(folder, dtype="float32", device="cpu")
    tokens = (PROMPTS[6] * 60)[:60]
    contiguous = ContiguousCache.for_decoder(decoder, 1, 64)
    batch = PaddedBatch.full(1, 60)
    contiguous.begin(batch)
    expected = decoder(torch.tensor([tokens]), batch.positions(), contiguous)[0]
    with LLM(folder, skip_tokenizer_init=True, dtype="float32", device="cpu", block_size=8, max_model_len=64) as llm:
        runner, table, found = llm.engine.runner, BlockTable(llm.engine.scheduler.pool), []
        llm.engine.scheduler.pool.allocate()  # so that blocks are not at their own numbers
        for start, count in ((0, 13), (13, 1), (14, 30), (44, 16)):
            table.append(count)
            found.append(runner.logits(runner.hidden([Chunk(tokens[start : start + count], start, table)])))
        torch.testing.assert_close(torch.cat(found), expected, atol=1e-4, rtol=0)
