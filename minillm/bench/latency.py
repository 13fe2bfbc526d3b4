"""Seconds that one batch of requests takes, as `vllm bench latency` measures and prints them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from minillm.bench.results import check_writable, write_json
from minillm.bench.throughput import answer, check_fits
from minillm.bench.workloads import random_asks
from minillm.llm import LLM

PERCENTAGES = (10, 25, 50, 75, 90, 99)


def main(
    engine: dict[str, Any],
    *,
    input_len: int,
    output_len: int,
    batch_size: int,
    num_iters_warmup: int,
    num_iters: int,
    n: int,
    disable_detokenize: bool,
    output_json: Path | None,
) -> None:
    """Answer the same batch again and again, and print the mean and the percentiles.

    Args:
        engine: the arguments of `LLM`.
        n: answers to a prompt.

    Raises:
        ConfigError, InvalidRequestError: options that contradict each other, or requests that do not fit.
    """
    check_writable(output_json)
    with LLM(**engine) as llm:
        check_fits(llm, input_len + output_len)
        asked = random_asks(batch_size, input_len, output_len, llm.engine.vocab_size, int(engine["seed"]))

        def once() -> float:
            start = time.perf_counter()
            answer(llm, asked, n, not disable_detokenize, use_tqdm=False)
            return time.perf_counter() - start

        for _ in tqdm(range(num_iters_warmup), desc="Warmup iterations"):
            once()
        latencies = [once() for _ in tqdm(range(num_iters), desc="Bench iterations")]
    percentiles = dict(zip(PERCENTAGES, np.percentile(latencies, PERCENTAGES).tolist(), strict=True))
    print(f"Avg latency: {np.mean(latencies)} seconds")
    for percentage, seconds in percentiles.items():
        print(f"{percentage}% percentile latency: {seconds} seconds")
    if output_json is not None:
        result = {
            "model_id": str(engine["model"]),
            "avg_latency": float(np.mean(latencies)),
            "latencies": latencies,
            "percentiles": percentiles,
        }
        write_json(output_json, result)
