"""What goes over the wire: OpenAI's objects, with vLLM's additional sampling fields.

A field that OpenAI or vLLM has and this server does not is declared as `None`: null is right, anything else is refused.
Where a value of it asks for nothing that is right too: such fields are declared as a `Literal`. Fields that nobody
knows are refused.

What is wrong with a body is found out in the event loop, where everybody waits for it. Hence `fail_fast`: one wrong
item of a list is told of, not each of a million. And hence the limits on how much a field may hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from minillm.engine.params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from minillm.errors import InvalidRequestError

MAX_ANSWERS = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
MAX_PROMPTS = 2**14
MAX_MESSAGES = 2**14
MAX_STOP_TOKENS = 1024
MAX_CHOICES = 2**14
MAX_BAD_WORDS = 256
MAX_BAD_WORD_LENGTH = 100
MAX_ALLOWED_TOKENS = 2**18
MAX_DETOKENIZED = 2**20
MAX_LOGPROBS = 20
MAX_CHAT_TEMPLATE = 2**16
"""Letters of a template in a request."""
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
    continuous_usage_stats: Literal[False] | None = None


class StructuredOutputs(Model):
    """What form an answer must have: one of json, regex, choice, grammar, json_object."""

    schema_: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON schema, or its text.")
    regex: str | None = None
    choice: Annotated[Items[Stop], Field(max_length=MAX_CHOICES)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None
    structural_tag: None = None

    def to_params(self) -> StructuredOutputsParams:
        """The engine's parameters.

        Raises:
            InvalidRequestError: none of these, several, or options that do not fit.
        """
        return StructuredOutputsParams(**self.model_dump(by_alias=True, exclude_none=True))


class JsonSchema(Model):
    """A JSON schema under a name; answers satisfy it whether `strict` or not."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Model):
    """Plain text, a JSON object, or what a schema says."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def to_params(self) -> StructuredOutputsParams | None:
        """The engine's parameters; None for plain text.

        Raises:
            InvalidRequestError: a schema is missing, or given for another type.
        """
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise InvalidRequestError("response_format.json_schema is for type json_schema, which needs it")
        if self.json_schema is not None:
            return StructuredOutputsParams(json=self.json_schema.schema_)
        return None if self.type == "text" else StructuredOutputsParams(json_object=True)


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

    return_token_ids: bool | None = Field(None, description="Also give the answer's tokens.")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(None, description="Not in streams.")

    use_beam_search: None = None
    length_penalty: None = None
    truncate_prompt_tokens: None = None
    return_tokens_as_token_ids: None = None
    priority: None = None
    request_id: None = None
    cache_salt: None = None
    vllm_xargs: None = None
    kv_transfer_params: None = None
    guided_json: None = None
    guided_regex: None = None
    guided_choice: None = None
    guided_grammar: None = None
    guided_decoding_backend: None = None
    guided_whitespace_pattern: None = None
    logits_processors: None = None

    @property
    def num_answers(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def form(self) -> StructuredOutputsParams | None:
        """What form answers must have.

        Raises:
            InvalidRequestError: a form that cannot be, or two of them.
        """
        form = None if self.response_format is None else self.response_format.to_params()
        if self.structured_outputs is None:
            return form
        if form is not None:
            raise InvalidRequestError("response_format and structured_outputs both say what form answers have: choose")
        return self.structured_outputs.to_params()

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
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequestError("prompt_logprobs is not given in streams: leave it out, or ask with stream=false")
        said = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        return SamplingParams(**defaults | said | others, output_kind=kind, structured_outputs=self.form())


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
    "prompt_logprobs",
)
"""Fields that `SamplingParams` has by the same names, and that go there as they are."""


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
    add_special_tokens: bool | None = Field(
        None, description="Whether texts get the tokenizer's special tokens: true when null. Not for token ids."
    )
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None
    prompt_embeds: None = None

    @property
    def only_prompt(self) -> bool:
        """Whether nothing shall be written: the prompt is to be given back, with log-probabilities perhaps."""
        return self.max_tokens == 0

    def to_params(self, defaults: dict[str, Any]) -> SamplingParams:
        """As `params`, with what only completions have."""
        if self.only_prompt and not self.echo:
            raise InvalidRequestError("max_tokens must be at least 1 where echo is not true")
        if self.best_of is not None and self.num_answers > self.best_of:
            raise InvalidRequestError("best_of must be at least n: leave it out")
        max_tokens = defaults.get("max_tokens", DEFAULT_MAX_TOKENS) if self.max_tokens is None else self.max_tokens
        prompt_logprobs = self.logprobs if self.echo and self.logprobs is not None else self.prompt_logprobs
        if self.prompt_logprobs not in (None, prompt_logprobs):
            raise InvalidRequestError("with echo, prompt_logprobs must be what logprobs is: leave it out")
        return self.params(
            defaults, max_tokens=max(1, max_tokens), logprobs=self.logprobs, prompt_logprobs=prompt_logprobs
        )


class TextPart(Model):
    """A part of a message; only texts are possible."""

    type: Literal["text"]
    text: str


class FunctionCall(Model):
    """What the model asked a tool for."""

    name: str
    arguments: Annotated[str, Field(description="A JSON object, as text.")]


class ToolCall(Model):
    """A call that the model has made."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(Model):
    """A message of a conversation."""

    role: str
    content: str | Items[TextPart] | None = None
    name: str | None = None
    tool_calls: Items[ToolCall] | None = Field(None, description="Of the assistant.")
    tool_call_id: str | None = Field(None, description="Of a tool: the call that it answers.")
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    reasoning_content: None = None

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls is for messages of the role assistant")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError("tool_call_id is for messages of the role tool")
        return self

    @property
    def num_characters(self) -> int:
        """At least so many stand in the conversation."""
        parts = [self.content or ""] if isinstance(self.content, str | None) else [part.text for part in self.content]
        return len(self.role) + sum(map(len, parts))


class Function(Model):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema.")
    strict: bool | None = Field(None, description="Told to the template.")

    def arguments_schema(self) -> dict[str, Any]:
        """What the arguments of a call satisfy: a JSON object, without anything in it where there are no parameters.

        Raises:
            InvalidRequestError: the parameters are not those of an object.
        """
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        schema = {"type": "object"} | self.parameters
        if schema["type"] != "object":
            raise InvalidRequestError(f"tools: the parameters of {self.name} must have the type 'object'")
        return schema


class Tool(Model):
    """A tool; only functions are possible."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """What the client gave, in this order."""
        said = {name: value for name, value in self.function if name in self.function.model_fields_set}
        return {"type": self.type, "function": said}


class FunctionName(Model):
    """One of the functions."""

    name: str


class NamedTool(Model):
    """The tool that is to be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class ChatFields(Model):
    """How a conversation is written down for the model."""

    messages: Annotated[Items[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Annotated[str, Field(max_length=MAX_CHAT_TEMPLATE)] | None = Field(
        None, description="Only where the server was started with --trust-request-chat-template."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables for the template.")
    tools: Items[Tool] | None = Field(
        None,
        description="Told to the model by the template. Where tool_choice forces no call its answer is text, and calls "
        "in it are the client's to read.",
    )
    add_special_tokens: Literal[False] | None = Field(None, description="The template writes them.")
    mm_processor_kwargs: None = None


class ChatCompletionRequest(ChatFields, SamplingFields):
    """Answer a conversation."""

    max_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = Field(None, description="All the room when null.")
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = Field(None, description="Before max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tool_choice: ToolChoice | None = Field(
        None,
        description="auto where there are tools. required: the answer is one or more calls. A named function: one call "
        "of it. Arguments satisfy the function's parameters.",
    )
    parallel_tool_calls: bool | None = Field(
        None, description="false, only where a call is forced: exactly one call. Nothing forbids a text with several."
    )
    functions: None = None
    function_call: None = None
    reasoning_effort: None = None
    modalities: Annotated[Items[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    store: Literal[False] | None = None
    metadata: None = None
    service_tier: Literal["auto"] | None = None
    safety_identifier: None = None
    prompt_cache_key: None = None
    verbosity: None = None
    web_search_options: None = None
    echo: Literal[False] | None = None
    documents: None = None
    include_reasoning: None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def to_params(self, defaults: dict[str, Any]) -> SamplingParams:
        """As `params`, with what only chats have."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs is for logprobs=true")
        self._check_tools()
        max_tokens = defaults.get("max_tokens") if self.token_limit is None else self.token_limit
        return self.params(defaults, max_tokens=max_tokens, logprobs=self.top_logprobs or 0 if self.logprobs else None)

    def form(self) -> StructuredOutputsParams | None:
        """As for completions; where a call is forced, that of its arguments, or of a list of calls."""
        form = super().form()
        if not self.forces_call:
            return form
        if form is not None:
            raise InvalidRequestError(
                "tool_choice forces a call, and response_format or structured_outputs another form of answer: choose"
            )
        functions = [tool.function for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool):
            (schema,) = [one.arguments_schema() for one in functions if one.name == self.tool_choice.function.name]
        else:
            schema = calls_schema(functions, max_calls=1 if self.parallel_tool_calls is False else None)
        return StructuredOutputsParams(json=schema, whitespace_pattern=CALL_WHITESPACE)

    @property
    def forces_call(self) -> bool:
        """Whether the answer must be calls."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    def _check_tools(self) -> None:
        """Raise InvalidRequestError for names that are not unique, and for a choice that the tools do not allow."""
        names = Counter(tool.function.name for tool in self.tools or ())
        for name, count in names.most_common(1):
            if count > 1:
                raise InvalidRequestError(f"tools: several functions are called {name}: give each its own name")
        if self.tool_choice not in (None, "none") and not names:
            raise InvalidRequestError("tool_choice is for requests with tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise InvalidRequestError(
                f"tool_choice: {self.tool_choice.function.name} is none of the tools: add it there"
            )
        if self.parallel_tool_calls is False and not self.forces_call:
            raise InvalidRequestError(
                "parallel_tool_calls=false is for tool_choice required or a named function: else the answer is text"
            )


CALL_WHITESPACE = " ?"
"""Between the parts of a forced call. Where any is allowed, small models write it without end."""


def calls_schema(functions: Sequence[Function], *, max_calls: int | None = None) -> dict[str, Any]:
    """A list of calls, `[{"name": …, "parameters": {…}}, …]`, in vLLM's form.

    Raises:
        InvalidRequestError: parameters that are not those of an object.
    """
    calls = [
        {
            "type": "object",
            # An id makes the schema a document of its own, in which its references are looked up.
            "properties": {"name": {"const": one.name}, "parameters": one.arguments_schema() | {"$id": f"tool:{at}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for at, one in enumerate(functions)
    ]
    at_most = {} if max_calls is None else {"maxItems": max_calls}
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **at_most}


class TokenizeTextRequest(Model):
    """The tokens of a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = Field(None, description="true when null.")
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatFields):
    """The tokens of a conversation."""

    model: str | None = None
    return_token_strs: bool | None = None


def _kind_of_tokenize_request(given: Any) -> str:
    is_chat = isinstance(given, dict) and "messages" in given
    return (TokenizeChatRequest if is_chat else TokenizeTextRequest).__name__


TokenizeRequest = Annotated[
    Annotated[TokenizeTextRequest, Tag(TokenizeTextRequest.__name__)]
    | Annotated[TokenizeChatRequest, Tag(TokenizeChatRequest.__name__)],
    Discriminator(_kind_of_tokenize_request),
]
"""Of a text or of a conversation: what is wrong with one is told of that one."""


class DetokenizeRequest(Model):
    """The text of tokens."""

    model: str | None = None
    tokens: Annotated[Items[int], Field(max_length=MAX_DETOKENIZED)]


# --- answers


FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]
"""tool_calls: the calls of tool_choice=required are complete. After a named function it is stop, as OpenAI's."""


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


class PromptLogprob(BaseModel):
    """A token that might stand in a place of the prompt; the likeliest there has rank 1."""

    logprob: float
    rank: int
    decoded_token: str | None


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""By position and token: the prompt's own and the likeliest. The first position has none."""


class CompletionChoice(BaseModel):
    """An answer, or, in a stream, the next piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


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
    """The model's answer: a text, or the calls that were forced."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """An answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """Answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


class FunctionCallDelta(BaseModel):
    """What is new of a function's call."""

    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """What is new of a call; the first piece has its id, type and name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta


class Delta(BaseModel):
    """What is new of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """The next piece of an answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None


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


# --- the page at /


class PageSettings(BaseModel):
    """What the page asks for first: the model, and what its sliders begin with."""

    model: str
    max_model_len: int
    chat_refusal: str | None = Field(description="Why conversations cannot be answered, and only texts continued.")
    temperature: float
    top_p: float
    top_k: int


class LiveRequest(BaseModel):
    """A request that runs or waits, in tokens."""

    name: str
    prompt: int
    cached: int = Field(description="Of the prompt, found in memory when the request was first scheduled.")
    computed: int = Field(description="Of prompt and answer, whose keys and values are stored.")
    written: int
    max_tokens: int
    preemptions: int
    blocks: list[int] = Field(description="Its block table.")


class LiveSnapshot(BaseModel):
    """Blocks and queue between two steps of the engine; counts are since its start."""

    time: float = Field(description="The engine's clock, in seconds.")
    num_blocks: int
    num_held: int
    block_size: int
    found_again: list[int] = Field(
        description="Blocks, held or free, that are known by their content, in runs: first, count, first, count, …"
    )
    running: list[LiveRequest]
    waiting: list[LiveRequest] = Field(description="The first of them.")
    num_waiting: int
    generation_tokens: int
    prompt_tokens: int
    prefix_cache_hits: int
    num_preemptions: int
