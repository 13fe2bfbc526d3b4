"""On a GPU: every family equals itself on the CPU, in float32; "auto" takes CUDA and half precision."""

from __future__ import annotations

import pytest
import torch

from minillm.cache.contiguous import ContiguousCache
from minillm.models.loader import load_model
from minillm.transformer.generation import generate
from minillm.transformer.sampling import Sampling
from tests.helpers import TokenComparison, reference_greedy
from tests.models.families import FAMILIES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

PROMPTS = [[5, 17, 3, 99, 42, 7, 7, 120, 11, 2, 64, 31], [150, 9, 1], [33, 4, 8, 15, 16, 23, 42]]


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_every_family_equals_the_cpu(name, tmp_path, report):
    reference = FAMILIES[name](tmp_path)
    cpu, cuda = (load_model(tmp_path, dtype="float32", device=device) for device in ("cpu", "cuda"))
    tokens = torch.tensor([PROMPTS[0] * 3])
    difference = float((cuda(tokens.cuda()).cpu() - cpu(tokens)).abs().max())
    assert difference < 1e-4
    compared = TokenComparison()
    for store in (None, ContiguousCache.for_decoder(cuda, len(PROMPTS), 64)):
        steps = list(generate(cuda, PROMPTS, store, max_tokens=40))
        for row, prompt in enumerate(PROMPTS):
            compared.add([step[row] for step in steps], *reference_greedy(reference, prompt, 40))
    report("CUDA: family x (largest logit difference, tokens)", f"{name:34} {difference:.1e}  {compared}")


def test_auto_is_cuda_in_half_precision(tmp_path):
    FAMILIES["llama"](tmp_path)
    model = load_model(tmp_path)
    assert model.device.type == "cuda"
    assert model.dtype is torch.bfloat16
    cache = ContiguousCache.for_decoder(model, 3, 64)
    steps = list(generate(model, PROMPTS, cache, max_tokens=20, sampling=Sampling(seed=1)))
    cache = ContiguousCache.for_decoder(model, 3, 64)
    assert steps == list(generate(model, PROMPTS, cache, max_tokens=20, sampling=Sampling(seed=1)))
