"""What several parts ask of what they are given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from minillm.errors import ConfigError, InvalidRequestError


def check_token_ids(tokens: Iterable[int], vocab_size: int, what: str = "") -> None:
    """Raise InvalidRequestError for ids that the vocabulary does not have; `what` says whose they are."""
    outside = sorted({token for token in tokens if not 0 <= token < vocab_size})
    if outside:
        whose = f"{what}: " if what else ""
        raise InvalidRequestError(f"{whose}token ids must be in [0, {vocab_size}), not {outside[:5]}")


def check_text(text: str) -> None:
    """Raise InvalidRequestError for a text that UTF-8 cannot hold: no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"a text holds half a character (U+{ord(text[error.start]):X} at {error.start}): send whole ones"
        ) from error


def check_sizes(config: Any, *names: str) -> None:
    """Raise ConfigError unless each of these fields is a whole number of at least 1."""
    for name in names:
        check_size(name, getattr(config, name))


def check_size(name: str, value: Any) -> None:
    """Raise ConfigError unless the value is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
