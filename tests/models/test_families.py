"""Every family against transformers' own class: logits and greedy tokens, for each key/value store."""

from __future__ import annotations

import pytest
import torch

from minillm.cache.contiguous import ContiguousCache
from minillm.models.loader import load_model
from minillm.transformer.generation import generate
from minillm.transformer.kv import PaddedBatch
from tests.helpers import TokenComparison, reference_greedy, reference_logits
from tests.models.families import FAMILIES

PROMPTS = [[5, 17, 3, 99, 42, 7, 7, 120, 11, 2, 64, 31], [150, 9, 1], [33, 4, 8, 15, 16, 23, 42]]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    reference = FAMILIES[request.param](folder)
    reference.config._attn_implementation = "eager"  # some families' soft caps exist only there
    return request.param, reference, load_model(folder, dtype="float32", device="cpu")


@torch.inference_mode()
def test_logits_and_greedy_tokens(family, report):
    name, reference, decoder = family
    expected = reference_logits(reference, PROMPTS)

    batch = PaddedBatch((0,) * len(PROMPTS), tuple(map(len, PROMPTS)))
    tokens = torch.tensor([row + [0] * (batch.seq_len - len(row)) for row in PROMPTS])
    cache = ContiguousCache.for_decoder(decoder, len(PROMPTS), 64)
    cache.begin(batch)
    differences = []
    for logits in (decoder(tokens), decoder(tokens, batch.positions(), cache)):
        differences += [float((ours[: len(e)] - e).abs().max()) for ours, e in zip(logits, expected, strict=True)]

    whole = torch.tensor([PROMPTS[0] * 2])
    target = reference_logits(reference, whole.tolist())[0]
    cache = ContiguousCache.for_decoder(decoder, 1, 64)
    split = len(PROMPTS[0])
    for start, length in [(0, split), *((at, 1) for at in range(split, 2 * split - 5)), (2 * split - 5, 5)]:
        step = PaddedBatch.full(1, length, start)
        cache.begin(step)
        logits = decoder(whole[:, start : start + length], step.positions(), cache)[0]
        differences.append(float((logits - target[start : start + length]).abs().max()))
    assert max(differences) < 1e-4

    compared = TokenComparison()
    references = [reference_greedy(reference, prompt, 40) for prompt in PROMPTS]
    for store in (None, ContiguousCache.for_decoder(decoder, len(PROMPTS), 64)):
        steps = list(generate(decoder, PROMPTS, store, max_tokens=40))
        for row, (theirs, gaps) in enumerate(references):
            compared.add([step[row] for step in steps], theirs, gaps)
    report("family x (largest logit difference, tokens)", f"{name:34} {max(differences):.1e}  {compared}")
