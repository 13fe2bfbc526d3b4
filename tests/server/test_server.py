"""The server as OpenAI's own client sees it: its answers are `LLM`'s."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time

import httpx
import jsonschema
import openai
import pytest

from minillm import SamplingParams, __version__
from minillm.server.protocol import SAMPLING, ChatCompletionRequest, CompletionRequest, Message, SamplingFields
from tests.server.conftest import running

PROMPTS = ["Once upon a time", "Mia had a red kite.", "One sunny morning Tom"]
MESSAGES = [{"role": "user", "content": "Tell me a story about Mia and a red kite."}]


@pytest.fixture(scope="module")
def server(llm):
    with running(llm, served_names=["tiny", "small"]) as server:
        yield server


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(server):
    yield
    assert server.until(lambda: server.num_held == 0)
    assert not server.llm.engine.has_unfinished_requests
    assert server.service.engine.num_unfinished == 0


def generate(llm, prompts, **params):
    return llm.generate(prompts, SamplingParams(**params), use_tqdm=False)


# --- completions


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 0.8, "seed": 3, "top_p": 0.9}])
def test_a_completion_is_llms(server, reference, params):
    expected = generate(reference, PROMPTS[0], max_tokens=20, **params)[0]
    found = server.openai.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=20, **params)
    (choice,) = found.choices
    assert choice.text == expected.outputs[0].text
    assert choice.finish_reason == expected.outputs[0].finish_reason
    assert found.object == "text_completion"
    assert found.id.startswith("cmpl-")
    assert found.model == "tiny"
    assert found.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert found.usage.completion_tokens == len(expected.outputs[0].token_ids)
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_prompts_in_all_their_forms(server, reference):
    ids = [reference.get_tokenizer()(prompt).input_ids for prompt in PROMPTS]
    expected = [one.outputs[0].text for one in generate(reference, PROMPTS, temperature=0, max_tokens=12)]
    for prompt in (PROMPTS, ids):
        found = server.openai.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0)
        assert [choice.text for choice in found.choices] == expected
        assert [choice.index for choice in found.choices] == [0, 1, 2]
    for prompt in (PROMPTS[0], ids[0], [PROMPTS[0]], [ids[0]]):
        found = server.openai.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0)
        assert [choice.text for choice in found.choices] == expected[:1]


def test_n_stop_and_vllms_fields(server, reference):
    params = {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 30}
    extra = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 2, "include_stop_str_in_output": True}
    expected = generate(reference, PROMPTS[1], stop=["."], **params, **extra)[0].outputs
    found = server.openai.completions.create(model="tiny", prompt=PROMPTS[1], stop=["."], extra_body=extra, **params)
    assert [choice.text for choice in found.choices] == [answer.text for answer in expected]
    assert [choice.finish_reason for choice in found.choices] == [answer.finish_reason for answer in expected]
    assert [choice.stop_reason for choice in found.choices] == [answer.stop_reason for answer in expected]


def test_ignore_eos_stop_tokens_and_bias(server, reference):
    token = reference.get_tokenizer()(" the", add_special_tokens=False).input_ids[0]
    params = {"temperature": 0, "max_tokens": 40}
    for extra in ({"ignore_eos": True}, {"stop_token_ids": [token]}, {"logit_bias": {str(token): -100}}):
        said = {"logit_bias": {token: -100}} if "logit_bias" in extra else extra
        expected = generate(reference, PROMPTS[2], **params, **said)[0].outputs[0]
        found = server.openai.completions.create(model="tiny", prompt=PROMPTS[2], extra_body=extra, **params)
        assert found.choices[0].text == expected.text


def test_logprobs_and_echo(server, reference):
    expected = generate(reference, PROMPTS[0], temperature=0, max_tokens=5, logprobs=2, prompt_logprobs=2)[0]
    answer = expected.outputs[0]
    found = server.openai.completions.create(
        model="tiny", prompt=PROMPTS[0], max_tokens=5, temperature=0, logprobs=2, echo=True
    ).choices[0]
    tokens = expected.prompt_token_ids + answer.token_ids
    decode = reference.get_tokenizer().decode
    assert found.text == PROMPTS[0] + answer.text
    assert found.logprobs.tokens == [decode([token]) for token in tokens]
    told = [*expected.prompt_logprobs, *answer.logprobs]
    assert found.logprobs.token_logprobs[0] is None
    assert found.logprobs.top_logprobs[0] is None
    for token, logprobs, one, top in zip(
        tokens[1:], told[1:], found.logprobs.token_logprobs[1:], found.logprobs.top_logprobs[1:], strict=True
    ):
        assert one == pytest.approx(logprobs[token].logprob, abs=1e-4)
        assert top == pytest.approx({decode([t]): lp.logprob for t, lp in logprobs.items()}, abs=1e-4)
    assert found.logprobs.text_offset == [len("".join(found.logprobs.tokens[:at])) for at in range(len(tokens))]


def test_token_ids_are_given_where_they_are_asked_for(server, reference):
    expected = reference.generate("Once upon", SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)[0]
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 12, "extra_body": {"return_token_ids": True}}
    whole = server.openai.completions.create(prompt="Once upon", **asked)
    assert whole.choices[0].token_ids == expected.outputs[0].token_ids
    pieces = list(server.openai.completions.create(prompt="Once upon", stream=True, **asked))
    assert [token for piece in pieces for token in piece.choices[0].token_ids] == expected.outputs[0].token_ids
    conversation = [{"role": "user", "content": "Hello"}]
    chat = server.openai.chat.completions.create(messages=conversation, **asked)
    pieces = list(server.openai.chat.completions.create(messages=conversation, stream=True, **asked))
    ids = [token for piece in pieces for token in getattr(piece.choices[0], "token_ids", [])]
    assert ids == chat.choices[0].token_ids
    assert len(ids) == chat.usage.completion_tokens
    plain = server.openai.completions.create(model="tiny", prompt="Once upon", max_tokens=2)
    assert plain.choices[0].token_ids is None


def test_a_prompt_can_be_scored_without_an_answer(server, reference):
    expected = generate(reference, PROMPTS[0], temperature=0, max_tokens=1, prompt_logprobs=0)[0]
    for stream in (False, True):
        made = server.openai.completions.create(
            model="tiny", prompt=PROMPTS[0], max_tokens=0, logprobs=0, echo=True, stream=stream
        )
        choice = (next(iter(made)) if stream else made).choices[0]
        assert choice.text == PROMPTS[0]
        assert len(choice.logprobs.tokens) == len(expected.prompt_token_ids)
        assert choice.finish_reason == "length"


def test_prompt_logprobs_are_llms(server, reference):
    asked = {"model": "tiny", "max_tokens": 2, "n": 2, "extra_body": {"prompt_logprobs": 2}}
    texts = generate(reference, PROMPTS, prompt_logprobs=2, max_tokens=2)
    (chat,) = reference.chat(MESSAGES, SamplingParams(prompt_logprobs=2, max_tokens=2), use_tqdm=False)
    completion = server.openai.completions.create(prompt=PROMPTS, **asked)
    expected = [output.prompt_logprobs for output in [*texts, chat]]
    found = [choice.prompt_logprobs for choice in completion.choices[::2]]
    found.append(server.openai.chat.completions.create(messages=MESSAGES, **asked).prompt_logprobs)
    for ours, llms in zip(found, expected, strict=True):
        assert ours[0] is llms[0] is None
        for one, other in zip(ours[1:], llms[1:], strict=True):
            assert one == {str(t): pytest.approx(dataclasses.asdict(lp), abs=1e-4) for t, lp in other.items()}
    echo = server.openai.completions.create(model="tiny", prompt=PROMPTS[0], logprobs=1, echo=True, max_tokens=1)
    assert echo.choices[0].prompt_logprobs is None


@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS])
@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_is_the_whole(server, prompt, echo):
    asked = {
        "model": "tiny", "prompt": prompt, "n": 2, "temperature": 0.9, "seed": 1, "max_tokens": 24, "stop": "Leo",
        "logprobs": 1, "echo": echo,
    }  # fmt: skip
    whole = server.openai.completions.create(**asked)
    texts = [""] * len(whole.choices)
    logprobs = [[] for _ in whole.choices]
    offsets = [[] for _ in whole.choices]
    reasons: dict[int, str] = {}
    chunks = list(server.openai.completions.create(stream=True, stream_options={"include_usage": True}, **asked))
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        assert choice.index not in reasons, "nothing comes after the end"
        texts[choice.index] += choice.text
        logprobs[choice.index] += choice.logprobs.token_logprobs
        offsets[choice.index] += choice.logprobs.text_offset
        if choice.finish_reason is not None:
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    for choice in whole.choices:
        assert [x or 0 for x in logprobs[choice.index]] == pytest.approx(
            [x or 0 for x in choice.logprobs.token_logprobs], abs=1e-4
        )
        assert offsets[choice.index] == choice.logprobs.text_offset
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert len({chunk.id for chunk in chunks}) == 1


# --- chats


def test_a_chat_is_llms(server, reference):
    (expected,) = reference.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=30), use_tqdm=False)
    for limit in ("max_tokens", "max_completion_tokens"):
        found = server.openai.chat.completions.create(model="small", messages=MESSAGES, temperature=0, **{limit: 30})
        (choice,) = found.choices
        assert choice.message.content == expected.outputs[0].text
        assert choice.message.role == "assistant"
        assert choice.finish_reason == "length"
        assert found.usage.prompt_tokens == len(expected.prompt_token_ids)
        assert found.id.startswith("chatcmpl-")
        assert found.model == "small"


def test_a_chat_takes_all_the_room_and_its_own_answers(server):
    client = server.openai
    first = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0)
    assert first.choices[0].finish_reason == "stop"
    said = first.choices[0].message.model_dump()
    parts = [{"type": "text", "text": "Who told"}, {"type": "text", "text": "it?"}]
    messages = [*MESSAGES, said, {"role": "user", "content": parts}]
    assert client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=5).choices


def test_chat_streams_and_logprobs(server):
    asked = {
        "model": "tiny", "messages": MESSAGES, "n": 2, "temperature": 1.0, "seed": 2, "max_tokens": 25,
        "logprobs": True, "top_logprobs": 3,
    }  # fmt: skip
    whole = server.openai.chat.completions.create(**asked)
    chunks = list(server.openai.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked))
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(piece.delta.content for piece in mine) == choice.message.content
        assert [piece.finish_reason for piece in mine if piece.finish_reason] == [choice.finish_reason]
        told = [one for piece in mine if piece.logprobs for one in piece.logprobs.content]
        assert [one.token for one in told] == [one.token for one in choice.logprobs.content]
        for one in choice.logprobs.content:
            assert len(one.top_logprobs) == 3
            values = [top.logprob for top in one.top_logprobs]
            assert values == sorted(values, reverse=True)
            assert bytes(one.bytes).decode() == one.token
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_many_at_once_by_the_async_client(server, reference):
    prompts = [f"{PROMPTS[at % 3]} {at}" for at in range(24)]
    expected = [one.outputs[0].text for one in generate(reference, prompts, temperature=0, max_tokens=10)]

    async def ask(client: openai.AsyncOpenAI, at: int) -> str:
        made = await client.completions.create(
            model="tiny", prompt=prompts[at], max_tokens=10, temperature=0, stream=at % 2 == 0
        )
        if at % 2:
            return made.choices[0].text
        return "".join([chunk.choices[0].text async for chunk in made])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, at) for at in range(len(prompts))))

    assert asyncio.run(ask_all()) == expected


# --- the small routes


def test_models_tokens_health_and_version(server, reference):
    assert [model.id for model in server.openai.models.list()] == ["tiny", "small"]
    assert server.openai.models.retrieve("small").max_model_len == reference.max_model_len
    http = server.http
    ids = reference.get_tokenizer()(PROMPTS[0]).input_ids
    told = http.post("/tokenize", json={"prompt": PROMPTS[0], "return_token_strs": True}).json()
    assert told["tokens"] == ids
    assert told["count"] == len(ids) == len(told["token_strs"])
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": PROMPTS[0]}
    chat = http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    assert "<|im_start|>assistant" in reference.get_tokenizer().decode(chat)
    assert http.get("/health").status_code == 200
    assert http.get("/version").json() == {"version": __version__}


def test_metrics_have_vllms_names_and_count(server):
    def read() -> dict[str, float]:
        lines = server.http.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    label = '{model_name="tiny"}'
    before = read()
    list(server.openai.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=7, stream=True, temperature=0))
    server.openai.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=7, temperature=0)
    after = read()
    ids = len(server.llm.get_tokenizer()(PROMPTS[0]).input_ids)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown[f"minillm:prompt_tokens_total{label}"] == 2 * ids
    assert grown[f"minillm:generation_tokens_total{label}"] == 14
    assert grown[f"minillm:time_to_first_token_seconds_count{label}"] == 2
    assert grown[f"minillm:inter_token_latency_seconds_count{label}"] == 6
    assert grown[f"minillm:e2e_request_latency_seconds_count{label}"] == 2
    assert grown[f"minillm:request_generation_tokens_sum{label}"] == 14
    assert grown['minillm:request_success_total{finished_reason="length",model_name="tiny"}'] == 2
    assert after[f"minillm:num_requests_running{label}"] == 0
    for name in ("num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total", "prefix_cache_hits_total"):
        assert f"minillm:{name}{label}" in after


def test_metrics_of_streams_are_counted_as_they_come(server, monkeypatch):
    """The first token's times with the first token, though the request is then aborted; gaps for each answer."""
    step = server.llm.engine.step

    def slowly():
        time.sleep(0.005)
        return step()

    def count(name: str) -> float:
        lines = server.http.get("/metrics").text.splitlines()
        (line,) = (line for line in lines if line.startswith(f"minillm:{name}_count{{"))
        return float(line.rpartition(" ")[2])

    firsts = ("time_to_first_token_seconds", "request_queue_time_seconds", "request_prefill_time_seconds")
    names = (*firsts, "inter_token_latency_seconds", "e2e_request_latency_seconds")
    before = {name: count(name) for name in names}
    monkeypatch.setattr(server.llm.engine, "step", slowly)
    asked = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 400, "extra_body": {"ignore_eos": True}}
    with server.openai.completions.create(stream=True, **asked) as stream:
        next(iter(stream))
        assert server.until(lambda: count(firsts[0]) == before[firsts[0]] + 1)
        assert server.llm.engine.has_unfinished_requests, "before its end"
    assert server.until(lambda: not server.llm.engine.has_unfinished_requests)
    monkeypatch.undo()
    assert [count(name) - before[name] for name in firsts] == [1, 1, 1]
    assert count("e2e_request_latency_seconds") == before["e2e_request_latency_seconds"]
    gaps = count("inter_token_latency_seconds")
    list(server.openai.completions.create(stream=True, n=3, seed=1, **asked | {"max_tokens": 5}))
    assert count("inter_token_latency_seconds") == gaps + 3 * 4
    assert [count(name) - before[name] for name in firsts] == [2, 2, 2]


def test_the_openapi_page_is_right(server):
    schema = server.http.get("/openapi.json").json()
    answers = schema["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert schema["openapi"] == "3.2.0"
    assert "securitySchemes" not in schema["components"]
    assert "422" not in answers
    assert answers["200"]["content"].keys() == {"application/json", "text/event-stream"}
    assert answers["400"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorResponse"}


def test_answers_and_events_are_as_the_openapi_page_says(server):
    page = server.http.get("/openapi.json").json()

    def check(kind: str, found: object) -> None:
        jsonschema.validate(found, {"$ref": f"#/components/schemas/{kind}", "components": page["components"]})

    for path, asked, whole, piece in (
        ("completions", {"prompt": PROMPTS[:2], "n": 2, "logprobs": 2, "echo": True}, "Completion", "Completion"),
        ("completions", {"prompt": PROMPTS[:2]}, "Completion", "Completion"),
        ("chat/completions", {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}, "ChatCompletion",
         "ChatCompletionChunk"),
    ):  # fmt: skip
        check(whole, server.http.post(f"/v1/{path}", json=asked | {"max_tokens": 4, "prompt_logprobs": 2}).json())
        stream = {"max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}}
        events = [line for line in server.http.post(f"/v1/{path}", json=asked | stream).text.split("\n") if line]
        assert events[-1] == "data: [DONE]"
        for event in events[:-1]:
            check(piece, json.loads(event.removeprefix("data: ")))


# --- what is taken, and what is refused


def test_no_field_of_sampling_is_dropped():
    taken = {name for name, field in SamplingFields.model_fields.items() if field.annotation is not type(None)}
    common = taken & {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(SAMPLING) == common - {"structured_outputs"}  # which response_format may give too
    assert len(set(SAMPLING)) == len(SAMPLING)


def test_what_asks_for_nothing_is_taken(server):
    def nulls(model):
        return {name: None for name, field in model.model_fields.items() if not field.is_required()}

    message = nulls(Message) | MESSAGES[0]
    plain = {"max_tokens": 2, "stream": True, "stream_options": {"continuous_usage_stats": False}}
    for path, asked in (
        ("v1/completions", nulls(CompletionRequest) | {"prompt": "a", "max_tokens": 2}),
        ("v1/chat/completions", nulls(ChatCompletionRequest) | {"messages": [message], "max_tokens": 2}),
        ("v1/completions", plain | {"prompt": "a", "best_of": 1, "suffix": ""}),
        ("v1/chat/completions", plain | {"messages": MESSAGES, "echo": False, "add_special_tokens": False,
                                         "modalities": ["text"], "service_tier": "auto", "store": False}),
        ("tokenize", {"prompt": "a", "add_special_tokens": None, "return_token_strs": None}),
        ("tokenize", {"messages": MESSAGES, "add_special_tokens": False, "return_token_strs": None}),
    ):  # fmt: skip
        answer = server.http.post(f"/{path}", json=asked)
        assert answer.status_code == 200, (asked, answer.text)


def test_what_cannot_be_is_refused_in_openais_form(server):
    text, chat = {"prompt": "a", "max_tokens": 2}, {"messages": MESSAGES, "max_tokens": 2}
    for path, asked, status, param, told in [
        ("completions", {}, 400, "prompt", "prompt"),
        ("completions", text | {"suffix": "x"}, 400, "suffix", "only '' is implemented"),
        ("completions", text | {"best_of": 3}, 400, "best_of", "only 1 is implemented"),
        ("completions", text | {"best_of": 1, "n": 2}, 400, None, "best_of"),
        ("completions", text | {"use_beam_search": True}, 400, "use_beam_search", "not implemented"),
        ("completions", text | {"prompt_logprobs": 1, "stream": True}, 400, None, "prompt_logprobs"),
        ("chat/completions", chat | {"prompt_logprobs": 1, "stream": True}, 400, None, "prompt_logprobs"),
        ("completions", text | {"prompt_logprobs": 1, "logprobs": 2, "echo": True}, 400, None, "prompt_logprobs"),
        ("completions", text | {"prompt_logprobs": 21}, 400, "prompt_logprobs", "20"),
        ("completions", text | {"prompt": [1], "add_special_tokens": True}, 400, None, "add_special_tokens"),
        ("completions", text | {"prompt": [[1]], "add_special_tokens": False}, 400, None, "add_special_tokens"),
        ("chat/completions", chat | {"add_special_tokens": True}, 400, "add_special_tokens", "only False"),
        ("chat/completions", chat | {"modalities": ["audio"]}, 400, "modalities[0]", "only 'text'"),
        ("completions", text | {"surprise": 1}, 400, "surprise", "Unrecognized request argument supplied: surprise"),
        ("completions", text | {"\ud800": 1}, 400, None, "unicode"),
        ("completions", text | {"model": "gpt-4"}, 404, "model", "does not exist"),
        ("completions", text | {"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ("completions", text | {"n": 1000}, 400, "n", "less than or equal"),
        ("completions", text | {"n": 0}, 400, "n", "greater"),
        ("completions", text | {"logprobs": 21}, 400, "logprobs", "20"),
        ("completions", text | {"stop": ["a"] * 17}, 400, "stop", "16"),
        ("completions", text | {"stop": ""}, 400, "stop", "1 character"),
        ("completions", text | {"top_k": 10**30}, 400, "top_k", "top_k"),
        ("completions", text | {"temperature": float("nan")}, 400, "temperature", "temperature"),
        ("completions", text | {"stream_options": {"include_usage": True}}, 400, None, "stream=true"),
        ("completions", text | {"stream_options": {"x": 1}}, 400, "stream_options.x", "stream_options.x"),
        ("completions", text | {"max_tokens": 0}, 400, None, "echo"),
        ("completions", text | {"max_tokens": 5000}, 400, None, "maximum context length"),
        ("completions", text | {"prompt": "a " * 5000}, 400, None, "maximum context length"),
        ("completions", text | {"prompt": ""}, 400, None, "empty"),
        ("completions", text | {"prompt": []}, 400, None, "empty"),
        ("completions", text | {"prompt": [10**9]}, 400, None, "token ids"),
        ("completions", text | {"prompt": "\ud800"}, 400, None, "half a character"),
            ("completions", text | {"bad_words": ["\ud800"]}, 400, "bad_words[0]", "unicode"),
            ("completions", text | {"add_special_tokens": False, "prompt": "\ud800"}, 400, None, "half a character"),
            ("chat/completions", {"messages": [{"role": "user", "content": "\udc00"}]}, 400, None, "half a character"),
        ("completions", text | {"prompt": ["a"] * 2000}, 400, None, "1024"),
        ("completions", text | {"logit_bias": {"99999999": 1}}, 400, None, "logit_bias"),
        ("completions", text | {"min_tokens": 3}, 400, None, "min_tokens"),
        ("completions", text | {"min_tokens": 1, "stop_token_ids": [10**9]}, 400, None, "stop_token_ids"),
        ("completions", text | {"allowed_token_ids": []}, 400, None, "allowed_token_ids"),
        ("chat/completions", {"messages": []}, 400, "messages", "at least 1"),
        ("chat/completions", chat | {"chat_template": "{{ 1 }}"}, 400, None, "--trust-request-chat-template"),
        ("chat/completions", chat | {"chat_template_kwargs": {"chat_template": ""}}, 400, None, "chat_template"),
        ("chat/completions", chat | {"tools": [{"type": "function"}]}, 400, "tools[0].function", "provide"),
        ("chat/completions", chat | {"response_format": {"type": "xml"}}, 400, "response_format.type", "'json_object'"),
        ("completions", text | {"guided_regex": "a"}, 400, "guided_regex", "not implemented"),
        ("chat/completions", chat | {"top_logprobs": 3}, 400, None, "logprobs=true"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
         400, None, "text"),
    ]:  # fmt: skip
        answer = httpx.post(
            f"{server.url}/v1/{path}", content=json.dumps(asked), headers={"content-type": "application/json"}
        )
        error = answer.json()["error"]
        assert answer.status_code == status, (asked, error)
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert told in error["message"], (asked, error)
        if param is not None:
            assert error["param"] == param, (asked, error)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"", 400),
        ("POST", "/v1/completions", b"[]", 400),
        ("POST", "/v1/completions", b"\xff\xfe", 400),
        ("POST", "/v1/completions", b"[" * 100_000, 400),
        ("POST", "/v1/completions", b'{"prompt": ' + b"9" * 10_000 + b"}", 400),
        ("POST", "/v1/completions", b" " * (8 * 2**20 + 1), 413),
        ("GET", "/v1/completions", None, 405),
        ("GET", "/v1/nothing", None, 404),
        ("POST", "/v1/completions/", b"{}", 404),
        ("GET", "/v1/models/other", None, 404),
    ],
)
def test_what_is_no_request(server, method, path, body, status):
    answer = server.http.request(method, path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_openais_client_raises_its_own_errors(server):
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        server.openai.completions.create(model="tiny", prompt="a", max_tokens=9999)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as caught:
        server.openai.chat.completions.create(model="other", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def test_where_no_token_can_be_chosen_the_client_is_told(server):
    token = server.llm.get_tokenizer()("a", add_special_tokens=False).input_ids[0]
    asked = {
        "model": "tiny", "prompt": PROMPTS[0], "max_tokens": 5,
        "extra_body": {"allowed_token_ids": [token], "bad_words": ["a"]},
    }  # fmt: skip
    with pytest.raises(openai.BadRequestError):
        server.openai.completions.create(**asked)
    with pytest.raises(openai.APIError):
        list(server.openai.completions.create(stream=True, **asked))
