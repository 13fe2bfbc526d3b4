"""Tools in chats: the template tells the model of them, and its answer is text."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest
from pydantic import BaseModel

from minillm import SamplingParams
from minillm.errors import InvalidRequestError, TokenizerError
from tests.server.conftest import running

TEMPLATE = (Path(__file__).parents[2] / "docs" / "examples" / "template_chatml.jinja").read_text(encoding="utf-8")
MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of today.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
CALLED = [
    *MESSAGES,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"},
]
PARSED = [
    *MESSAGES,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [CALL | {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}],
    },
    CALLED[-1],
]
GREEDY = {"temperature": 0, "max_tokens": 8}


class GetTime(BaseModel):
    """The time of a place."""

    place: str


@pytest.fixture(scope="module")
def server(llm):
    with running(llm, chat_template=TEMPLATE) as server:
        yield server


@pytest.fixture(scope="module")
def plain(llm):
    """With the model's own template, which knows no tools."""
    with running(llm) as server:
        yield server


def transformers_text(llm, messages, **options) -> str:
    return llm.get_tokenizer().apply_chat_template(
        messages, tokenize=False, chat_template=TEMPLATE, add_generation_prompt=True, **options
    )


def tokenized(server, **asked) -> str:
    answer = server.http.post("/tokenize", json=asked)
    assert answer.status_code == 200, answer.text
    return server.llm.get_tokenizer().decode(answer.json()["tokens"])


@pytest.mark.parametrize(
    "choice", [{}, {"tool_choice": "auto"}, {"tool_choice": "none"}, {"parallel_tool_calls": True}]
)
def test_the_template_tells_of_tools_and_the_answer_is_text(server, reference, choice):
    tool = openai.pydantic_function_tool(GetTime)
    tools = [WEATHER, tool]
    in_order = {name: tool["function"][name] for name in ("name", "description", "parameters", "strict")}
    found = server.openai.chat.completions.create(model="tiny", messages=MESSAGES, tools=tools, **choice, **GREEDY)
    told = [WEATHER, {"type": "function", "function": in_order}]
    (expected,) = reference.chat(MESSAGES, SamplingParams(**GREEDY), use_tqdm=False, chat_template=TEMPLATE, tools=told)
    assert expected.prompt == transformers_text(reference, MESSAGES, tools=told)
    assert found.choices[0].message.content == expected.outputs[0].text
    assert found.choices[0].message.tool_calls is None
    assert found.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert tokenized(server, messages=MESSAGES, tools=tools) == expected.prompt


def test_no_tools_are_none(server, reference):
    assert tokenized(server, messages=MESSAGES, tools=[]) == transformers_text(reference, MESSAGES)


def test_calls_and_their_results_are_told(server, reference):
    text = tokenized(server, messages=CALLED, tools=[WEATHER])
    assert text == transformers_text(reference, PARSED, tools=[WEATHER])
    told = text.partition('<tool_call>{"name": "get_weather", "arguments": ')[2]
    assert told.startswith('{"city": "Paris"}}</tool_call><|im_end|>\n<|im_start|>tool\nSunny<|im_end|>')
    stream = server.openai.chat.completions.create(model="tiny", messages=CALLED, stream=True, **GREEDY)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("stop", "length")


def test_calls_without_arguments_and_lists_without_calls(server, reference):
    empty = CALL | {"function": {"name": "get_weather", "arguments": ""}}
    parsed = CALL | {"function": {"name": "get_weather", "arguments": {}}}
    said = [{"role": "assistant", "content": "Wait.", "tool_calls": [empty]}]
    assert tokenized(server, messages=said) == transformers_text(
        reference, [{"role": "assistant", "content": "Wait.", "tool_calls": [parsed]}]
    )
    said = [{"role": "assistant", "content": "No.", "tool_calls": []}]
    assert tokenized(server, messages=said) == transformers_text(reference, [{"role": "assistant", "content": "No."}])


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def call_with(arguments: str) -> list[dict]:
    function = {"name": "get_weather", "arguments": arguments}
    return [{"role": "assistant", "tool_calls": [CALL | {"function": function}]}]


def test_what_is_refused(server):
    tools = {"tools": [WEATHER]}
    deep = {"type": "function", "function": {"name": "deep", "parameters": nested(450)}}
    for asked, told in [
        (tools | {"tool_choice": "required"}, "force a call"),
        (tools | {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}}, "force a call"),
        (tools | {"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": "auto"}, "requests with tools"),
        ({"tool_choice": "required", "tools": []}, "requests with tools"),
        (tools | {"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [WEATHER | {"function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [WEATHER | {"function": {"name": "f", "surprise": 1}}]}, "surprise"),
        ({"tools": [deep]}, "maximum context length"),
        ({"messages": [{"role": "user", "tool_calls": [CALL]}]}, "role assistant"),
        ({"messages": [{"role": "user", "content": "a", "tool_call_id": "x"}]}, "role tool"),
        ({"messages": call_with('{"city"')}, "not JSON"),
        ({"messages": call_with("[" * 100_000)}, "not JSON"),
        ({"messages": call_with('"Paris"')}, "JSON object"),
        ({"messages": call_with("null")}, "JSON object"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"id": None}]}]}, "messages[0].tool_calls[0].id"),
    ]:
        body = json.dumps({"messages": MESSAGES} | asked | GREEDY)
        answer = server.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, (asked, answer.text)
        assert told in answer.json()["error"]["message"], answer.text


def test_a_template_that_leaves_tools_out_is_told(plain, reference):
    for path in ("/tokenize", "/v1/chat/completions"):
        for asked, told in (
            ({"messages": MESSAGES, "tools": [WEATHER]}, "no place for tools"),
            ({"messages": CALLED}, "no place for tool_calls"),
        ):
            answer = plain.http.post(path, json=asked)
            assert answer.status_code == 400
            assert told in answer.json()["error"]["message"]
    with pytest.raises(TokenizerError, match="no place for tools"):
        reference.chat(MESSAGES, tools=[WEATHER])


@pytest.mark.parametrize(
    "calls", ["none", [1], [{}], [{"function": {"name": "f"}}], [{"function": {"arguments": "1"}}]]
)
def test_llms_messages_are_checked_too(reference, calls):
    with pytest.raises(InvalidRequestError, match="tool"):
        reference.chat([{"role": "assistant", "tool_calls": calls}], chat_template=TEMPLATE)
