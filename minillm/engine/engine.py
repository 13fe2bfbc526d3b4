"""The engine: requests come, steps are taken, outputs go.

It is driven from outside: `LLM` calls `step` in a loop, a server in a thread, an explorer by hand.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float
from llguidance import LLMatcher
from torch import Tensor

from minillm.cache.block_table import BlockTable
from minillm.checks import check_token_ids
from minillm.engine.detokenizer import Detokenizer
from minillm.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprobs
from minillm.engine.params import RequestOutputKind, SamplingParams
from minillm.engine.request import Request, Status
from minillm.engine.runner import StepLogits
from minillm.engine.sampler import Choice
from minillm.engine.scheduler import Schedule, Scheduled, Scheduler
from minillm.engine.structured import GrammarCompiler
from minillm.engine.trace import Trace
from minillm.errors import InvalidRequestError
from minillm.models.tokenizer import token_ids


class Runner(Protocol):
    """Computes steps; the simulator's only keeps time."""

    def compute(self, step: Schedule) -> StepLogits: ...

    def check(self) -> None:
        """Raise what keeps it from computing another step."""

    def close(self) -> None: ...


class TokenChooser(Protocol):
    """Chooses tokens by logits; the simulator's does not look at them."""

    def sample(self, logits: Float[Tensor, "rows vocab"], requests: Sequence[Request]) -> list[Choice]: ...

    def logprobs(self, logits: Float[Tensor, "vocab"], token: int, count: int) -> TokenLogprobs: ...


@dataclass
class _Answers:
    """A prompt and its answers, as the engine keeps them."""

    request_id: str
    prompt: str | None
    params: SamplingParams
    requests: list[Request]
    detokenizers: list[Detokenizer | None]
    num_given: list[int] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return all(request.status is Status.FINISHED for request in self.requests)


@dataclass
class EngineCounts:
    """What happened since the start, in tokens and times."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    num_steps: int = 0


class Engine:
    """Scheduler, runner and sampler, put together.

    Args:
        end_ids: tokens that end an answer unless it is asked to go on.
        tokenizer: makes text of tokens; None where no text is wanted.
        vocab_size: tokens that prompts may hold.
        clock: seconds.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        sampler: TokenChooser,
        *,
        vocab_size: int,
        end_ids: frozenset[int] = frozenset(),
        tokenizer: Any = None,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        trace: Trace | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.sampler = sampler
        self.vocab_size = vocab_size
        self.end_ids = end_ids
        self.tokenizer = tokenizer
        self.clock = clock
        self.trace = trace
        self.counts = EngineCounts()
        self.grammars = GrammarCompiler(tokenizer, vocab_size, end_ids)
        self._seeds = torch.Generator().manual_seed(seed)
        self._answers: dict[str, _Answers] = {}

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self._answers)

    @property
    def unfinished(self) -> set[str]:
        """Ids of the requests that are being worked on."""
        return set(self._answers)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        arrival_time: float | None = None,
        matcher: LLMatcher | None = None,
    ) -> None:
        """Take a request in; it is scheduled by the coming steps.

        Args:
            matcher: of its `structured_outputs`, where they have been compiled already.

        Raises:
            InvalidRequestError: what cannot be generated; the engine is as it was.
        """
        params.verify()
        self._check(request_id, prompt_token_ids, params)
        arrival = self.clock() if arrival_time is None else arrival_time
        tokens, bad_words = list(prompt_token_ids), self._bad_word_ids(params)
        if matcher is None and params.structured_outputs is not None:
            matcher = self.grammars.compile(params.structured_outputs)
        requests = [self._request(request_id, tokens, params, index, arrival, bad_words) for index in range(params.n)]
        for request in requests:
            request.matcher = None if matcher is None else matcher.deep_copy()
        requests[0].siblings = requests[1:]
        self.scheduler.add(requests[0])
        detokenizers = [self._detokenizer(request) for request in requests]
        self._answers[request_id] = _Answers(request_id, prompt, params, requests, detokenizers, [0] * params.n)

    def check(self) -> None:
        """Raise what keeps the engine from another step; whoever drives it asks now and then while there is none.

        Raises:
            RankError: one of the processes that run the model together has died.
        """
        self.runner.check()

    def step(self) -> list[RequestOutput]:
        """Compute one step; return the outputs of the requests that it brought further.

        Where it is interrupted, by an exception or Ctrl-C, requests are computed again from their beginnings by the
        steps that follow, and nothing that was written is lost.
        """
        if not self.scheduler.has_requests:
            return []
        try:
            return self._step()
        except BaseException:  # Ctrl-C too
            self.scheduler.take_back()
            raise

    def _step(self) -> list[RequestOutput]:
        start = self.clock()
        step = self.scheduler.schedule()
        logits = self.runner.compute(step)
        self.scheduler.computed(step)
        now = self.clock()
        self.counts.num_steps += 1
        self.counts.num_preemptions += len(step.preempted)
        for part in step.scheduled:
            if part.request.metrics.first_scheduled_time is None:
                part.request.metrics.first_scheduled_time = start
                self.counts.prompt_tokens += len(part.request.prompt_token_ids)
                self.counts.prefix_cache_queries += len(part.request.prompt_token_ids)
                self.counts.prefix_cache_hits += part.request.num_cached_tokens or 0
            if part.request in logits.prompt:
                self._take_prompt_logprobs(part, logits.prompt[part.request])
        if self.trace is not None:
            self.trace.record(self.scheduler, step, start, now)
        return self._outputs(self._take_tokens(step, logits, now))

    def abort(self, request_id: str) -> RequestOutput | None:
        """Stop a request, whatever its state; unknown ones are done already. Returns what it has so far."""
        answers = self._answers.pop(request_id, None)
        if answers is None:
            return None
        for request in answers.requests:
            if request.status is not Status.FINISHED:
                self._finish(request, "abort", None, self.clock())
        return self._output(answers)

    def close(self) -> None:
        """Abort everything and give all memory back."""
        for request_id in list(self._answers):
            self.abort(request_id)
        self.runner.close()

    def _check(self, request_id: str, tokens: Sequence[int], params: SamplingParams) -> None:
        longest = self.scheduler.config.max_model_len
        if request_id in self._answers:
            raise InvalidRequestError(f"request {request_id!r} is being worked on already: choose another id")
        if not len(tokens):
            raise InvalidRequestError("the prompt is empty: give it at least one token")
        if len(tokens) >= longest:
            raise InvalidRequestError(
                f"the prompt has {len(tokens)} tokens, and max_model_len={longest} leaves no room for an answer: "
                "shorten it or raise max_model_len"
            )
        for what, ids in (
            ("prompt", tokens),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("logit_bias", params.logit_bias or ()),
        ):
            check_token_ids(ids, self.vocab_size, what)
        never = [token for token in params.stop_token_ids or () if not 0 <= token < self.vocab_size]
        if never:
            warnings.warn(f"stop_token_ids {never} are no tokens of this model, and end nothing", stacklevel=4)
        if self.tokenizer is None and (params.stop or params.bad_words):
            raise InvalidRequestError("stop and bad_words are texts, and this engine has no tokenizer")

    def _request(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        index: int,
        arrival: float,
        bad_words: list[list[int]],
    ) -> Request:
        room = self.scheduler.config.max_model_len - len(prompt)
        request = Request(
            request_id,
            prompt,
            params,
            room if params.max_tokens is None else min(params.max_tokens, room),
            BlockTable(self.scheduler.pool),
            RequestMetrics(arrival),
            index,
            logprobs=None if params.logprobs is None else [],
            bad_word_ids=bad_words,
        )
        if not params.is_greedy:
            if params.seed is None:
                seed = int(torch.randint(2**62, (), generator=self._seeds))
            else:
                seed = (params.seed + index) % 2**64
            request.generator = torch.Generator().manual_seed(seed)
        return request

    def _bad_word_ids(self, params: SamplingParams) -> list[list[int]]:
        """Each bad word as it is cut at the beginning of a text and behind a space."""
        texts = [text for word in params.bad_words or () for text in (word, " " + word.lstrip())]
        found = [token_ids(self.tokenizer, text) for text in texts]
        return [list(ids) for ids in dict.fromkeys(map(tuple, found)) if ids]

    def _detokenizer(self, request: Request) -> Detokenizer | None:
        params = request.params
        if self.tokenizer is None or not params.detokenize:
            return None
        return Detokenizer(
            self.tokenizer,
            request.prompt_token_ids,
            skip_special_tokens=params.skip_special_tokens,
            stops=params.stops,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    def _take_prompt_logprobs(self, part: Scheduled, logits: Float[Tensor, "tokens vocab"]) -> None:
        """Row i says what was expected after token start + i."""
        request = part.request
        if part.start == 0:
            request.prompt_logprobs = [None]
        assert request.prompt_logprobs is not None, "a prompt begins at 0"
        count = request.params.prompt_logprobs
        assert count is not None, "the runner gives these rows only where they are asked for"
        following = request.prompt_token_ids[part.start + 1 : part.start + 1 + len(logits)]
        for row, token in zip(logits, following, strict=True):
            request.prompt_logprobs.append(self.sampler.logprobs(row, token, count))

    def _take_tokens(self, step: Schedule, logits: StepLogits, now: float) -> list[_Answers]:
        """Choose the next token of every request that is up to date; return whose answers grew."""
        writers: list[Request] = []
        rows: list[int] = []
        for row, part in enumerate(part for part in step.scheduled if part.samples):
            together = [part.request, *self.scheduler.fork(part.request)]
            writers += together
            rows += [row] * len(together)
        if not writers:
            return []
        asked = logits.next if rows == list(range(len(logits.next))) else logits.next[rows]
        for request, choice in zip(writers, self.sampler.sample(asked, writers), strict=True):
            self._take_token(request, choice, now)
        return [self._answers[request_id] for request_id in dict.fromkeys(request.request_id for request in writers)]

    def _take_token(self, request: Request, choice: Choice, now: float) -> None:
        if choice.token is None:
            self._finish(request, "error", choice.error, now)
            return
        request.output_token_ids.append(choice.token)
        self.counts.generation_tokens += 1
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = now
        if request.logprobs is not None and choice.logprobs is not None:
            request.logprobs.append(choice.logprobs)
            request.cumulative_logprob += choice.logprobs[choice.token].logprob
        params = request.params
        is_end = choice.token in self.end_ids and not params.ignore_eos
        is_stop = choice.token in (params.stop_token_ids or ())
        if request.matcher is not None and not is_end:
            request.matcher.consume_token(choice.token)
        if is_end or is_stop:
            if params.include_stop_str_in_output:
                self._detokenize(request, choice.token)
            self._finish(request, "stop", choice.token if is_stop else None, now)
        elif stop := self._detokenize(request, choice.token):
            self._finish(request, "stop", stop, now)
        elif request.is_complete:
            self._finish(request, "stop", None, now)
        elif len(request.output_token_ids) == request.max_tokens:
            self._finish(request, "length", None, now)

    def _detokenize(self, request: Request, token: int) -> str | None:
        detokenizer = self._answers[request.request_id].detokenizers[request.index]
        return None if detokenizer is None else detokenizer.add(token)

    def _finish(self, request: Request, reason: str, stop: int | str | None, now: float) -> None:
        request.finish_reason, request.stop_reason = reason, stop
        request.metrics.finished_time = now
        self.scheduler.finish(request)

    def _outputs(self, grown: Sequence[_Answers]) -> list[RequestOutput]:
        found = []
        for answers in grown:
            if answers.finished:
                del self._answers[answers.request_id]
            if answers.finished or answers.params.output_kind is not RequestOutputKind.FINAL_ONLY:
                found.append(self._output(answers))
        return found

    def _output(self, answers: _Answers) -> RequestOutput:
        first = answers.requests[0]
        return RequestOutput(
            answers.request_id,
            answers.prompt,
            first.prompt_token_ids,
            [self._completion(answers, index) for index in range(len(answers.requests))],
            answers.finished,
            first.prompt_logprobs,
            first.num_cached_tokens or 0,
            first.metrics,
        )

    def _completion(self, answers: _Answers, index: int) -> CompletionOutput:
        request, detokenizer = answers.requests[index], answers.detokenizers[index]
        finished = request.status is Status.FINISHED
        start, text = 0, ""
        is_delta = answers.params.output_kind is RequestOutputKind.DELTA
        if detokenizer is not None:
            if finished and not (request.finish_reason == "stop" and isinstance(request.stop_reason, str)):
                detokenizer.finish()
            text = detokenizer.new_text(finished=finished)
            if not is_delta:
                text = detokenizer.text[: detokenizer.num_given]
        if is_delta:
            start, answers.num_given[index] = answers.num_given[index], len(request.output_token_ids)
        return CompletionOutput(
            index,
            text,
            request.output_token_ids[start:],
            None if request.logprobs is None else request.cumulative_logprob,
            None if request.logprobs is None else request.logprobs[start:],
            request.finish_reason,
            request.stop_reason,
        )
