"""Requests and tokens a second of many requests at once, as `vllm bench throughput` measures and prints them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from minillm.bench.results import check_writable, write_json
from minillm.bench.workloads import Ask, random_asks, sharegpt_asks
from minillm.engine.params import SamplingParams
from minillm.errors import ConfigError, InvalidRequestError
from minillm.llm import LLM

DEFAULT_INPUT_LEN, DEFAULT_OUTPUT_LEN = 32, 128


def main(
    engine: dict[str, Any],
    *,
    dataset_name: str,
    dataset_path: Path | None,
    input_len: int | None,
    output_len: int | None,
    num_prompts: int,
    num_warmups: int,
    n: int,
    disable_detokenize: bool,
    output_json: Path | None,
) -> None:
    """Measure once, and print.

    Args:
        engine: the arguments of `LLM`.
        dataset_name: "random" tokens, or "sharegpt": conversations from `dataset_path`.
        input_len, output_len: tokens of each prompt and answer; where None, 32 and 128, or the conversation's.
        num_warmups: prompts of another seed that are answered before the clock starts.
        n: answers to a prompt.

    Raises:
        ConfigError, InvalidRequestError: options that contradict each other, or requests that do not fit.
    """
    check_writable(output_json)
    _check_dataset(dataset_name, dataset_path, input_len)
    seed = int(engine["seed"])
    with LLM(**engine) as llm:

        def asks(count: int, seed: int) -> list[Ask]:
            if dataset_path is not None:
                return sharegpt_asks(dataset_path, count, llm.get_tokenizer(), llm.max_model_len, output_len, seed)
            lengths = (input_len or DEFAULT_INPUT_LEN, output_len or DEFAULT_OUTPUT_LEN)
            return random_asks(count, *lengths, llm.engine.vocab_size, seed)

        asked = asks(num_prompts, seed)
        check_fits(llm, max(len(ask.prompt) + ask.output_len for ask in asked))
        if num_warmups:
            answer(llm, asks(num_warmups, seed + 1), n, not disable_detokenize, use_tqdm=False)
        start = time.perf_counter()
        written = answer(llm, asked, n, not disable_detokenize, use_tqdm=True)
        seconds = time.perf_counter() - start
    prompt_tokens = sum(len(ask.prompt) for ask in asked)
    total = prompt_tokens + written
    print(
        f"Throughput: {num_prompts / seconds:.2f} requests/s, {total / seconds:.2f} total tokens/s, "
        f"{written / seconds:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {prompt_tokens}")
    print(f"Total num output tokens:  {written}")
    if output_json is not None:
        result = {
            "model_id": str(engine["model"]),
            "elapsed_time": seconds,
            "num_requests": num_prompts,
            "total_num_tokens": total,
            "requests_per_second": num_prompts / seconds,
            "tokens_per_second": total / seconds,
        }
        write_json(output_json, result)


def answer(llm: LLM, asked: list[Ask], n: int, detokenize: bool, *, use_tqdm: bool) -> int:
    """Answer all, at temperature 1 and beyond end tokens, as vLLM's benchmarks do; return how many tokens it wrote."""
    params = [
        SamplingParams(n=n, temperature=1.0, ignore_eos=True, max_tokens=ask.output_len, detokenize=detokenize)
        for ask in asked
    ]
    outputs = llm.generate([ask.prompt for ask in asked], params, use_tqdm=use_tqdm)
    return sum(len(one.token_ids) for output in outputs for one in output.outputs)


def check_fits(llm: LLM, longest: int) -> None:
    """Raise where a prompt with its answer is longer than the engine allows."""
    if longest > llm.max_model_len:
        raise InvalidRequestError(
            f"a prompt and its answer take {longest} tokens, more than max_model_len={llm.max_model_len}: "
            "lower --input-len or --output-len"
        )


def _check_dataset(name: str, path: Path | None, input_len: int | None) -> None:
    if name not in ("random", "sharegpt"):
        raise ConfigError(f"--dataset-name must be random or sharegpt, not {name!r}")
    if name == "sharegpt" and path is None:
        raise ConfigError("--dataset-name sharegpt needs --dataset-path, a JSON file of conversations")
    if name == "random" and path is not None:
        raise ConfigError("--dataset-path is read with --dataset-name sharegpt only: leave it out, or set the name")
    if name == "sharegpt" and input_len is not None:
        raise ConfigError("--input-len is for random prompts: a conversation has its own length")
