"""Structured output as OpenAI's own client asks for it, and by vLLM's field."""

from __future__ import annotations

import json
import threading
from typing import Literal

import jsonschema
import openai
import pydantic
import pytest

from minillm import SamplingParams, StructuredOutputsParams

MESSAGES = [{"role": "user", "content": "Who has a red kite?"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Mia", "Tom"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "child", "schema": SCHEMA, "strict": True}}
LONG = {"max_tokens": 400, "seed": 3, "extra_body": {"bad_words": ["\n", "\r", "\t", "  "]}}
"""White space may be anywhere in JSON, and this model likes it."""


class Child(pydantic.BaseModel):
    name: Literal["Mia", "Tom"]
    toys: list[Literal["kite", "ball"]] = pydantic.Field(max_length=2)


pytestmark = pytest.mark.usefixtures("nothing_is_left_behind")


def test_a_schema_is_satisfied_and_the_answer_is_llms(server, reference):
    chat = server.openai.chat.completions.create(model="tiny", messages=MESSAGES, response_format=FORMAT, n=3, **LONG)
    params = SamplingParams(
        n=3, seed=3, max_tokens=400, bad_words=LONG["extra_body"]["bad_words"],
        structured_outputs=StructuredOutputsParams(json=SCHEMA),
    )  # fmt: skip
    (expected,) = reference.chat(MESSAGES, params, use_tqdm=False)
    assert [choice.message.content for choice in chat.choices] == [answer.text for answer in expected.outputs]
    for choice in chat.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)


def test_streams_join_to_the_whole(server):
    client = server.openai
    asked = {"model": "tiny", "messages": MESSAGES, "response_format": FORMAT, **LONG}
    whole = client.chat.completions.create(**asked).choices[0]
    pieces = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **asked)]
    assert "".join(piece.delta.content or "" for piece in pieces) == whole.message.content
    assert pieces[-1].finish_reason == whole.finish_reason == "stop"


def test_the_clients_own_parser(server):
    client = server.openai
    parsed = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Child, **LONG)
    assert isinstance(parsed.choices[0].message.parsed, Child)
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, response_format=Child, **LONG) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == parsed.choices[0].message.parsed


def test_json_objects_and_plain_text(server):
    create = server.openai.chat.completions.create
    found = create(model="tiny", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=30, seed=1)
    assert found.choices[0].message.content.startswith("{")
    plain = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "temperature": 0}
    assert create(**plain, response_format={"type": "text"}).choices == create(**plain).choices


@pytest.mark.parametrize(
    ("form", "choices"),
    [
        ({"choice": ["Mia", "Tom"]}, {"Mia", "Tom"}),
        ({"regex": "a|bc"}, {"a", "bc"}),
        ({"grammar": 'root ::= "x" | "yz"'}, {"x", "yz"}),
        ({"json": {"enum": [1, 22]}, "disable_any_whitespace": True}, {"1", "22"}),
        ({"json": '{"enum": [1, 22]}'}, {"1", "22"}),
    ],
)
def test_vllms_field_in_completions_of_several_prompts(server, form, choices):
    found = server.openai.completions.create(
        model="tiny", prompt=["Once", "Long ago"], n=2, seed=1, extra_body={"structured_outputs": form}
    )
    assert len(found.choices) == 4
    assert {choice.text for choice in found.choices} <= choices
    assert {choice.finish_reason for choice in found.choices} == {"stop"}


def test_response_format_in_completions(server):
    found = server.openai.completions.create(
        model="tiny", prompt="Once", max_tokens=400, seed=3, extra_body=LONG["extra_body"] | {"response_format": FORMAT}
    )
    jsonschema.validate(json.loads(found.choices[0].text), SCHEMA)


@pytest.mark.parametrize(
    ("asked", "param", "told"),
    [
        ({"response_format": {"type": "json_schema"}}, None, "response_format.json_schema"),
        ({"response_format": {"type": "json_object", "json_schema": FORMAT["json_schema"]}}, None, "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
         "response_format.json_schema.schema", "must provide"),
        ({"response_format": FORMAT, "structured_outputs": {"regex": "a"}}, None, "both"),
        ({"structured_outputs": {}}, None, "none of them"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, None, "regex, choice"),
        ({"structured_outputs": {"regex": "(a"}}, None, "unclosed"),
        ({"structured_outputs": {"regex": "a" * 100_000}}, None, "at most"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "structured_outputs.json"),
        ({"structured_outputs": {"json": {"not": {}}}}, None, "not"),
        ({"structured_outputs": {"schema": {}}}, "structured_outputs.schema", "Unrecognized"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "not implemented"),
        ({"structured_outputs": {"json": {"$ref": "file:///etc/passwd"}}}, None, "cannot be compiled"),
        ({"guided_json": {}}, "guided_json", "not implemented"),
    ],
)  # fmt: skip
def test_what_is_refused(server, asked, param, told):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=told) as refused:
            server.openai.chat.completions.create(model="tiny", messages=MESSAGES, stream=stream, extra_body=asked)
        assert refused.value.type == "invalid_request_error"
        assert param is None or refused.value.param == param


def test_nothing_is_compiled_where_others_wait(server, monkeypatch):
    grammars = server.llm.engine.grammars
    threads, compile_form = [], grammars.compile

    def noted(asked):
        threads.append(threading.current_thread().name)
        return compile_form(asked)

    monkeypatch.setattr(grammars, "compile", noted)
    found = server.openai.completions.create(
        model="tiny", prompt=["Once", "Long ago"], extra_body={"structured_outputs": {"choice": ["yes"]}}
    )
    assert [choice.text for choice in found.choices] == ["yes", "yes"]
    (name,) = threads
    assert name not in ("engine", server.thread.name)


def test_the_openapi_page_tells_of_both(server):
    schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
    assert {"json", "regex", "choice", "grammar", "json_object"} <= schemas["StructuredOutputs"]["properties"].keys()
    assert "schema" in schemas["JsonSchema"]["required"]
