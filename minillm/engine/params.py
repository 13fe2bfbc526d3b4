"""What a caller may ask of a generation: the names, defaults and meanings of vLLM's parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import UnionType
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor

from minillm.errors import InvalidRequestError

LogitsProcessor = Callable[[list[int], Float[Tensor, "vocab"]], Float[Tensor, "vocab"]]
"""(tokens written so far, logits of the next one) → other logits."""

SEED_RANGE = (-(2**63), 2**64)


class RequestOutputKind(Enum):
    """What the outputs of a stream hold: everything so far, what is new, or nothing before the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(kw_only=True)
class StructuredOutputsParams:
    """What form an answer must have: exactly one of the first five. Every field is vLLM's.

    Attributes:
        json: a JSON schema that it satisfies: a dict, its text, or a pydantic model class.
        regex: a regular expression that all of it matches, in Rust's syntax (no looking around).
        choice: texts, one of which it is.
        grammar: rules that it follows, in llguidance's variant of Lark, or in GBNF (``root ::= …``).
        json_object: it is a JSON object.
        disable_any_whitespace: no white space between the parts of JSON.
        disable_additional_properties: no properties but those that the schema names, where it does not say.
        whitespace_pattern: the white space between the parts of JSON, as a regular expression.
        structural_tag: only None is possible.

    Raises:
        InvalidRequestError: none of them, several, or options that do not fit; the message names them.
    """

    json: str | dict[str, Any] | type[Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: None = None

    def __post_init__(self) -> None:
        self.verify()

    def verify(self) -> None:
        """Raise InvalidRequestError for what cannot be (fields may be assigned to)."""
        if self.structural_tag is not None:
            raise InvalidRequestError("structural_tag is not implemented: say it as a grammar")
        kinds = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        kinds += ["json_object"] * bool(self.json_object)
        if len(kinds) != 1:
            told = ", ".join(kinds) or "none of them"
            raise InvalidRequestError(f"structured_outputs is one of {', '.join(STRUCTURED_KINDS)}, not {told}")
        for name in ("regex", "grammar", "whitespace_pattern"):
            _check_kind(f"structured_outputs.{name}", getattr(self, name), str | None, "a text")
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            _check_kind(f"structured_outputs.{name}", getattr(self, name), bool, "True or False")
        _check_kind("structured_outputs.json_object", self.json_object, bool | None, "True or False")
        _check_list("structured_outputs.choice", self.choice, _is_text, "texts of one letter or more")
        if self.choice is not None and not len(self.choice):
            raise InvalidRequestError("structured_outputs.choice is empty: nothing could be written")
        if not isinstance(self.json, str | dict | None) and not hasattr(self.json, "model_json_schema"):
            raise InvalidRequestError(
                f"structured_outputs.json must be a schema (a dict or its text) or a pydantic class, not {self.json!r}"
            )
        self._verify_options(is_json=kinds[0] in ("json", "json_object"))

    def _verify_options(self, *, is_json: bool) -> None:
        options = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
        given = [name for name in options if getattr(self, name)]
        if given and not is_json:
            raise InvalidRequestError(f"structured_outputs.{given[0]} is for json and json_object")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise InvalidRequestError("structured_outputs: choose disable_any_whitespace or whitespace_pattern")
        if self.disable_additional_properties and self.json is None:
            raise InvalidRequestError("structured_outputs.disable_additional_properties is for json, not json_object")


STRUCTURED_KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(kw_only=True)
class SamplingParams:
    """How to generate. Every field is vLLM's, with its default.

    Attributes:
        n: how many answers; they share the prompt's memory.
        presence_penalty: taken from the logit of each token that was written, in [-2, 2].
        frequency_penalty: the same, times how often, in [-2, 2].
        repetition_penalty: divides positive logits (multiplies negative ones) of tokens of prompt and answer, above 0.
        temperature: divides logits; 0 takes the likeliest token.
        top_p: keep the fewest tokens whose probabilities sum to this, in (0, 1].
        top_k: keep so many; 0 or -1 keeps all.
        min_p: keep tokens at least this share as likely as the likeliest, in [0, 1].
        seed: makes the draws repeatable, whatever else is generated at the same time.
        stop: a text, or several, that ends an answer and is cut off.
        stop_token_ids: tokens that end an answer.
        ignore_eos: go on after the end-of-sequence token.
        max_tokens: at most so many; None for all the room that there is.
        min_tokens: no end before so many.
        logprobs: give log-probabilities of so many likeliest tokens, and of the one chosen; -1 of all.
        prompt_logprobs: the same for the prompt's tokens.
        detokenize: whether to give text.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: as in transformers' slow tokenizers; only True is possible.
        include_stop_str_in_output: keep the text that ended the answer.
        output_kind: what the parts of a stream hold.
        logit_bias: added to logits, by token, each clamped to [-100, 100].
        allowed_token_ids: only these.
        bad_words: texts that are not written.
        logits_processors: functions of one's own, called one after the other before anything else.
        structured_outputs: what form the answer must have. It ends ("stop") where that lets nothing follow, also with
            `ignore_eos` or before `min_tokens`; these forbid an end where it may go on.

    Raises:
        InvalidRequestError: a field outside its range; the message names both.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self.verify()

    def verify(self) -> None:
        """Raise InvalidRequestError for a field outside its range (fields may be assigned to)."""
        for name, lowest, highest in (
            ("n", 1, math.inf),
            ("max_tokens", 1, math.inf),
            ("min_tokens", 0, math.inf),
            ("logprobs", -1, math.inf),
            ("prompt_logprobs", -1, math.inf),
            ("top_k", -1, math.inf),
            ("seed", SEED_RANGE[0], SEED_RANGE[1] - 1),
        ):
            _check_int(name, getattr(self, name), lowest, highest)
        for name, smallest, largest in (
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("temperature", 0.0, math.inf),
            ("min_p", 0.0, 1.0),
        ):
            _check_number(name, getattr(self, name), smallest, largest)
        for name, largest in (("repetition_penalty", math.inf), ("top_p", 1.0)):
            _check_number(name, getattr(self, name), 0.0, largest, above=True)
        for name in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
        ):
            _check_kind(name, getattr(self, name), bool, "True or False")
        _check_kind("output_kind", self.output_kind, RequestOutputKind, "a RequestOutputKind")
        if self.seed == -1:  # as in vLLM
            self.seed = None
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(f"min_tokens ({self.min_tokens}) is more than max_tokens ({self.max_tokens})")
        for name in ("stop", "bad_words"):
            _check_list(name, _texts(getattr(self, name)), _is_text, "texts of one letter or more")
        for name in ("stop_token_ids", "allowed_token_ids"):
            _check_list(name, getattr(self, name), _is_int, "token ids")
        _check_list("logits_processors", self.logits_processors, callable, "functions")
        _check_kind("logit_bias", self.logit_bias or {}, dict, "a dict of token id → number")
        for token, bias in (self.logit_bias or {}).items():
            if not _is_int(token):
                raise InvalidRequestError(
                    f"logit_bias must be a dict of token id → number, and {token!r} is no token id"
                )
            _check_number(f"logit_bias[{token}]", bias, -math.inf, math.inf)
        if self.stop and not self.detokenize:
            raise InvalidRequestError(
                "stop is looked for in the text, and detokenize=False makes none: use stop_token_ids"
            )
        if not self.spaces_between_special_tokens:
            raise InvalidRequestError("spaces_between_special_tokens=False is not implemented: leave it at True")
        if self.allowed_token_ids is not None and not len(self.allowed_token_ids):
            raise InvalidRequestError("allowed_token_ids is empty: nothing could be written")
        kind = StructuredOutputsParams | None
        _check_kind("structured_outputs", self.structured_outputs, kind, "StructuredOutputsParams")
        if self.structured_outputs is not None:
            self.structured_outputs.verify()

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return tuple(_texts(self.stop))

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How to search with beams.

    Attributes:
        beam_width: how many beginnings are kept at each step, and answers returned.
        max_tokens: at most so many.
        ignore_eos: go on after the end-of-sequence token.
        temperature: 0 and 1 search the model's own distribution; others sharpen or flatten it.
        length_penalty: an answer's log-probability is divided by its length to this power.
        include_stop_str_in_output: only False is possible.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _check_int("beam_width", self.beam_width, 1, math.inf)
        _check_int("max_tokens", self.max_tokens, 1, math.inf)
        _check_number("temperature", self.temperature, 0.0, math.inf)
        _check_number("length_penalty", self.length_penalty, -math.inf, math.inf)
        _check_kind("ignore_eos", self.ignore_eos, bool, "True or False")
        if self.include_stop_str_in_output:
            raise InvalidRequestError("include_stop_str_in_output is not implemented for beams: leave it at False")


def _texts(given: str | Sequence[str] | None) -> Sequence[str]:
    return () if given is None else (given,) if isinstance(given, str) else given


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_kind(name: str, value: object, kind: type | UnionType, what: str) -> None:
    if not isinstance(value, kind):
        raise InvalidRequestError(f"{name} must be {what}, not {value!r}")


def _check_list(name: str, values: object, is_right: Callable[[Any], bool], what: str) -> None:
    """Raise unless None, or several of what is right."""
    if values is None:
        return
    several = isinstance(values, Collection) and not isinstance(values, str | bytes | Mapping)
    if not several or not all(map(is_right, cast(Collection[Any], values))):
        raise InvalidRequestError(f"{name} must be a list of {what}, not {values!r}")


def _check_int(name: str, value: int | None, lowest: float, highest: float) -> None:
    if value is None and name in ("max_tokens", "logprobs", "prompt_logprobs", "seed"):
        return
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise InvalidRequestError(f"{name} must be a whole number {_range(lowest, highest)}, not {value!r}")


def _check_number(name: str, value: float, lowest: float, highest: float, *, above: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not lowest <= value <= highest or (above and value == lowest):
        raise InvalidRequestError(f"{name} must be a number {_range(lowest, highest, above=above)}, not {value!r}")


def _range(lowest: float, highest: float, *, above: bool = False) -> str:
    if math.isinf(lowest):
        return "that is finite"
    start = f"above {lowest:g}" if above else f"of at least {lowest:g}"
    return start if math.isinf(highest) else f"{start} and at most {highest:g}"
