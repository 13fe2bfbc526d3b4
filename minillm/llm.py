"""The offline door: `LLM` loads a model and answers prompts, with vLLM's names, arguments and outputs."""

from __future__ import annotations

import gc
import itertools
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedTokenizerBase

from minillm.cache.block_pool import BlockPool
from minillm.checks import check_size, check_token_ids
from minillm.engine.beam_search import beam_search
from minillm.engine.engine import Engine
from minillm.engine.load import RunnerConfig, start_runner
from minillm.engine.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from minillm.engine.params import BeamSearchParams, RequestOutputKind, SamplingParams
from minillm.engine.runner import ModelRunner, check_gpu_memory_utilization
from minillm.engine.sampler import Sampler
from minillm.engine.scheduler import Scheduler
from minillm.engine.trace import Trace
from minillm.errors import ConfigError, InvalidRequestError, TokenizerError
from minillm.models.source import resolve
from minillm.models.tokenizer import chat_prompt, get_tokenizer, stop_token_ids, token_ids
from minillm.progress import progress
from minillm.text import read_json
from minillm.transformer.decoder import Decoder
from minillm.transformer.linear import QUANTIZATIONS
from minillm.transformer.search import Hypothesis

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``."""
Message = Mapping[str, Any]

DEFAULT_GPU_MEMORY_UTILIZATION = 0.92
GENERATION_CONFIG = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
"""What generation_config.json may say of sampling."""


class Metric(NamedTuple):
    """A counter or gauge, named as the server names it."""

    name: str
    value: float


class LLM:
    """A model that generates text.

    Every argument is vLLM's, with its default. What vLLM has and this engine cannot honour is an error.

    Args:
        model: a local folder or ``.gguf`` file, a hub id, or a short name (``tiny``).
        tokenizer: where the tokenizer comes from, if not from the model.
        skip_tokenizer_init: use none; prompts are token ids then, and answers have no text.
        trust_remote_code: accepted; no code from a model's repository is ever executed.
        tensor_parallel_size: divide the model among so many processes, each with its share of heads, feed-forward
            units, vocabulary, keys and values (on a GPU each has one). They are started here, or by `torchrun`, under
            which every process makes the same LLM, and those of other ranks than 0 end in it.
        dtype: "auto", "float32", "bfloat16", "float16", or a torch.dtype.
        quantization: "int8" or "int4": round the weights of linear layers to so many bits (CPU only). Fewer bytes for
            each token; answers differ.
        seed: of the draws of requests without a seed of their own.
        gpu_memory_utilization: share of a GPU's memory to use in all. On a CPU `kv_cache_memory_bytes` decides.
        kv_cache_memory_bytes: memory for keys and values, of each rank. On a CPU, None is 1 GiB, or what `max_num_seqs`
            sequences of full length take if that is less.
        num_gpu_blocks_override: this many blocks of keys and values, whatever the memory.
        max_model_len: tokens of a prompt and its answer; the model's context when None.
        block_size: tokens of a block of keys and values.
        enable_prefix_caching: find the blocks of a prompt's beginning that another request had.
        max_num_seqs: requests in a step.
        max_num_batched_tokens: tokens in a step.
        enforce_eager: take the plain way: no CUDA graphs of decode steps (of several ranks there are none: in them a
            rank that dies would not be noticed), on a CPU no weights laid out for its matrix products.
        attention_backend: "numba" (CPU), "triton" (CUDA), "reference" (PyTorch, anywhere), or "auto".
        device: "auto", "cpu" or "cuda".
        trace: record every step (`llm.trace`).

    Raises:
        MinillmError: a model that cannot be loaded, arguments that contradict each other or cannot be honoured, too
            little memory; the message says what to do.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str | torch.dtype = "auto",
        quantization: str | None = None,
        seed: int = 0,
        gpu_memory_utilization: float | None = None,
        kv_cache_memory_bytes: int | None = None,
        num_gpu_blocks_override: int | None = None,
        max_model_len: int | None = None,
        block_size: int = 16,
        enable_prefix_caching: bool = True,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        enforce_eager: bool = False,
        attention_backend: str = "auto",
        device: str | torch.device = "auto",
        trace: bool = False,
        **unknown: Any,
    ) -> None:
        _refuse(unknown, quantization)
        given = {
            "tensor_parallel_size": tensor_parallel_size,
            "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "num_gpu_blocks_override": num_gpu_blocks_override,
        }
        for name, size in {"block_size": block_size, "max_model_len": max_model_len, **given}.items():
            if size is not None:
                check_size(name, size)
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
            raise ConfigError(f"seed must be a whole number of at most 64 bits, not {seed!r}")
        if not isinstance(model, str | Path) or not str(model):
            raise ConfigError(f"model must be a name or a path, not {model!r}")
        if trust_remote_code:
            warnings.warn("trust_remote_code is not needed: no code from a model is executed", stacklevel=2)
        path = resolve(model)
        self._tokenizer = None if skip_tokenizer_init else get_tokenizer(path if tokenizer is None else tokenizer)
        share = DEFAULT_GPU_MEMORY_UTILIZATION if gpu_memory_utilization is None else gpu_memory_utilization
        check_gpu_memory_utilization(share)
        config = RunnerConfig(
            path=str(path),
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            quantization=quantization,
            enforce_eager=enforce_eager,
            attention_backend=attention_backend,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            gpu_memory_utilization=share,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            num_gpu_blocks_override=num_gpu_blocks_override,
        )
        self.generation_config = _generation_config(path)
        """What the model's publisher recommends in generation_config.json, by `SamplingParams`' names."""
        self._end_ids = frozenset() if self._tokenizer is None else stop_token_ids(path, self._tokenizer)
        self._runner: ModelRunner | None = start_runner(config, tensor_parallel_size)
        if self._runner.leader is not None:  # its thread and processes do not go away with the object
            weakref.finalize(self, self._runner.leader.close)
        if gpu_memory_utilization is not None and self._runner.device.type == "cpu":
            warnings.warn("gpu_memory_utilization decides nothing on a CPU: kv_cache_memory_bytes does", stacklevel=2)
        self._sizes = self._runner.sizes
        self.max_model_len = self._sizes.max_model_len
        self._pool = BlockPool(self._runner.kv.num_blocks, block_size, enable_prefix_caching=enable_prefix_caching)
        self.trace = Trace() if trace else None
        self.engine = Engine(
            Scheduler(self._sizes, self._pool),
            self._runner,
            Sampler(self._end_ids, self._decode_one),
            vocab_size=self._runner.decoder.config.vocab_size,
            end_ids=self._end_ids,
            tokenizer=self._tokenizer,
            seed=seed,
            trace=self.trace,
        )
        self._names = map(str, itertools.count())
        self._outbox: list[RequestOutput] = []

    # --- answering

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer prompts, all at once; the outputs are in their order.

        Args:
            prompts: one or several texts, token ids, ``{"prompt": …}`` or ``{"prompt_token_ids": …}``.
            sampling_params: for all, or one for each; what the model's publisher recommends when None.
            use_tqdm: show progress, if it takes longer than two seconds.

        Raises:
            InvalidRequestError: a prompt or a parameter that cannot be; nothing has been generated then.
        """
        names = self._add(_many(prompts), sampling_params, RequestOutputKind.FINAL_ONLY)
        done: dict[str, RequestOutput] = {}
        written = 0
        start = time.perf_counter()
        with progress(total=len(names), desc="Processed prompts", show=use_tqdm) as bar:
            for output in self._run(names):
                if output.finished:
                    done[output.request_id] = output
                    written += sum(len(answer.token_ids) for answer in output.outputs)
                    bar.set_postfix_str(f"{written / (time.perf_counter() - start):.1f} tokens/s", refresh=False)
                    bar.update()
        return [done[name] for name in names]

    def generate_stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Answer prompts and yield what there is after each step: everything so far, or as `output_kind` says.

        Raises:
            InvalidRequestError: as `generate`, at the first `next`.
        """
        yield from self._run(self._add(_many(prompts), sampling_params))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, written down by the model's chat template.

        Args:
            messages: ``[{"role": "user", "content": "…"}, …]``, or a list of such lists.
            chat_template: another template than the tokenizer's.
            add_generation_prompt: begin the assistant's turn.
            continue_final_message: go on with the last message instead.
            tools: passed to the template, likewise `chat_template_kwargs`.

        Raises:
            TokenizerError: no chat template, or one that refuses the conversation.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
            raise InvalidRequestError(
                "messages are a list of {'role': …, 'content': …}, or a list of such lists, not " + repr(messages)
            )
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        options = {
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            **(chat_template_kwargs or {}),
        }
        tokenizer = self.get_tokenizer()
        prompts = [
            {"prompt": text, "prompt_token_ids": ids}
            for text, ids in (chat_prompt(tokenizer, cast(Sequence[Message], one), **options) for one in conversations)
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """The most probable answers, by beam search; one prompt after the other.

        As in vLLM, a beam's text begins with its prompt.

        Raises:
            InvalidRequestError: a prompt that cannot be, or more beams than `max_num_seqs`.
            CacheFullError: the beams do not fit into memory.
        """
        if not isinstance(params, BeamSearchParams):
            raise InvalidRequestError(f"params must be BeamSearchParams, not {params!r}")
        if params.beam_width > self._sizes.max_num_seqs:
            raise InvalidRequestError(
                f"beam_width ({params.beam_width}) is above max_num_seqs ({self._sizes.max_num_seqs})"
            )
        ids = [self._token_ids(prompt)[1] for prompt in _many(prompts)]
        for tokens in ids:
            self._check_beam_prompt(tokens, params)
        return [self._beams(tokens, params) for tokens in progress(ids, desc="Beam search", show=use_tqdm)]

    # --- looking and tidying

    @property
    def decoder(self) -> Decoder:
        """The model itself.

        Raises:
            ConfigError: it is divided among several processes, and this one has a part of it.
        """
        runner = self._check_open()
        if runner.leader is not None:
            raise ConfigError(
                "this model is divided among several processes: take tensor_parallel_size=1 to look into it"
            )
        return runner.decoder

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            TokenizerError: there is none.
        """
        if self._tokenizer is None:
            raise TokenizerError("this LLM was made with skip_tokenizer_init=True")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's publisher recommends in generation_config.json, else vLLM's defaults."""
        return SamplingParams(**self.generation_config)

    def get_metrics(self) -> list[Metric]:
        """Counters since the start, and how things stand."""
        scheduler, counts = self.engine.scheduler, self.engine.counts
        held = self._pool.num_blocks - self._pool.num_free
        return [
            Metric("minillm:num_requests_running", len(scheduler.running)),
            Metric("minillm:num_requests_waiting", len(scheduler.waiting)),
            Metric("minillm:kv_cache_usage_perc", held / self._pool.num_blocks),
            *(Metric(f"minillm:{name}", value) for name, value in vars(counts).items()),
        ]

    def reset_prefix_cache(self) -> bool:
        """Forget what is stored; False, and nothing done, while requests hold blocks."""
        if self._pool.num_free < self._pool.num_blocks:
            return False
        self._pool.forget_all()
        return True

    def close(self) -> None:
        """Give all memory back; the LLM answers no more."""
        if self._runner is not None:
            self.engine.close()
            self._runner = None
            gc.collect()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- inside

    def _add(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        output_kind: RequestOutputKind | None = None,
    ) -> list[str]:
        """Take all requests in, or none; `output_kind` stands above what the parameters say."""
        self._check_open()
        if not isinstance(params, Sequence):
            params = [self.get_default_sampling_params() if params is None else params] * len(prompts)
        for one in params:
            if not isinstance(one, SamplingParams):
                raise InvalidRequestError(f"sampling_params must be SamplingParams, or a list of them, not {one!r}")
        if len(params) != len(prompts):
            raise InvalidRequestError(
                f"{len(prompts)} prompts and {len(params)} sampling_params: give one for all or each"
            )
        names: list[str] = []
        try:
            for prompt, one in zip(prompts, params, strict=True):
                text, ids = self._token_ids(prompt)
                name = next(self._names)
                wanted = one if output_kind is None else replace(one, output_kind=output_kind)
                self.engine.add_request(name, ids, wanted, prompt=text)
                names.append(name)
        except BaseException:
            self._abort(names)
            raise
        return names

    def _run(self, names: Sequence[str]) -> Iterator[RequestOutput]:
        """Step until these requests are done; whoever stops listening stops them."""
        left = set(names)
        try:
            while left:
                mine = [output for output in self._outbox if output.request_id in left]
                self._outbox = [output for output in self._outbox if output.request_id not in left]
                if not mine:
                    self._check_open()
                    if gone := left - self.engine.unfinished:
                        raise InvalidRequestError(f"request {', '.join(sorted(gone))} was aborted by somebody else")
                    self._outbox += self.engine.step()  # a step may bring on what others wait for
                for output in mine:
                    if output.finished:
                        left.discard(output.request_id)
                    yield output
        finally:
            self._abort(left)
            self._outbox = [output for output in self._outbox if output.request_id not in left]

    def _abort(self, names: Sequence[str] | set[str]) -> None:
        for name in names:
            self.engine.abort(name)

    def _check_open(self) -> ModelRunner:
        if self._runner is None:
            raise InvalidRequestError("this LLM is closed: make a new one")
        return self._runner

    def _token_ids(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """A prompt's text, if it has one, and its tokens."""
        if isinstance(prompt, Mapping):
            if not prompt or prompt.keys() - {"prompt", "prompt_token_ids"}:
                raise InvalidRequestError(
                    f"a prompt is {{'prompt': text}} or {{'prompt_token_ids': ids}}, not a dict of {', '.join(prompt)}"
                )
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        else:
            text, ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        if ids is None and isinstance(text, str):
            return text, encode_prompt(self.get_tokenizer(), text)
        is_list = isinstance(ids, Sequence) and not isinstance(ids, str | bytes)
        if not is_list or not all(isinstance(token, int) for token in cast(Sequence[Any], ids)):
            raise InvalidRequestError(
                f"a prompt is a text or a list of token ids, not {type(ids).__name__}: give several as a list of these"
            )
        return text, list(cast(Sequence[int], ids))

    def _check_beam_prompt(self, tokens: Sequence[int], params: BeamSearchParams) -> None:
        check_token_ids(tokens, self._check_open().decoder.config.vocab_size, "prompt")
        if not tokens:
            raise InvalidRequestError("the prompt is empty: give it at least one token")
        if len(tokens) + params.max_tokens > self.max_model_len:
            raise InvalidRequestError(
                f"{len(tokens)} prompt tokens and max_tokens={params.max_tokens} exceed max_model_len="
                f"{self.max_model_len}"
            )

    def _beams(self, tokens: list[int], params: BeamSearchParams) -> BeamSearchOutput:
        found = beam_search(
            self._check_open(),
            self._pool,
            tokens,
            params,
            end_ids=self._end_ids,
            max_num_batched_tokens=self._sizes.max_num_batched_tokens,
        )
        return BeamSearchOutput(
            [
                BeamSearchSequence(
                    tokens + beam.tokens,
                    beam.score * _length(beam, params) ** params.length_penalty,
                    beam.score,
                    self._decode(tokens + beam.tokens),
                    "length" if len(beam.tokens) == params.max_tokens else "stop",
                )
                for beam in found
            ]
        )

    def _decode(self, tokens: list[int]) -> str:
        return "" if self._tokenizer is None else cast(str, self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _decode_one(self, token: int) -> str:
        return "" if self._tokenizer is None else cast(str, self._tokenizer.decode([token]))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text's tokens, with the special tokens that the tokenizer puts in front, unless the text begins with them.

    Raises:
        InvalidRequestError: a text that no tokenizer can read.
    """
    plain = token_ids(tokenizer, text)
    ids: list[int] = tokenizer(text).input_ids
    at = len(ids) - len(plain)
    has_them = at > 0 and ids[at:] == plain and plain[:at] == ids[:at]
    return plain if has_them else ids


def _length(beam: Hypothesis, params: BeamSearchParams) -> int:
    """Tokens that a beam's score counts: the end token too, where there is one."""
    return min(len(beam.tokens) + 1, params.max_tokens)


def _many(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt as a list of one."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise InvalidRequestError(f"prompts are a text, token ids, or a list of them, not {type(prompts).__name__}")
    if prompts and isinstance(prompts[0], int):
        return [cast(Prompt, prompts)]
    if not prompts:
        raise InvalidRequestError("there is no prompt: give at least one")
    return list(cast(Sequence[Prompt], prompts))


def _refuse(unknown: Mapping[str, Any], quantization: str | None) -> None:
    """Raise for arguments that cannot be honoured."""
    if unknown:
        raise ConfigError(f"LLM does not have {', '.join(sorted(unknown))}: leave it out (help(LLM) lists what it has)")
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ConfigError(f"quantization {quantization!r} is not one of {', '.join(QUANTIZATIONS)}")


def _generation_config(path: Path) -> dict[str, Any]:
    file = path / "generation_config.json"
    if path.is_file() or not file.exists():
        return {}
    said = read_json(file, ConfigError)
    found = {name: said[name] for name in GENERATION_CONFIG if said.get(name) is not None}
    if "max_new_tokens" in found:
        found["max_tokens"] = found.pop("max_new_tokens")
    return found
