"""The paged engine against transformers, every family: greedy tokens of prompts submitted together, with preemption."""

from __future__ import annotations

import itertools
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
BLOCK_SIZES, CHUNKS, CACHING, BACKENDS = (1, 8, 16, 32), (1, 7, 64), (True, False), ("reference", "auto")
GRID = list(itertools.product(BLOCK_SIZES, CHUNKS, CACHING, BACKENDS))
POOL_TOKENS = {1: 96, 7: 128, 64: 208}
"""So little that requests preempt each other; a step of one token has one request, and nothing to preempt."""


def settings_of(number: int) -> list[tuple[int, int, bool, str]]:
    """Six of the grid's 48: every block size, every chunk, with and without; the families together see all of it."""
    return [
        (
            BLOCK_SIZES[(number + j) % 4],
            CHUNKS[j % 3],
            CACHING[(number // 4 + j // 2) % 2],
            BACKENDS[(number + j + j // 3) % 2],
        )
        for j in range(6)
    ]


def test_families_see_all_settings():
    assert {setting for number in range(len(FAMILIES)) for setting in settings_of(number)} == set(GRID)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    reference = FAMILIES[request.param](folder)
    reference.config._attn_implementation = "eager"
    return request.param, folder, [reference_greedy(reference, prompt, NEW) for prompt in PROMPTS]


def test_greedy_tokens_with_preemption(family, report):
    name, folder, expected = family
    compared, preemptions, hits = TokenComparison(), [], 0
    for block_size, chunk, caching, backend in settings_of(list(FAMILIES).index(name)):
        sizes = {"max_num_seqs": min(32, chunk), "max_num_batched_tokens": chunk, "max_model_len": 100}
        memory = {"block_size": block_size, "num_gpu_blocks_override": -(-POOL_TOKENS[chunk] // block_size)}
        how = {"enable_prefix_caching": caching, "attention_backend": backend, "dtype": "float32", "device": "cpu"}
        with LLM(folder, skip_tokenizer_init=True, **sizes, **memory, **how) as llm:
            # A token a step takes long, and has nothing to do with how many wait.
            first = 0 if chunk > 1 else len(PROMPTS) - 8
            outputs = llm.generate(PROMPTS[first:], SamplingParams(temperature=0, max_tokens=NEW), use_tqdm=False)
            counts, pool = llm.engine.counts, llm.engine.scheduler.pool
        assert pool.num_free == pool.num_blocks
        assert (counts.num_preemptions > 0) == (chunk > 1)
        preemptions.append(counts.num_preemptions)
        hits += counts.prefix_cache_hits
        for output, (tokens, gaps) in zip(outputs, expected[first:], strict=True):
            compared.add(output.outputs[0].token_ids, tokens, gaps)
    assert hits > 0
    report("paged engine x family (32 prompts x 4 settings, 8 x 2)", f"{name:34} {compared}; {preemptions} preemptions")


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
