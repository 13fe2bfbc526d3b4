"""minillm's engine behind the protocol of `worker.py`; a quantisation may be named on the command line."""

from __future__ import annotations

import sys
import time
from functools import partial

import torch

import minillm
from minillm.bench.worker import Ask, Measured, serve
from minillm.engine.params import SamplingParams
from minillm.llm import LLM


class Minillm:
    """`LLM` as it is, on the CPU, without text.

    Args:
        quantization: of the weights.
    """

    def __init__(
        self, model: str, dtype: str, threads: int, max_model_len: int, quantization: str | None = None
    ) -> None:
        torch.set_num_threads(threads)
        self.version = f"minillm {minillm.__version__}"
        self.llm = LLM(
            model,
            dtype=dtype,
            quantization=quantization,
            device="cpu",
            skip_tokenizer_init=True,
            max_model_len=max_model_len,
        )

    def run(self, asks: list[Ask]) -> Measured:
        self.llm.reset_prefix_cache()  # else a repetition would find the prompts of the run before
        start = time.monotonic()
        params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=count) for _, count in asks]
        outputs = self.llm.generate([prompt for prompt, _ in asks], params, use_tqdm=False)
        seconds = time.monotonic() - start
        first = min(
            output.metrics.first_token_time
            for output in outputs
            if output.metrics is not None and output.metrics.first_token_time is not None
        )
        return Measured(first - start, seconds, [output.outputs[0].token_ids for output in outputs])


if __name__ == "__main__":
    serve(partial(Minillm, quantization=sys.argv[1] if len(sys.argv) > 1 else None))
