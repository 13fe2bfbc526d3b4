"""Forced calls: an answer that follows their grammar, read as it comes."""

from __future__ import annotations

import json
import re
import uuid
from abc import ABC, abstractmethod

from minillm.server.protocol import FunctionCall, FunctionCallDelta, NamedTool, ToolCall, ToolCallDelta, ToolChoice

BEFORE_ARGUMENTS = re.compile(
    r"""\s*(?:\[|\}\s*,)\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"parameters"\s*:\s*(?=\{)"""
)
"""From the beginning of a list of calls, or from the end of a call's arguments, to the next call's."""


class CallReader(ABC):
    """Reads calls from an answer's text.

    Attributes:
        calls: what has been read so far; where the answer was cut, the last one's arguments are too.
    """

    def __init__(self) -> None:
        self.calls: list[ToolCall] = []

    @abstractmethod
    def read(self, text: str) -> list[ToolCallDelta]:
        """What the answer's next piece adds: at most one delta a call."""

    def _begin(self, name: str, arguments: str) -> ToolCallDelta:
        call = ToolCall(
            id=f"call_{uuid.uuid4().hex}", type="function", function=FunctionCall(name=name, arguments=arguments)
        )
        self.calls.append(call)
        function = FunctionCallDelta(name=name, arguments=arguments)
        return ToolCallDelta(index=len(self.calls) - 1, id=call.id, type="function", function=function)

    def _go_on(self, arguments: str) -> ToolCallDelta:
        self.calls[-1].function.arguments += arguments
        return ToolCallDelta(index=len(self.calls) - 1, function=FunctionCallDelta(arguments=arguments))


class NamedCallReader(CallReader):
    """The whole answer is the arguments of one function."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def read(self, text: str) -> list[ToolCallDelta]:
        if not self.calls:
            return [self._begin(self._name, text)]
        return [self._go_on(text)] if text else []


class CallListReader(CallReader):
    """The answer is a list of calls, as `calls_schema` has them."""

    def __init__(self) -> None:
        super().__init__()
        self._between = ""  # what has been read since the last arguments
        self._depth = 0  # of braces in arguments; 0 between them
        self._in_string = False
        self._is_escaped = False

    def read(self, text: str) -> list[ToolCallDelta]:
        deltas = []
        while text:
            if self._depth:
                length = self._follow(text)
                deltas.append(self._go_on(text[:length]))
            else:
                self._between += text
                found = BEFORE_ARGUMENTS.match(self._between)
                if found is None:
                    break
                text, self._between = self._between[found.end() :], ""
                length = self._follow(text)
                deltas.append(self._begin(json.loads(found[1]), text[:length]))
            text = text[length:]
        return deltas

    def _follow(self, text: str) -> int:
        """How many letters of the text belong to the arguments that it begins in, or with."""
        for at, letter in enumerate(text):
            if self._in_string:
                self._in_string = self._is_escaped or letter != '"'
                self._is_escaped = letter == "\\" and not self._is_escaped
            elif letter == '"':
                self._in_string = True
            elif letter == "{":
                self._depth += 1
            elif letter == "}":
                self._depth -= 1
                if not self._depth:
                    return at + 1
        return len(text)


def call_reader(choice: ToolChoice | None) -> CallReader | None:
    """What reads an answer's calls; None where none is forced."""
    if isinstance(choice, NamedTool):
        return NamedCallReader(choice.function.name)
    return CallListReader() if choice == "required" else None
