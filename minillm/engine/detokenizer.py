"""Text as it is written: whole characters only, and nothing that may turn out to be a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from minillm.text import HALF_A_CHARACTER

CONTEXT = 5
"""Tokens of the prompt that are decoded along, so that a tokenizer knows whether a space stands before a word."""


class Detokenizer:
    """Decodes an answer token by token; joined, the pieces are the decoded whole.

    Decoding everything again at each token would take time squared. A window is decoded instead, that begins a few
    tokens before the new one: the text of a window without the new token is compared with the text with it.

    Args:
        prompt: the tokens before the answer.
        stops: texts that end the answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self.stops = stops
        self.include_stop = include_stop
        self.min_tokens = min_tokens
        self.text = ""
        self.num_given = 0
        self._tokens = list(prompt[-CONTEXT:])
        self._start, self._read = 0, len(self._tokens)
        self._skipped = frozenset(tokenizer.all_special_ids if skip_special_tokens else ())
        self._num_written = 0

    def add(self, token: int) -> str | None:
        """Take one more token; return the stop text that is complete now, if one is."""
        self._num_written += 1
        if token in self._skipped:
            return None
        self._tokens.append(token)
        before = self._decode(self._tokens[self._start : self._read])
        after = self._decode(self._tokens[self._start :])
        if after.endswith(HALF_A_CHARACTER) or len(after) <= len(before):
            return None
        return self._add_text(after[len(before) :])

    def finish(self) -> None:
        """No more tokens: what was held back as half a character is text after all."""
        before = self._decode(self._tokens[self._start : self._read])
        self._add_text(self._decode(self._tokens[self._start :])[len(before) :])

    def _add_text(self, new: str) -> str | None:
        self._start, self._read = self._read, len(self._tokens)
        searched = len(self.text)
        self.text += new
        if self._num_written <= self.min_tokens:
            return None
        found = []
        for stop in self.stops:
            at = self.text.find(stop, max(0, searched - len(stop) + 1))
            if at >= 0:
                found.append((at, -len(stop), stop))
        if not found:
            return None
        at, _, stop = min(found)
        self.text = self.text[: at + (len(stop) if self.include_stop else 0)]
        return stop

    def new_text(self, *, finished: bool) -> str:
        """What has not been given yet; while more is to come, without an end that may be the beginning of a stop."""
        end = len(self.text) if finished else len(self.text) - self._held_back()
        new = self.text[self.num_given : end]
        self.num_given = max(self.num_given, end)
        return new

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop text."""
        longest = max(map(len, self.stops), default=1) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self.stops):
                return length
        return 0

    def _decode(self, tokens: Sequence[int]) -> str:
        return cast(str, self.tokenizer.decode(list(tokens), skip_special_tokens=self.skip_special_tokens))
