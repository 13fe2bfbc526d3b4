"""The engine on a GPU, beside transformers' `generate` and its continuous batching, on random weights."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from minillm.engine.params import SamplingParams
from minillm.errors import ConfigError
from minillm.llm import LLM

MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "tie_word_embeddings": True,
    },
}
"""Shapes of published models."""
REQUESTS, NEW_TOKENS, STATIC_BATCH = 256, 128, 64
PROMPTS = (64, 512)
"""Shortest and longest prompt."""


def prompts(vocab_size: int) -> list[list[int]]:
    """Random tokens, lengths drawn evenly."""
    rng = random.Random(0)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(*PROMPTS))] for _ in range(REQUESTS)]


def tokens_a_second(work: Callable[[], int], repeats: int = 2) -> float:
    """Of a function that returns how many tokens it wrote; the first run, which compiles, does not count."""
    work()
    speeds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        written = work()
        torch.cuda.synchronize()
        speeds.append(written / (time.perf_counter() - start))
    return median(speeds)


def ours(folder: str, asked: list[list[int]], **options: Any) -> float:
    """This engine."""
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    sizes: dict[str, Any] = {
        "max_model_len": PROMPTS[1] + NEW_TOKENS,
        "max_num_seqs": REQUESTS,
        "max_num_batched_tokens": 8192,
    }
    with LLM(folder, skip_tokenizer_init=True, enable_prefix_caching=False, **sizes, **options) as llm:

        def work() -> int:
            outputs = llm.generate(asked, params, use_tqdm=False)
            return sum(len(output.outputs[0].token_ids) for output in outputs)

        return tokens_a_second(work)


def static_batches(model: Any, asked: list[list[int]]) -> float:
    """transformers' `generate` on padded batches."""

    def work() -> int:
        for start in range(0, len(asked), STATIC_BATCH):
            rows = asked[start : start + STATIC_BATCH]
            width = max(map(len, rows))
            tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows], device="cuda")
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device="cuda")
            lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
            model.generate(tokens, attention_mask=mask, do_sample=False, pad_token_id=0, eos_token_id=None, **lengths)
        return len(asked) * NEW_TOKENS

    return tokens_a_second(work)


def continuous_batching(model: Any, asked: list[list[int]]) -> float:
    """transformers' own continuous batching."""
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def work() -> int:
        outputs = model.generate_batch(inputs=asked, generation_config=config, progress_bar=False)
        written = sum(len(output.generated_tokens) for output in outputs.values())
        if written != len(asked) * NEW_TOKENS:
            raise RuntimeError(f"wrote {written} of {len(asked) * NEW_TOKENS} tokens")
        return written

    return tokens_a_second(work)


PEERS = {"transformers, static batches": static_batches, "transformers, continuous batching": continuous_batching}


def main(peers: bool = True) -> None:
    """Measure, and print a table last.

    Raises:
        ConfigError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ConfigError("this needs an NVIDIA GPU")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.backends.cuda.enable_cudnn_sdp(False)  # it fails on masks of transformers' continuous batching

    workload = f"{REQUESTS} requests, prompts of {PROMPTS[0]} to {PROMPTS[1]}, {NEW_TOKENS} new tokens each, bfloat16"
    table = Table("shapes of", "engine", "tokens/s", "minillm is", title=f"{torch.cuda.get_device_name()}: {workload}")
    for name, shape in MODELS.items():
        config = AutoConfig.for_model(**shape)
        asked = prompts(shape["vocab_size"])
        speeds: dict[str, float | str] = {}
        with tempfile.TemporaryDirectory() as folder:
            with torch.device("cuda"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
            model.save_pretrained(folder)
            for peer, way in PEERS.items() if peers else ():
                try:
                    speeds[peer] = way(model, asked)
                except Exception as error:  # a peer that fails is told of, and the others go on
                    speeds[peer] = f"{type(error).__name__}: {str(error)[:60]}"
            del model
            torch.cuda.empty_cache()
            speeds["minillm, without CUDA graphs"] = ours(folder, asked, enforce_eager=True)
            mine = speeds["minillm"] = ours(folder, asked)
        for engine, speed in speeds.items():
            told = f"{speed:,.0f}" if isinstance(speed, float) else speed
            table.add_row(name, engine, told, f"{mine / speed:.1f}×" if isinstance(speed, float) else "")
    Console(width=120).print(table)
