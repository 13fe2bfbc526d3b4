"""Conversations as a chat template writes them down: Jinja, in transformers' sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from minillm.errors import InvalidRequestError, TokenizerError


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    **options: Any,
) -> str:
    """A conversation as the model's chat template writes it down.

    Args:
        tools: what the model may call, passed to the template.
        options: passed to transformers' `apply_chat_template`.

    Raises:
        InvalidRequestError: a message that is none.
        TokenizerError: no chat template, one that refuses the conversation, or one that leaves tools or calls out.
    """
    if not tokenizer.chat_template and options.get("chat_template") is None:
        raise TokenizerError(
            "this model has no chat template: it continues text. Ask for a completion (`generate`), or give a template "
            "(`chat_template`; of a server, --chat-template)"
        )
    messages = [_message(message) for message in conversation]
    tools = list(tools or ()) or None  # templates ask whether there are tools at all
    text = _render(tokenizer, messages, tools=tools, **options)
    if tools:
        _check_not_ignored("tools", text, lambda: _render(tokenizer, messages, **options))
    if any("tool_calls" in message for message in messages):
        without = [{name: said for name, said in message.items() if name != "tool_calls"} for message in messages]
        _check_not_ignored("tool_calls", text, lambda: _render(tokenizer, without, tools=tools, **options))
    return text


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> str:
    try:
        return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template may raise what it likes
        reason = str(error) or type(error).__name__
        raise TokenizerError(f"the model's chat template refuses this conversation: {reason}") from error


def _check_not_ignored(what: str, text: str, render_without: Callable[[], str]) -> None:
    """Raise TokenizerError where the text is the same without it."""
    try:
        without = render_without()
    except TokenizerError:  # the template asks for it
        return
    if text == without:
        raise TokenizerError(
            f"the model's chat template has no place for {what}: leave them out, or give another template"
        )


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message for a template, as in vLLM: its content a text, its calls with objects for arguments."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequestError(f"a message is a dict with 'role' and 'content', not {message!r}")
    content, calls = _content(message.get("content")), message.get("tool_calls")
    rest = {name: said for name, said in message.items() if name != "tool_calls"}
    if not calls:  # an empty list is what other servers' answers hold
        return {**rest, "content": content}
    if not isinstance(calls, list):
        raise InvalidRequestError(f"tool_calls is a list, not {calls!r}")
    return {**rest, "content": content or "", "tool_calls": [_tool_call(call) for call in calls]}


def _content(content: Any) -> str | None:
    """A message's text; parts that are texts are joined by line breaks."""
    if isinstance(content, list):
        others = [part for part in content if not isinstance(part, Mapping) or not isinstance(part.get("text"), str)]
        if others:
            raise InvalidRequestError(f"only {{'type': 'text', 'text': …}} is possible in a message, not {others[0]!r}")
        return "\n".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise InvalidRequestError(f"a message's content is a text, not {content!r}")
    return content


def _tool_call(call: Any) -> dict[str, Any]:
    """A call, its arguments an object: OpenAI has them as JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise InvalidRequestError(f"a tool call is a dict with 'function', a name and arguments, not {call!r}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"a tool call's arguments are not JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise InvalidRequestError(f"a tool call's arguments are a JSON object, not {arguments!r}")
    return {**call, "function": {**function, "arguments": arguments}}
