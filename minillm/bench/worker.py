"""A process that holds one engine, loaded once, and measures workloads that it is sent: a JSON object a line.

This one file imports nothing of minillm, so that it runs in the environment of a peer:

    PEER'S-PYTHON worker.py transformers | transformers-continuous | vllm | llama.cpp

Lines of stdin, and what comes back for them on stdout:

    {"load": {"model": path, "dtype": name, "threads": number, "max_model_len": tokens}}
    → {"version": name}
    {"run": [[prompt, output_len], …]}
    → {"first_token_seconds": …, "seconds": …, "answers": [[token, …], …]}

Or ``{"error": what went wrong}``, and the worker goes on. It ends where stdin ends. Answers are greedy and go beyond
end tokens; what the engine itself prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

Ask = tuple[list[int], int]
"""A prompt, and how many tokens to write."""
STATIC_BATCH = 64
KV_BYTES = 2**30
"""Memory for keys and values, where an engine asks how much it may have: minillm's own default on a CPU."""


class Measured(NamedTuple):
    """Seconds until the first token of any request, and until the last of all."""

    first_token_seconds: float
    seconds: float
    answers: list[list[int]]


class Engine(Protocol):
    """What a worker holds."""

    version: str

    def run(self, asks: list[Ask]) -> Measured: ...


class Clock:
    """Seconds since it was made, and when the first token came."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.first: float | None = None

    def token(self) -> None:
        """There is a token."""
        if self.first is None:
            self.first = time.perf_counter()

    def stop(self, answers: list[list[int]]) -> Measured:
        """The last token has come."""
        end = time.perf_counter()
        return Measured((end if self.first is None else self.first) - self.start, end - self.start, answers)


class Transformers:
    """transformers' `generate` on padded batches: a row goes on until the longest of its batch is finished."""

    def __init__(self, model: str, dtype: str, threads: int, max_model_len: int) -> None:
        transformers = import_module("transformers")
        self.version = f"transformers {transformers.__version__}"
        self.torch = import_module("torch")
        self.torch.set_num_threads(threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()

    def run(self, asks: list[Ask]) -> Measured:
        clock = Clock()
        answers: list[list[int]] = []
        for start in range(0, len(asks), STATIC_BATCH):
            answers += self._batch(asks[start : start + STATIC_BATCH], clock)
        return clock.stop(answers)

    def _batch(self, asks: list[Ask], clock: Clock) -> list[list[int]]:
        width, longest = max(len(prompt) for prompt, _ in asks), max(count for _, count in asks)
        tokens = self.torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in asks])
        mask = self.torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in asks])

        def never_stop(ids: Any, scores: Any, **_: Any) -> Any:
            clock.token()
            return self.torch.zeros(len(ids), dtype=self.torch.bool)

        written = self.model.generate(
            tokens,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=longest,
            min_new_tokens=longest,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[never_stop],
        )
        return [row[width : width + count].tolist() for row, (_, count) in zip(written, asks, strict=True)]


class ContinuousTransformers(Transformers):
    """transformers' own continuous batching over pages."""

    def run(self, asks: list[Ask]) -> Measured:
        transformers = import_module("transformers")
        longest = max(count for _, count in asks)
        generation = transformers.GenerationConfig(
            max_new_tokens=longest, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        page = transformers.ContinuousBatchingConfig.page_size
        blocks = sum(-(-(len(prompt) + count) // page) for prompt, count in asks)
        config = transformers.ContinuousBatchingConfig(num_blocks=blocks + 1)
        with self.model.continuous_batching_context_manager(generation, True, 60, config) as manager:
            return self._drive(manager, asks)

    def _drive(self, manager: Any, asks: list[Ask]) -> Measured:
        clock = Clock()
        for index, (prompt, count) in enumerate(asks):
            manager.add_request(prompt, request_id=str(index), max_new_tokens=count, record_timestamps=True)
        answers: dict[str, list[int]] = {}
        first: list[float] = []
        while len(answers) < len(asks):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("the thread of transformers' continuous batching ended before its requests did")
            if result is None or not result.is_finished():
                continue
            if result.error is not None:
                raise RuntimeError(result.error)
            answers[result.request_id] = list(result.generated_tokens)
            first.append(result.timestamps[0])
        clock.first = min(first)
        return clock.stop([answers[str(index)] for index in range(len(asks))])


class Vllm:
    """vLLM, stepped by hand so that the first token is seen when it comes."""

    def __init__(self, model: str, dtype: str, threads: int, max_model_len: int) -> None:
        self.vllm = import_module("vllm")
        self.version = f"vllm {self.vllm.__version__}"
        self.delta = import_module("vllm.sampling_params").RequestOutputKind.DELTA
        self.llm = self.vllm.LLM(
            model,
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=max_model_len,
            kv_cache_memory_bytes=KV_BYTES,
            seed=0,
        )

    def run(self, asks: list[Ask]) -> Measured:
        self.llm.reset_prefix_cache()  # else a repetition would find the prompts of the run before
        engine = self.llm.llm_engine
        clock = Clock()
        places = {}
        for index, (prompt, count) in enumerate(asks):
            params = self.vllm.SamplingParams(
                temperature=0, ignore_eos=True, max_tokens=count, detokenize=False, output_kind=self.delta
            )
            places[engine.add_request(str(index), {"prompt_token_ids": prompt}, params)] = index
            places[str(index)] = index
        answers: list[list[int]] = [[] for _ in asks]
        while engine.has_unfinished_requests():
            for output in engine.step():
                clock.token()
                answers[places[output.request_id]].extend(output.outputs[0].token_ids)
        return clock.stop(answers)


class LlamaCpp:
    """llama.cpp by its C interface: decodes and prompts share batches, and a common beginning is computed once."""

    BATCH = 2048
    """Tokens of a batch: llama.cpp's own default."""

    def __init__(self, model: str, dtype: str, threads: int, max_model_len: int) -> None:
        package = import_module("llama_cpp")
        self.numpy = import_module("numpy")
        self.lib, self.threads = package.llama_cpp, threads
        self.version = f"llama-cpp-python {package.__version__}"
        self.lib.llama_backend_init()
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(model.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self.vocab_size = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        self.batch = self.lib.llama_batch_init(self.BATCH, 0, 1)

    def run(self, asks: list[Ask]) -> Measured:
        shared = common_beginning([prompt for prompt, _ in asks]) if len(asks) > 1 else 0
        context = self._context(asks, shared)
        try:
            return self._drive(context, asks, shared)
        finally:
            self.lib.llama_free(context)

    def _context(self, asks: list[Ask], shared: int) -> Any:
        """Memory for these requests: one pool where they share a beginning, else a stretch for each."""
        params = self.lib.llama_context_default_params()
        lengths = [-(-(len(prompt) + count) // 256) * 256 for prompt, count in asks]
        params.kv_unified = shared > 0
        params.n_ctx = sum(lengths) if params.kv_unified else max(lengths) * len(asks)
        params.n_seq_max = len(asks)
        params.n_batch = self.BATCH
        params.n_threads = params.n_threads_batch = self.threads
        context = self.lib.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError(f"llama.cpp cannot make a context of {params.n_ctx} tokens")
        return context

    def _drive(self, context: Any, asks: list[Ask], shared: int) -> Measured:
        clock = Clock()
        answers: list[list[int]] = [[] for _ in asks]
        if shared:
            self._feed(context, [(token, at, 0, False) for at, token in enumerate(asks[0][0][:shared])])
            for sequence in range(1, len(asks)):
                self.lib.llama_memory_seq_cp(self.lib.llama_get_memory(context), 0, sequence, -1, -1)
        waiting = [
            (token, at, sequence, at == len(prompt) - 1)
            for sequence, (prompt, _) in enumerate(asks)
            for at, token in enumerate(prompt)
            if at >= shared
        ]
        batch: list[tuple[int, int, int, bool]] = []
        while batch or waiting:
            room = self.BATCH - len(batch)
            batch, waiting = batch + waiting[:room], waiting[room:]
            sequences = [sequence for _, _, sequence, wanted in batch if wanted]
            for sequence, token in zip(sequences, self._feed(context, batch), strict=True):
                clock.token()
                answers[sequence].append(token)
            batch = [
                (answers[sequence][-1], len(asks[sequence][0]) + len(answers[sequence]) - 1, sequence, True)
                for sequence in sequences
                if len(answers[sequence]) < asks[sequence][1]
            ]
        return clock.stop(answers)

    def _feed(self, context: Any, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, position, sequence, whether the next token is wanted); returns the likeliest next tokens."""
        batch, wanted = self.batch, 0
        for start in range(0, len(entries), self.BATCH):
            piece = entries[start : start + self.BATCH]
            batch.n_tokens = len(piece)
            for index, (token, at, sequence, wants) in enumerate(piece):
                batch.token[index], batch.pos[index] = token, at
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
                batch.logits[index] = wants
                wanted += wants
            status = self.lib.llama_decode(context, batch)
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
        if not wanted:
            return []
        logits = self.numpy.ctypeslib.as_array(self.lib.llama_get_logits(context), (wanted, self.vocab_size))
        return list(map(int, logits.argmax(axis=1)))


def common_beginning(rows: list[list[int]]) -> int:
    """How many leading tokens all have in common."""
    shortest = min(map(len, rows))
    return next((at for at in range(shortest) if len({row[at] for row in rows}) > 1), shortest)


ENGINES: dict[str, Callable[..., Engine]] = {
    "transformers": Transformers,
    "transformers-continuous": ContinuousTransformers,
    "vllm": Vllm,
    "llama.cpp": LlamaCpp,
}


def serve(load: Callable[..., Engine]) -> None:
    """Answer the lines of stdin until it ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # engines print to stdout too, and that is spoken for
    engine: Engine | None = None
    for line in sys.stdin:
        try:
            message = json.loads(line)
            if "load" in message:
                engine = load(**message["load"])
                reply: dict[str, Any] = {"version": engine.version}
            elif engine is None:
                raise RuntimeError("nothing has been loaded")
            else:
                reply = _measure(engine, [(prompt, count) for prompt, count in message["run"]])
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def _measure(engine: Engine, asks: list[Ask]) -> dict[str, Any]:
    measured = engine.run(asks)
    expected, written = [count for _, count in asks], [len(answer) for answer in measured.answers]
    if written != expected:
        raise RuntimeError(f"answers of {sum(expected)} tokens were asked for, and {sum(written)} came")
    return measured._asdict()


def _preload_vllm(threads: int) -> None:
    """Begin again with the libraries and the two settings that vLLM's guide for CPUs asks for."""
    prefix = Path(sys.prefix)
    patterns = ("lib/libiomp5.so", "lib/python*/site-packages/vllm/libs/libtcmalloc*.so*")
    libraries = [library for pattern in patterns for library in prefix.glob(pattern)]
    if libraries and "LD_PRELOAD" not in os.environ:
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        os.environ["LD_PRELOAD"] = ":".join(map(str, libraries))
        os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    if sys.argv[1] == "vllm":
        _preload_vllm(int(os.environ["OMP_NUM_THREADS"]))
    serve(ENGINES[sys.argv[1]])
