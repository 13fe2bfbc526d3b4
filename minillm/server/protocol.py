"""What goes over the wire: OpenAI's objects, with vLLM's additional sampling fields.

A field that OpenAI or vLLM has and this server does not is declared as `None`: null is right, anything else is refused.
Fields that nobody knows are refused too.

What is wrong with a body is found out in the event loop, where everybody waits for it. Hence `fail_fast`: one wrong
item of a list is told of, not each of a million. And hence the limits on how much a field may hold.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from minillm.engine.params import RequestOutputKind, SamplingParams
from minillm.errors import InvalidRequestError

MAX_ANSWERS = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
MAX_PROMPTS = 2**14
MAX_MESSAGES = 2**14
MAX_STOP_TOKENS = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_LENGTH = 100
MAX_ALLOWED_TOKENS = 2**18
MAX_DETOKENIZED = 2**20
MAX_LOGPROBS = 20
MAX_FIELDS = 1024
"""Entries of one JSON object."""
DEFAULT_MAX_TOKENS = 16
INT32 = 2**31 - 1

Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_LENGTH)]
Count = Annotated[int, Field(ge=0, le=INT32)]


def _few(given: Any) -> Any:
    """Refuse an object of too many entries, before each of them is looked at."""
    if isinstance(given, dict) and len(given) > MAX_FIELDS:
        raise PydanticCustomError("too_long", f"an object may have {MAX_FIELDS} entries, not {len(given)}")
    return given


class Model(BaseModel):
    """Refuses what it does not know."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, given: Any) -> Any:
        return _few(given)


# --- requests


class StreamOptions(Model):
    """What a stream holds beside the answer."""

    include_usage: bool | None = None


class SamplingFields(Model):
    """What completions and chats have in common; null is the default."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Taken, and without effect.")

    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[Items[Stop], Field(max_length=MAX_STOPS)] | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_few)] | None = None

    top_k: Annotated[int, Field(ge=-1, le=INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[Items[int], Field(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    allowed_token_ids: Annotated[Items[int], Field(max_length=MAX_ALLOWED_TOKENS)] | None = None
    bad_words: Annotated[Items[BadWord], Field(max_length=MAX_BAD_WORDS)] | None = None

    prompt_logprobs: None = None
    structured_outputs: None = None
    guided_json: None = None
    guided_regex: None = None
    guided_choice: None = None
    guided_grammar: None = None
    logits_processors: None = None

    @property
    def num_answers(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def params(self, defaults: dict[str, Any], **others: Any) -> SamplingParams:
        """The engine's parameters.

        Args:
            defaults: by `SamplingParams`' names, where the request says nothing.
            others: stand above both.

        Raises:
            InvalidRequestError: a field outside its range, or fields that contradict each other.
        """
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options is for stream=true")
        said = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        return SamplingParams(**defaults | said | others, output_kind=kind)


SAMPLING = (
    "n",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "logit_bias",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "allowed_token_ids",
    "bad_words",
)
"""Fields that `SamplingParams` has by the same names."""


class CompletionRequest(SamplingFields):
    """Continue one or several texts."""

    prompt: (
        str
        | Annotated[Items[str], Field(max_length=MAX_PROMPTS)]
        | Items[int]
        | Annotated[Items[Items[int]], Field(max_length=MAX_PROMPTS)]
    )
    max_tokens: Count | None = Field(None, description=f"{DEFAULT_MAX_TOKENS} when null; 0 only with echo.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = Field(None, description="Whether texts get the tokenizer's special tokens.")
    suffix: None = None
    best_of: None = None
    response_format: None = None

    @property
    def only_prompt(self) -> bool:
        """Whether nothing shall be written: the prompt is to be given back, with log-probabilities perhaps."""
        return self.max_tokens == 0

    def to_params(self, defaults: dict[str, Any]) -> SamplingParams:
        """As `params`, with what only completions have."""
        if self.only_prompt and not self.echo:
            raise InvalidRequestError("max_tokens must be at least 1 where echo is not true")
        max_tokens = defaults.get("max_tokens", DEFAULT_MAX_TOKENS) if self.max_tokens is None else self.max_tokens
        prompt_logprobs = self.logprobs if self.echo else None
        return self.params(
            defaults, max_tokens=max(1, max_tokens), logprobs=self.logprobs, prompt_logprobs=prompt_logprobs
        )


class TextPart(Model):
    """A part of a message; only texts are possible."""

    type: Literal["text"]
    text: str


class Message(Model):
    """A message of a conversation."""

    role: str
    content: str | Items[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    tool_calls: None = None
    tool_call_id: None = None
    function_call: None = None

    @property
    def num_characters(self) -> int:
        """At least so many stand in the conversation."""
        parts = [self.content or ""] if isinstance(self.content, str | None) else [part.text for part in self.content]
        return len(self.role) + sum(map(len, parts))


class TextFormat(Model):
    """Plain text: the only form of answers."""

    type: Literal["text"]


class ChatFields(Model):
    """How a conversation is written down for the model."""

    messages: Annotated[Items[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: None = None
    tools: None = None


class ChatCompletionRequest(ChatFields, SamplingFields):
    """Answer a conversation."""

    max_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = Field(None, description="All the room when null.")
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = Field(None, description="Before max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: TextFormat | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: None = None
    functions: None = None
    function_call: None = None
    reasoning_effort: None = None
    modalities: None = None
    audio: None = None
    prediction: None = None
    store: Literal[False] | None = None
    metadata: None = None
    service_tier: None = None
    echo: None = None
    add_special_tokens: None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def to_params(self, defaults: dict[str, Any]) -> SamplingParams:
        """As `params`, with what only chats have."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs is for logprobs=true")
        max_tokens = defaults.get("max_tokens") if self.token_limit is None else self.token_limit
        return self.params(defaults, max_tokens=max_tokens, logprobs=self.top_logprobs or 0 if self.logprobs else None)


class TokenizeTextRequest(Model):
    """The tokens of a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(ChatFields):
    """The tokens of a conversation."""

    model: str | None = None
    return_token_strs: bool = False


class DetokenizeRequest(Model):
    """The text of tokens."""

    model: str | None = None
    tokens: Annotated[Items[int], Field(max_length=MAX_DETOKENIZED)]


# --- answers


class Error(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class ErrorResponse(BaseModel):
    """Every answer that is no success."""

    error: Error


class PromptTokensDetails(BaseModel):
    """Tokens of prompts that were found in memory."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request, over all its prompts and answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens, in four lists of the same length."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class CompletionChoice(BaseModel):
    """An answer, or, in a stream, the next piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None


class Completion(BaseModel):
    """Continuations; in a stream, a piece of one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A token and its log-probability; `bytes` is null where the token is only a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]


class AssistantMessage(BaseModel):
    """The model's answer."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """An answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None


class ChatCompletion(BaseModel):
    """Answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What is new of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """The next piece of an answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None


class ChatCompletionChunk(BaseModel):
    """A piece of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "minillm"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    """Tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    """Text of tokens."""

    prompt: str


class VersionResponse(BaseModel):
    """The version of minillm."""

    version: str
