"""An `LLM` as the routes use it: what clients ask for becomes tokens, tokens go to the engine's thread."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from fastapi.concurrency import run_in_threadpool

from minillm.checks import check_token_ids
from minillm.engine.outputs import RequestOutput
from minillm.engine.params import SamplingParams
from minillm.errors import ConfigError, InvalidRequestError, OverloadedError, ShuttingDownError
from minillm.llm import LLM, encode_prompt
from minillm.models.chat_template import chat_text
from minillm.models.tokenizer import token_ids
from minillm.server.engine_thread import EngineThread, RequestStream
from minillm.server.metrics import ServerMetrics
from minillm.server.protocol import ChatFields, CompletionRequest
from minillm.server.template_process import chat_text_apart

SPARE_REQUESTS = 64
"""Requests in flight beyond those whose answers may be waited for: being received, tokenized, or read by the client."""

TokenizedPrompt = tuple[str | None, list[int]]
"""A prompt's text, if it has one, and its tokens."""


class UnknownModelError(InvalidRequestError):
    """A request names a model that is not served."""


class ContextLengthError(InvalidRequestError):
    """Prompt and answer do not fit into the model's context."""


@dataclass(frozen=True)
class ServerConfig:
    """What the server itself is told.

    Attributes:
        model: where the model came from.
        served_names: what clients may call it; the first is what answers say.
        chat_template: instead of the tokenizer's.
        trust_request_chat_template: whether requests may bring a template of their own.
        api_keys: any of which a client must show; none are asked for where there are none.
        max_requests: answers that are waited for at a time; `SPARE_REQUESTS` more requests may be in flight.

    Raises:
        ConfigError: a blank key, which would open the server to everybody.
    """

    model: str
    served_names: Sequence[str]
    chat_template: str | None = None
    api_keys: Sequence[str] = ()
    max_requests: int = 1024
    trust_request_chat_template: bool = False

    def __post_init__(self) -> None:
        if not all(key.strip() for key in self.api_keys):
            raise ConfigError(
                "an API key is blank: give one that clients can send (--api-key, MINILLM_API_KEY), or none"
            )


class Service:
    """An `LLM` as the routes use it: prompts to tokens, tokens to the engine's thread."""

    def __init__(self, llm: LLM, config: ServerConfig) -> None:
        self.llm = llm
        self.config = config
        self.tokenizer = llm.get_tokenizer()
        self.metrics = ServerMetrics(llm.engine, config.served_names[0])
        self.engine = EngineThread(llm.engine, max_requests=config.max_requests, listener=self.metrics.observe)
        self.is_draining = False
        self.num_in_flight = 0  # requests whose response has not ended
        self.created = int(time.time())
        self.defaults = llm.generation_config
        self._compiling = asyncio.Semaphore(1)  # one at a time: what one may take, in time and memory, is bounded
        with contextlib.suppress(InvalidRequestError):  # of a tokenizer that cannot: told to requests that ask for it
            llm.engine.grammars.prepare()  # now, since it stops all threads
        template_options = inspect.signature(self.tokenizer.apply_chat_template).parameters
        self._template_options = frozenset(template_options) - {"kwargs"} | {"tokenizer"}
        self._max_characters = llm.max_model_len * max(map(len, self.tokenizer.get_vocab()))

    @property
    def is_drained(self) -> bool:
        """Whether nothing is, and nothing more will be, answered."""
        return self.is_draining and not self.engine.num_unfinished

    @property
    def error(self) -> BaseException | None:
        """What the engine has failed of."""
        return self.engine.error

    def abort_all(self, reason: str) -> None:
        """Stop everything; whoever waits is told the reason."""
        self.engine.abort_all(reason)

    def check_ready(self, num_answers: int = 0) -> None:
        """Raise EngineDeadError, ShuttingDownError or OverloadedError where so many answers will not be given now."""
        self.engine.check_alive()
        if self.is_draining:
            raise ShuttingDownError("the server is shutting down and takes no new requests")
        self.engine.check_room(num_answers)

    def check_in_flight(self) -> None:
        """Raise as `check_ready`, or OverloadedError, where one more request is too many to be looked at."""
        if self.num_in_flight >= self.config.max_requests + SPARE_REQUESTS:
            self.check_ready()
            raise OverloadedError(f"{self.num_in_flight} requests are in flight already: try again later")

    def model_name(self, asked: str | None) -> str:
        """What to call the model.

        Raises:
            UnknownModelError: the client asked for another one.
        """
        if asked is not None and asked not in self.config.served_names:
            raise UnknownModelError(f"The model `{asked}` does not exist: it is {', '.join(self.config.served_names)}")
        return self.config.served_names[0] if asked is None else asked

    def decode(self, tokens: list[int]) -> str:
        return cast(str, self.tokenizer.decode(tokens))

    def prompts(self, asked: CompletionRequest) -> list[TokenizedPrompt]:
        """Texts and tokens of a completion's prompts.

        Raises:
            InvalidRequestError: there is none, or it comes with an option that is not for its kind.
        """
        given = asked.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = cast(list[str] | list[list[int]], [given])
        if not given:
            raise InvalidRequestError("prompt is empty: give at least one")
        if len(given) * asked.num_answers > self.config.max_requests:
            raise InvalidRequestError(f"prompts times n is more than the {self.config.max_requests} that may wait")
        if asked.add_special_tokens is not None and not isinstance(given[0], str):
            raise InvalidRequestError("add_special_tokens is for texts, and prompt holds token ids: leave it out")
        special = asked.add_special_tokens is not False
        return [
            (one, self.encode(one, special=special)) if isinstance(one, str) else (None, cast(list[int], one))
            for one in given
        ]

    def encode(self, text: str, *, special: bool) -> list[int]:
        """A text's tokens, with the tokenizer's special ones or without.

        Raises:
            ContextLengthError: more letters than as many tokens as the model can hold could have.
            InvalidRequestError: a text that no tokenizer can read.
        """
        self._check_characters(len(text))
        return encode_prompt(self.tokenizer, text) if special else token_ids(self.tokenizer, text)

    def conversation(self, asked: ChatFields) -> TokenizedPrompt:
        """A conversation as the chat template writes it.

        Raises:
            InvalidRequestError: options that are not the template's, or a template where none is taken.
            ContextLengthError: as `encode`, of the messages or of what the template writes.
            TokenizerError: no template, or one that refuses the conversation.
            OverloadedError: too many templates of clients are being rendered.
        """
        text = self._rendered(asked)
        self._check_characters(len(text))
        return text, token_ids(self.tokenizer, text)

    def _rendered(self, asked: ChatFields) -> str:
        messages = [message.model_dump(exclude_none=True) for message in asked.messages]
        options = self._chat_options(asked)
        if asked.chat_template is None:
            return chat_text(self.tokenizer, messages, chat_template=self.config.chat_template, **options)
        if not self.config.trust_request_chat_template:
            raise InvalidRequestError(
                "chat_template is not taken from requests: leave it out, or start the server with "
                "--trust-request-chat-template"
            )
        variables = self.tokenizer.special_tokens_map | options
        return chat_text_apart(messages, chat_template=asked.chat_template, **variables)

    def _chat_options(self, asked: ChatFields) -> dict[str, Any]:
        """What `chat_text` is told beside messages and template; variables of the template are among it."""
        variables = asked.chat_template_kwargs or {}
        if forbidden := sorted(self._template_options & variables.keys()):
            raise InvalidRequestError(f"chat_template_kwargs may not hold {', '.join(forbidden)}")
        self._check_characters(sum(message.num_characters for message in asked.messages))
        continues = bool(asked.continue_final_message)
        begins = not continues if asked.add_generation_prompt is None else asked.add_generation_prompt
        return variables | {
            "tools": [tool.for_template() for tool in asked.tools or ()],
            "add_generation_prompt": begins,
            "continue_final_message": continues,
        }

    async def begin(
        self, request_id: str, prompts: Sequence[TokenizedPrompt], params: SamplingParams, max_tokens: int | None
    ) -> list[RequestStream]:
        """Hand all prompts to the engine, or none.

        Args:
            max_tokens: what the client asked for, if it did.

        Raises:
            MinillmError: a request that cannot be, too many, or an engine that has failed.
        """
        check_token_ids(params.stop_token_ids or (), self.llm.engine.vocab_size, "stop_token_ids")
        for _, ids in prompts:
            self._check_room(len(ids), max_tokens)
        matcher = None
        if params.structured_outputs is not None:
            async with self._compiling:
                matcher = await run_in_threadpool(self.llm.engine.grammars.compile, params.structured_outputs)
        self.check_ready()
        begun = await asyncio.gather(
            *(
                self.engine.generate(f"{request_id}-{at}", ids, params, prompt=text, matcher=matcher)
                for at, (text, ids) in enumerate(prompts)
            ),
            return_exceptions=True,
        )
        streams = [one for one in begun if isinstance(one, RequestStream)]
        for one in begun:
            if isinstance(one, BaseException):
                abort(streams)
                raise one
        return streams

    def _check_characters(self, count: int) -> None:
        """Before a text is cut into tokens, which takes long where it is long."""
        if count > self._max_characters:
            raise ContextLengthError(
                f"This model's maximum context length is {self.llm.max_model_len} tokens, and {count} characters are "
                "more than these can hold: shorten the text"
            )

    def _check_room(self, num_tokens: int, max_tokens: int | None) -> None:
        longest = self.llm.max_model_len
        if num_tokens >= longest or num_tokens + (max_tokens or 1) > longest:
            raise ContextLengthError(
                f"This model's maximum context length is {longest} tokens. You asked for {num_tokens} of prompt and "
                f"{max_tokens or 'at least 1'} of answer: shorten the prompt or lower max_tokens"
            )


def abort(streams: Sequence[RequestStream]) -> None:
    """Stop those that have not ended."""
    for stream in streams:
        stream.abort()


async def whole(streams: Sequence[RequestStream]) -> list[RequestOutput]:
    """The last output of each stream; all are stopped where one fails or nobody waits any more."""
    try:
        outputs = []
        for stream in streams:
            outputs.append([output async for output in stream][-1])
        return outputs
    finally:
        abort(streams)


async def merged(streams: Sequence[RequestStream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """Outputs of several streams as they come, with the number of the stream."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    nexts = {asyncio.ensure_future(anext(stream, None)): at for at, stream in enumerate(streams)}
    try:
        while nexts:
            done, _ = await asyncio.wait(nexts, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                at, found = nexts.pop(task), task.result()
                if found is not None:
                    nexts[asyncio.ensure_future(anext(streams[at], None))] = at
                    yield at, found
    finally:
        for task in nexts:
            task.cancel()
