"""Tools in chats: the template tells the model of them; its answer is text, or the calls that are forced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import jsonschema
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from minillm import SamplingParams
from minillm.errors import InvalidRequestError, TokenizerError
from minillm.server.tool_calls import CallListReader
from tests.server.conftest import running

TEMPLATE = (Path(__file__).parents[2] / "docs" / "examples" / "template_chatml.jinja").read_text(encoding="utf-8")
TERSE = """{% for tool in tools %}{{ tool.function.name }} {% endfor %}
{%- for message in messages %}{{ message.role }}: {{ message.content }}
{%- for call in message.tool_calls %} {{ call.function.name }}{% endfor %}
{% endfor %}"""
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


class GetTime(BaseModel, extra="forbid"):
    """The time of a place."""

    place: Literal["Paris", 'the "{[old]}" town', "北京"]


class Box(BaseModel, extra="forbid"):
    """Boxes in boxes: references in references."""

    name: str = Field(max_length=3)
    inner: list[Box] = Field(max_length=1)


def with_parameters(schema: dict, name: str = "f") -> dict:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [
    with_parameters(GetTime.model_json_schema(), "get_time"),
    with_parameters(Box.model_json_schema(), "pack"),
    {"type": "function", "function": {"name": 'quit "now" {'}},
]
SCHEMAS = {tool["function"]["name"]: tool["function"].get("parameters", {"maxProperties": 0}) for tool in TOOLS}


END_OF_LIST = {"63": 10}
"""Makes "]" likelier: this model would call until there is no more room."""


def named(tool: dict) -> dict:
    return {"type": "function", "function": {"name": tool["function"]["name"]}}


@pytest.fixture(scope="module")
def server(llm):
    with running(llm, chat_template=TEMPLATE) as server:
        yield server


@pytest.fixture(scope="module")
def plain(llm):
    """With the model's own template, which knows no tools."""
    with running(llm) as server:
        yield server


@pytest.fixture(scope="module")
def client(llm):
    """Of a server with a template that tells the names of tools only, so that there is room for calls."""
    with running(llm, chat_template=TERSE) as server:
        yield server.openai


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


def forced(client, choice, **options) -> tuple[list, list]:
    """The choices of a whole answer, and of a stream as the client's own helper joins it."""
    asked = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "temperature": 1} | options
    asked["logit_bias"] = END_OF_LIST
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        for _ in stream:
            pass
        joined = stream.current_completion_snapshot
    assert joined.usage.prompt_tokens == whole.usage.prompt_tokens
    assert joined.usage.completion_tokens == whole.usage.completion_tokens
    return whole.choices, joined.choices


def told(choices: list) -> list:
    """What is the same in two answers to the same request."""
    return [
        (
            one.index,
            one.finish_reason,
            one.message.content,
            [(call.type, call.function.name, call.function.arguments) for call in one.message.tool_calls or ()],
        )
        for one in sorted(choices, key=lambda one: one.index)
    ]


def check(choice) -> None:
    """Calls have their own ids, and complete ones satisfy their functions' schemas."""
    calls = choice.message.tool_calls or []
    assert choice.message.content is None
    assert len({call.id for call in calls}) == len(calls)
    assert all(call.id.startswith("call_") for call in calls)
    for call in calls[:-1] if choice.finish_reason == "length" else calls:
        jsonschema.validate(json.loads(call.function.arguments), {"type": "object"} | SCHEMAS[call.function.name])


@pytest.mark.parametrize("seed", range(3))
def test_a_named_function_is_called(client, seed):
    for tool in TOOLS:
        whole, joined = forced(client, named(tool), n=2, seed=seed, max_tokens=400)
        assert told(whole) == told(joined)
        for choice in whole + joined:
            assert choice.finish_reason == "stop"
            (call,) = choice.message.tool_calls
            assert call.function.name == tool["function"]["name"]
            check(choice)


@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize("parallel", [None, True, False])
def test_required_calls(client, seed, parallel):
    options = {} if parallel is None else {"parallel_tool_calls": parallel}
    whole, joined = forced(client, "required", n=2, seed=seed, max_tokens=200, **options)
    assert told(whole) == told(joined)
    for choice in whole + joined:
        assert choice.finish_reason in (["tool_calls"] if parallel is False else ["tool_calls", "length"])
        assert len(choice.message.tool_calls) == 1 or parallel is not False
        check(choice)


def test_several_calls_are_made(client):
    whole, _ = forced(client, "required", seed=0, n=6, max_tokens=120, temperature=5)
    complete = [choice for choice in whole if choice.finish_reason == "tool_calls"]
    assert max(len(choice.message.tool_calls) for choice in complete) > 1
    assert {call.function.name for choice in complete for call in choice.message.tool_calls} == SCHEMAS.keys()


def test_references_stay_within_their_function(client):
    tools = [
        with_parameters(
            {
                "properties": {"x": {"$ref": "#/$defs/x"}},
                "required": ["x"],
                "additionalProperties": False,
                "$defs": {"x": {"const": name}},
            },
            name,
        )
        for name in ("a", "b")
    ]
    whole, _ = forced(
        client, "required", tools=tools, parallel_tool_calls=False, n=6, seed=0, max_tokens=60, temperature=5
    )
    functions = [choice.message.tool_calls[0].function for choice in whole]
    assert {function.name for function in functions} == {"a", "b"}
    assert all(json.loads(function.arguments) == {"x": function.name} for function in functions)


@pytest.mark.parametrize("choice", ["required", named(TOOLS[1])])
def test_answers_that_are_cut(client, choice):
    (complete,), _ = forced(client, choice, seed=1, max_tokens=200)
    calls = complete.message.tool_calls
    for limit in range(1, 40, 4) if choice == "required" else range(1, 16, 2):
        whole, joined = forced(client, choice, seed=1, max_tokens=limit)
        assert told(whole) == told(joined)
        (cut,) = whole
        assert cut.finish_reason == "length"
        check(cut)
        for call, expected in zip(cut.message.tool_calls, calls, strict=False):
            assert call.function.name == expected.function.name
            assert expected.function.arguments.startswith(call.function.arguments)
    assert cut.message.tool_calls[0].function.arguments


def test_a_stop_text_is_no_end_of_calls(client):
    (found,), (joined,) = forced(client, "required", seed=1, max_tokens=400, stop="}")
    assert told([found]) == told([joined])
    assert (found.finish_reason, found.model_extra["stop_reason"]) == ("stop", "}")


def test_the_clients_own_parser(client):
    tool = openai.pydantic_function_tool(GetTime)
    for choice in ("required", named(tool)):
        found = client.chat.completions.parse(
            model="tiny", messages=MESSAGES, tools=[tool], tool_choice=choice, parallel_tool_calls=False, seed=1
        )
        (call,) = found.choices[0].message.tool_calls
        assert isinstance(call.function.parsed_arguments, GetTime)


def test_pieces_of_calls(client):
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice="required", stream=True, seed=1, max_tokens=100
    )
    first, *rest = [chunk.choices[0].delta.model_dump(exclude_unset=True) for chunk in stream]
    assert first == {"role": "assistant", "content": None}
    pieces = [piece for delta in rest for piece in delta.get("tool_calls", [])]
    assert all(delta.keys() <= {"tool_calls"} for delta in rest)
    begun: set[int] = set()
    for piece in pieces:
        assert ("id" in piece, "type" in piece, "name" in piece["function"]) == (piece["index"] not in begun,) * 3
        begun.add(piece["index"])
    assert begun == set(range(len(begun)))
    assert len(pieces) > len(begun)


def test_log_probabilities_are_of_the_text_as_it_was_written(client):
    options = {"seed": 1, "max_tokens": 100, "logprobs": True, "top_logprobs": 1}
    (whole,), (joined,) = forced(client, named(TOOLS[0]), **options)
    assert [one.token for one in whole.logprobs.content] == [one.token for one in joined.logprobs.content]
    text = "".join(one.token for one in whole.logprobs.content)
    assert text == whole.message.tool_calls[0].function.arguments


def test_answers_go_back_into_the_conversation(client):
    (found,), _ = forced(client, "required", seed=2, max_tokens=250, parallel_tool_calls=False)
    (call,) = found.message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "Done."}
    messages = [*MESSAGES, found.message.model_dump(exclude_unset=True), result]
    again = client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, **GREEDY)
    assert again.choices[0].finish_reason in ("stop", "length")


def test_tools_may_be_too_much(client):
    large = with_parameters({"properties": {"a": {"const": "a" * 2**15}}})
    with pytest.raises(openai.BadRequestError, match="at most"):
        forced(client, "required", tools=[large])


ARGUMENTS = st.dictionaries(
    st.text(),
    st.recursive(
        st.none() | st.integers() | st.text(st.sampled_from('a"\\{}[],: \n')),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    ),
)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.text(st.characters(codec="utf-8")), ARGUMENTS), min_size=1, max_size=4),
    st.lists(st.integers(1, 9), min_size=1),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_lists_of_calls_are_read_in_any_pieces(calls, lengths, indent, ensure_ascii):
    listed = [{"name": name, "parameters": arguments} for name, arguments in calls]
    text = json.dumps(listed, indent=indent, ensure_ascii=ensure_ascii)
    reader, deltas, start = CallListReader(), [], 0
    while start < len(text):
        length = lengths[len(deltas) % len(lengths)]
        deltas.append(reader.read(text[start : start + length]))
        start += length
    whole = CallListReader()
    whole.read(text)
    read = [(call.function.name, call.function.arguments) for call in reader.calls]
    assert read == [(call.function.name, call.function.arguments) for call in whole.calls]
    assert [(name, json.loads(arguments)) for name, arguments in read] == calls
    joined = [""] * len(calls)
    for piece in [piece for pieces in deltas for piece in pieces]:
        joined[piece.index] += piece.function.arguments
    assert joined == [arguments for _, arguments in read]


def test_the_openapi_page_tells_of_calls(server):
    schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
    reasons = schemas["ChatChoice"]["properties"]["finish_reason"]["enum"]
    assert set(reasons) == {"stop", "length", "tool_calls"}
    assert schemas["AssistantMessage"]["properties"]["tool_calls"]["anyOf"][0]["items"]["$ref"].endswith("/ToolCall")


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
    required = tools | {"tool_choice": "required"}
    deep = with_parameters(nested(450))
    for asked, told in [
        (tools | {"tool_choice": "always"}, "tool_choice"),
        (tools | {"tool_choice": named(TOOLS[0])}, "get_time is none of the tools"),
        ({"tool_choice": named(WEATHER)}, "requests with tools"),
        ({"tools": [WEATHER, TOOLS[0], WEATHER]}, "several functions are called get_weather"),
        (required | {"response_format": {"type": "json_object"}}, "choose"),
        (tools | {"tool_choice": named(WEATHER), "structured_outputs": {"regex": "a"}}, "choose"),
        (required | {"tools": [with_parameters({"type": "string"})]}, "must have the type 'object'"),
        (required | {"tools": [with_parameters({"properties": {"a": {"not": {}}}})]}, "cannot be compiled"),
        (required | {"tools": [with_parameters({"properties": {"a": {"$ref": "#/b"}}})]}, "cannot be compiled"),
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
