"""Answers of a prescribed form: a grammar says which tokens may come next, and the others are masked.

llguidance compiles the form (a JSON schema, a regular expression, rules) and follows an answer through it: an Earley
parser above a lexer of regular-expression derivatives, which meet the vocabulary as a trie of bytes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from llguidance.hf import from_tokenizer
from torch import Tensor

from minillm.checks import check_text
from minillm.engine.params import StructuredOutputsParams
from minillm.engine.request import Request
from minillm.errors import InvalidRequestError
from minillm.transformer.sampling import MASKED

MAX_GRAMMAR_CHARS = 2**15
"""Of a schema, an expression or rules: what compiling takes may grow with the square and more."""
LIMITS = LLParserLimits(verbose_errors=False)
STACK_BYTES = 128 * 2**20
"""Of the thread that compiles: enough for the longest chain of rules that `MAX_GRAMMAR_CHARS` has room for."""

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

Result = TypeVar("Result")


class GrammarCompiler:
    """Compiles what answers must look like, for one vocabulary.

    Args:
        tokenizer: says what bytes each token is. It is read at the first use.
        vocab_size: tokens of the model, which may be more.
        end_ids: the end-of-sequence tokens.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = sorted(token for token in end_ids if token < vocab_size)
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None

    def prepare(self) -> LLTokenizer:
        """The vocabulary as llguidance keeps it.

        The first call takes a second or more where it is large, and keeps Python's other threads from running.

        Raises:
            InvalidRequestError: no tokenizer, or one of a kind that llguidance does not know.
        """
        if self._tokenizer is None:
            raise InvalidRequestError("structured_outputs are about text, and this engine has no tokenizer")
        with self._lock:
            if self._vocabulary is None:
                size = max(self._vocab_size, len(self._tokenizer))
                try:
                    self._vocabulary = from_tokenizer(self._tokenizer, size, self._end_ids or None)
                except Exception as error:  # it raises bare exceptions of several kinds
                    raise InvalidRequestError(
                        f"structured_outputs are not possible with this model's tokenizer: {error}"
                    ) from error
            return self._vocabulary

    def compile(self, asked: StructuredOutputsParams) -> LLMatcher:
        """A matcher at the beginning of an answer. Any thread may call this; most of it runs beside other threads.

        Raises:
            InvalidRequestError: what is no schema, expression or grammar, asks for what llguidance does not implement,
                or is too large.
        """
        grammar = _grammar(asked)
        vocabulary = self.prepare()
        matcher = _with_deep_stack(lambda: LLMatcher(vocabulary, grammar, log_level=0, limits=LIMITS))
        if matcher.is_error():
            raise _invalid(matcher.get_error())
        return matcher


def keep_possible(
    logits: Float[Tensor, "rows vocab"], requests: Sequence[Request], end_ids: frozenset[int]
) -> tuple[Float[Tensor, "rows vocab"], dict[int, str]]:
    """Mask the tokens with which an answer would leave its grammar; and what is wrong in rows whose parser gave up.

    End tokens are kept where the answer may end, unless it is asked to go on (`ignore_eos`).
    """
    rows = [row for row, request in enumerate(requests) if request.matcher is not None]
    if not rows:
        return logits, {}
    matchers = [matcher for request in requests if (matcher := request.matcher) is not None]
    allowed = _allowed(matchers, logits.shape[-1])
    may_end = [
        matcher.is_accepting() and not requests[row].params.ignore_eos
        for row, matcher in zip(rows, matchers, strict=True)
    ]
    ends = [token for token in end_ids if token < logits.shape[-1]]
    allowed[:, ends] = torch.tensor(may_end)[:, None]
    errors = {row: matcher.get_error() for row, matcher in zip(rows, matchers, strict=True) if matcher.is_error()}
    for row in errors:
        allowed[rows.index(row)] = False
    at = torch.tensor(rows, device=logits.device)
    return logits.index_copy(0, at, logits[at].masked_fill_(~allowed.to(logits.device), MASKED)), errors


def _allowed(matchers: Sequence[LLMatcher], vocab_size: int) -> Bool[Tensor, "rows vocab"]:
    """A bit for each token, unpacked; tokens that the tokenizer does not have are not allowed."""
    packed = b"".join(matcher.compute_bitmask() for matcher in matchers)
    words = np.frombuffer(packed, np.uint8).reshape(len(matchers), -1)
    bits = np.unpackbits(words, axis=1, count=vocab_size, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_))


def _grammar(asked: StructuredOutputsParams) -> str:
    """What llguidance compiles.

    Raises:
        InvalidRequestError: a text that is too long, no JSON, or no grammar.
    """
    try:
        kind, text = _source(asked)
        check_text(text)
        if len(text) > MAX_GRAMMAR_CHARS:
            raise InvalidRequestError(
                f"structured_outputs.{kind} has {len(text)} letters, and at most {MAX_GRAMMAR_CHARS} are possible"
            )
        if kind != "json":
            return grammar_from(kind, text)
        overrides: JsonCompileOptions = {}
        if asked.disable_any_whitespace:
            overrides["whitespace_flexible"] = False
        if asked.whitespace_pattern is not None:
            overrides["whitespace_pattern"] = asked.whitespace_pattern
        return LLMatcher.grammar_from_json_schema(text, overrides=overrides)
    except InvalidRequestError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise _invalid(str(error)) from error


def _source(asked: StructuredOutputsParams) -> tuple[Literal["json", "regex", "lark", "grammar"], str]:
    """The kind of grammar, as llguidance calls it, and its text."""
    if asked.json_object:
        return "json", '{"type": "object"}'
    if asked.json is not None:
        schema = _schema(asked.json)
        return "json", json.dumps(_closed(schema) if asked.disable_additional_properties else schema)
    if asked.regex is not None:
        return "regex", asked.regex
    if asked.choice is not None:
        return "lark", "start: " + " | ".join(map(json.dumps, asked.choice))
    return "grammar", asked.grammar or ""


def _schema(given: str | dict[str, Any] | type[Any]) -> dict[str, Any]:
    schema = given
    if isinstance(given, str):
        schema = json.loads(given)
    elif not isinstance(given, dict):
        schema = given.model_json_schema()
    if not isinstance(schema, dict):
        raise InvalidRequestError(f"a JSON schema is an object, not {json.dumps(schema)[:100]}")
    return schema


_SCHEMAS = ("items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf")
"""Keywords that hold a schema, or several."""
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
"""Keywords that hold schemas by name."""


def _closed(schema: Any) -> Any:
    """A schema in which objects with named properties have no others, where it does not say."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = schema | {key: _closed(schema[key]) for key in _SCHEMAS if key in schema}
    for key in _NAMED_SCHEMAS:
        if isinstance(schema.get(key), dict):
            found[key] = {name: _closed(one) for name, one in schema[key].items()}
    if "properties" in schema or "patternProperties" in schema:
        found.setdefault("additionalProperties", False)
    return found


def _invalid(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"structured_outputs cannot be compiled: {reason.strip()[:500]}")


_stack_size = threading.Lock()


def _with_deep_stack(work: Callable[[], Result]) -> Result:
    """The result of some work, done in a thread with a deep stack.

    llguidance calls itself along chains of rules, and a stack that overflows there ends the process.
    """
    with ThreadPoolExecutor(1) as thread:
        with _stack_size:  # it is a setting of the process, which the next thread takes
            before = threading.stack_size(STACK_BYTES)
            try:
                done = thread.submit(work)
            finally:
                threading.stack_size(before)
        return done.result()
