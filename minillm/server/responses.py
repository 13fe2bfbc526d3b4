"""The engine's outputs as OpenAI's objects, whole and in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

from minillm.engine.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from minillm.errors import InvalidRequestError, ShuttingDownError
from minillm.server.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatFinishReason,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    FinishReason,
    PromptLogprob,
    PromptLogprobs,
    PromptTokensDetails,
    TokenLogprob,
    ToolChoice,
    TopLogprob,
    Usage,
)
from minillm.server.tool_calls import CallReader, call_reader
from minillm.text import HALF_A_CHARACTER


@dataclass
class Answer:
    """What answers to one request of a client have in common.

    Attributes:
        id: the whole answer's.
        model: the name that the client knows.
        echoes: for each prompt its text, where it is to stand before the answers.
        only_prompt: leave the answers out.
        tells_prompt_logprobs: whether those of the prompt are told apart from an echo.
        decode: the text of tokens.
        top_logprobs: of a chat, how many likeliest tokens are told.
        tool_choice: of a chat, which may force calls.
        return_token_ids: also give the answers' tokens.
    """

    id: str
    model: str
    decode: Callable[[list[int]], str]
    echoes: Sequence[str] | None = None
    only_prompt: bool = False
    tells_prompt_logprobs: bool = False
    top_logprobs: int = 0
    tool_choice: ToolChoice | None = None
    return_token_ids: bool = False
    created: int = field(default_factory=lambda: int(time.time()))


def new_id(kind: str) -> str:
    """An id that nobody else has."""
    return f"{kind}-{uuid.uuid4().hex}"


class UsageCount:
    """Adds up tokens; a request's prompt counts once, however many outputs tell of it."""

    def __init__(self) -> None:
        self._prompts: dict[str, tuple[int, int]] = {}
        self._written = 0

    def add(self, output: RequestOutput) -> None:
        self._prompts[output.request_id] = len(output.prompt_token_ids), output.num_cached_tokens
        self._written += sum(len(answer.token_ids) for answer in output.outputs)

    def usage(self, *, only_prompt: bool = False) -> Usage:
        """All that was added."""
        prompt, cached = (sum(column) for column in zip(*self._prompts.values(), strict=True))
        written = 0 if only_prompt else self._written
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=written,
            total_tokens=prompt + written,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )


def usage(outputs: Iterable[RequestOutput], *, only_prompt: bool = False) -> Usage:
    """The tokens of whole outputs."""
    count = UsageCount()
    for output in outputs:
        count.add(output)
    return count.usage(only_prompt=only_prompt)


def finish_reason(answer: CompletionOutput) -> FinishReason | None:
    """OpenAI's word for why an answer ended.

    Raises:
        InvalidRequestError: no token could be chosen.
        ShuttingDownError: it was stopped from outside.
    """
    if answer.finish_reason == "error":
        raise InvalidRequestError(str(answer.stop_reason))
    if answer.finish_reason == "abort":
        raise ShuttingDownError("the answer was stopped")
    return cast(FinishReason | None, answer.finish_reason)


# --- completions


def completion(request: Answer, outputs: Sequence[RequestOutput]) -> Completion:
    """The answers to all prompts.

    Raises:
        InvalidRequestError: an answer in which no token could be chosen.
    """
    choices = [
        _completion_choice(request, at, output, answer, 0, is_first=True)
        for at, output in enumerate(outputs)
        for answer in output.outputs
    ]
    return _completion(request, choices, usage=usage(outputs, only_prompt=request.only_prompt))


async def completion_chunks(
    request: Answer, outputs: AsyncIterator[tuple[int, RequestOutput]], *, include_usage: bool
) -> AsyncIterator[Completion]:
    """A stream's pieces, of which the joined texts are the answers.

    Raises:
        InvalidRequestError: an answer in which no token could be chosen.
    """
    count = UsageCount()
    offsets: dict[int, int] = {}
    ended: set[int] = set()
    async for at, output in outputs:
        count.add(output)
        for answer in output.outputs:
            index = at * len(output.outputs) + answer.index
            if index in ended:
                continue
            is_first = index not in offsets
            choice = _completion_choice(request, at, output, answer, offsets.get(index, 0), is_first=is_first)
            offsets[index] = _end(choice.logprobs, offsets.get(index, 0))
            if choice.finish_reason is not None:
                ended.add(index)
            if choice.text or choice.finish_reason or choice.token_ids or (choice.logprobs and choice.logprobs.tokens):
                yield _completion(request, [choice])
    if include_usage:
        yield _completion(request, [], usage=count.usage(only_prompt=request.only_prompt))


def _completion(request: Answer, choices: list[CompletionChoice], **usage: Usage) -> Completion:
    return Completion(
        id=request.id,
        object="text_completion",
        created=request.created,
        model=request.model,
        choices=choices,
        **usage,
    )


def _completion_choice(
    request: Answer, at: int, output: RequestOutput, answer: CompletionOutput, offset: int, *, is_first: bool
) -> CompletionChoice:
    """An answer or a piece of it.

    Args:
        at: which prompt.
        offset: letters of the tokens before this piece.
        is_first: whether nothing has been given yet, so that the prompt is to be given where it is asked for.
    """
    reason, text = finish_reason(answer), answer.text
    tokens: list[tuple[int, TokenLogprobs | None]] = [*zip(answer.token_ids, answer.logprobs or [], strict=False)]
    if request.only_prompt:
        reason, text, tokens = "length", "", []
    if request.echoes is not None and is_first:
        text = request.echoes[at] + text
        tokens = [*zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=False), *tokens]
    return CompletionChoice(
        index=at * len(output.outputs) + answer.index,
        text=text,
        logprobs=None if answer.logprobs is None else _completion_logprobs(request, tokens, offset),
        finish_reason=reason,
        stop_reason=None if request.only_prompt else answer.stop_reason,
        **_token_ids(request, answer),
        prompt_logprobs=_prompt_logprobs(request, output),
    )


def _token_ids(request: Answer, answer: CompletionOutput) -> dict[str, list[int]]:
    """The answer's tokens, or a piece's, where they are asked for."""
    return {"token_ids": [] if request.only_prompt else answer.token_ids} if request.return_token_ids else {}


def _completion_logprobs(
    request: Answer, tokens: Iterable[tuple[int, TokenLogprobs | None]], offset: int
) -> CompletionLogprobs:
    """Log-probabilities by position; a prompt's first token has none."""
    found = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token, logprobs in tokens:
        text = request.decode([token])
        found.tokens.append(text)
        found.token_logprobs.append(None if logprobs is None else _finite(logprobs[token].logprob))
        found.top_logprobs.append(
            None if logprobs is None else {one.decoded_token or "": _finite(one.logprob) for one in logprobs.values()}
        )
        found.text_offset.append(offset)
        offset += len(text)
    return found


def _prompt_logprobs(request: Answer, output: RequestOutput) -> PromptLogprobs | None:
    if not request.tells_prompt_logprobs or output.prompt_logprobs is None:
        return None
    return [None if found is None else _by_token(found) for found in output.prompt_logprobs]


def _by_token(found: TokenLogprobs) -> dict[int, PromptLogprob]:
    return {
        token: PromptLogprob(logprob=_finite(one.logprob), rank=one.rank, decoded_token=one.decoded_token)
        for token, one in found.items()
    }


def _end(logprobs: CompletionLogprobs | None, start: int) -> int:
    """Where the next token's text begins."""
    return start if logprobs is None or not logprobs.tokens else logprobs.text_offset[-1] + len(logprobs.tokens[-1])


def _finite(logprob: float) -> float:
    """JSON has no infinity: as in vLLM and OpenAI, -9999 is impossible."""
    return max(logprob, -9999.0)


# --- chats


def chat_completion(request: Answer, output: RequestOutput) -> ChatCompletion:
    """The answers to a conversation.

    Raises:
        InvalidRequestError: an answer in which no token could be chosen.
    """
    return ChatCompletion(
        id=request.id,
        object="chat.completion",
        created=request.created,
        model=request.model,
        choices=[_chat_choice(request, answer) for answer in output.outputs],
        usage=usage([output]),
        prompt_logprobs=_prompt_logprobs(request, output),
    )


def _chat_choice(request: Answer, answer: CompletionOutput) -> ChatChoice:
    reason = _chat_finish_reason(request, answer)
    assert reason is not None, "whole outputs have ended"
    return ChatChoice(
        index=answer.index,
        message=_message(answer.text, call_reader(request.tool_choice)),
        logprobs=_chat_logprobs(request, answer),
        finish_reason=reason,
        stop_reason=answer.stop_reason,
        **_token_ids(request, answer),
    )


def _message(text: str, reader: CallReader | None) -> AssistantMessage:
    if reader is None:
        return AssistantMessage(role="assistant", content=text)
    reader.read(text)
    return AssistantMessage(role="assistant", content=None, tool_calls=reader.calls)


def _chat_finish_reason(request: Answer, answer: CompletionOutput) -> ChatFinishReason | None:
    """As `finish_reason`, or that the calls that were required are complete."""
    reason = finish_reason(answer)
    is_complete = reason == "stop" and answer.stop_reason is None  # the grammar ended it, nothing that was asked for
    return "tool_calls" if is_complete and request.tool_choice == "required" else reason


async def chat_chunks(
    request: Answer, outputs: AsyncIterator[tuple[int, RequestOutput]], *, include_usage: bool
) -> AsyncIterator[ChatCompletionChunk]:
    """A stream's pieces: each answer's role first, then what is new.

    Raises:
        InvalidRequestError: an answer in which no token could be chosen.
    """
    count = UsageCount()
    readers: dict[int, CallReader | None] = {}
    ended: set[int] = set()
    async for _, output in outputs:
        count.add(output)
        for answer in output.outputs:
            if answer.index in ended:
                continue
            reason, logprobs = _chat_finish_reason(request, answer), _chat_logprobs(request, answer)
            if answer.index not in readers:
                readers[answer.index] = call_reader(request.tool_choice)
                yield _chat_chunk(request, answer, _first_delta(readers[answer.index]))
            if reason is not None:
                ended.add(answer.index)
            delta = _delta(answer.text, readers[answer.index])
            tokens = _token_ids(request, answer)
            has_tokens = (logprobs and logprobs.content) or tokens.get("token_ids")
            if delta.content or delta.tool_calls or reason is not None or has_tokens:
                yield _chat_chunk(request, answer, delta, logprobs, reason, **tokens)
    if include_usage:
        yield _chat_completion_chunk(request, [], usage=count.usage())


def _first_delta(reader: CallReader | None) -> Delta:
    return Delta(role="assistant", content="" if reader is None else None)


def _delta(text: str, reader: CallReader | None) -> Delta:
    if reader is None:
        return Delta(content=text)
    calls = reader.read(text)
    return Delta(tool_calls=calls) if calls else Delta()


def _chat_chunk(
    request: Answer,
    answer: CompletionOutput,
    delta: Delta,
    logprobs: ChatLogprobs | None = None,
    reason: ChatFinishReason | None = None,
    **token_ids: list[int],
) -> ChatCompletionChunk:
    choice = ChatChunkChoice(
        index=answer.index,
        delta=delta,
        logprobs=logprobs,
        finish_reason=reason,
        stop_reason=None if reason is None else answer.stop_reason,
        **token_ids,
    )
    return _chat_completion_chunk(request, [choice])


def _chat_completion_chunk(request: Answer, choices: list[ChatChunkChoice], **usage: Usage) -> ChatCompletionChunk:
    return ChatCompletionChunk(
        id=request.id,
        object="chat.completion.chunk",
        created=request.created,
        model=request.model,
        choices=choices,
        **usage,
    )


def _chat_logprobs(request: Answer, answer: CompletionOutput) -> ChatLogprobs | None:
    if answer.logprobs is None:
        return None
    return ChatLogprobs(
        content=[
            _token_logprob(token, found, request.top_logprobs)
            for token, found in zip(answer.token_ids, answer.logprobs, strict=True)
        ]
    )


def _token_logprob(token: int, found: TokenLogprobs, count: int) -> TokenLogprob:
    """The chosen token, and the `count` likeliest in its place, best first."""
    chosen = _top_logprob(token, found)
    best = sorted((other for other in found if found[other].rank <= count), key=lambda other: found[other].rank)
    return TokenLogprob(
        token=chosen.token,
        logprob=chosen.logprob,
        bytes=chosen.bytes,
        top_logprobs=[_top_logprob(other, found) for other in best],
    )


def _top_logprob(token: int, found: TokenLogprobs) -> TopLogprob:
    text = found[token].decoded_token or ""
    is_part = HALF_A_CHARACTER in text
    return TopLogprob(token=text, logprob=_finite(found[token].logprob), bytes=None if is_part else list(text.encode()))
