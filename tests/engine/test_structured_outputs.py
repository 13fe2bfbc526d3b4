"""Answers of a prescribed form, by random models: what comes out is judged by jsonschema, re, regex and pydantic."""

from __future__ import annotations

import json
import re
from typing import Literal

import jsonschema
import pydantic
import pytest
import regex
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from minillm import LLM, SamplingParams, StructuredOutputsParams, get_tokenizer
from minillm.engine.params import BeamSearchParams
from minillm.engine.structured import MAX_GRAMMAR_CHARS
from minillm.errors import InvalidRequestError
from minillm.models.source import BUNDLED
from minillm.models.tokenizer import token_ids
from minillm.tokenizers.gguf import gguf_tokenizer
from tests.helpers import randomise, reference_logits
from tests.models.test_tokenizer import byte_level
from tests.tokenizers.test_gguf_tokenizer import spm_header, train
from tests.tokenizers.test_tiktoken import write

PADDING = 45
"""Tokens that a model has beyond its tokenizer's."""
SIZES = {"dtype": "float32", "device": "cpu", "max_model_len": 256, "block_size": 8, "enforce_eager": True}
PROMPT = "hello world"
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


class Friend(pydantic.BaseModel, extra="forbid"):
    name: str = pydantic.Field(max_length=6)
    kind: Literal["fox", "hen", "小猫"]
    age: int = pydantic.Field(ge=0, le=120)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 3, None]}, "minItems": 1, "maxItems": 3},
        "address": {"$ref": "#/$defs/address"},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
    "$defs": {
        "address": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "home": {"type": "boolean"}},
            "required": ["zip"],
            "additionalProperties": False,
        }
    },
}


def byte_tokens(folder):
    """The 256 bytes and two special tokens."""
    return get_tokenizer(byte_level(folder))


def tiktoken_pieces(folder):
    """GLM-4's form."""
    return get_tokenizer(write(folder / "published"))


def sentencepieces(_):
    """Llama 2's form: a space is a letter, other bytes are tokens of their own."""
    return gguf_tokenizer(spm_header(train(True), True))


@pytest.fixture(scope="module", params=[byte_tokens, tiktoken_pieces, sentencepieces])
def folder(request, tmp_path_factory):
    """A random model with more tokens than its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = request.param(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + PADDING,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, **SIZES, max_num_seqs=8, max_num_batched_tokens=64) as llm:
        yield llm


@pytest.fixture(scope="module")
def tiny():
    with LLM("tiny", **SIZES, max_num_seqs=8, max_num_batched_tokens=64) as llm:
        yield llm


def ask(llm, params, prompt=PROMPT):
    answers = llm.generate(prompt, params, use_tqdm=False)[0].outputs
    assert not llm.engine.has_unfinished_requests
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_blocks
    return answers


def following(seed=0, max_tokens=200, n=1, **form):
    structured = StructuredOutputsParams(**form)
    return SamplingParams(structured_outputs=structured, seed=seed, max_tokens=max_tokens, n=n)


@pytest.mark.parametrize("as_text", [False, True])
def test_json_satisfies_its_schema(llm, as_text):
    schema = json.dumps(PERSON) if as_text else PERSON
    texts = [a.text for a in ask(llm, following(int(as_text), n=8, json=schema, disable_any_whitespace=True))]
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
        assert not re.search(r"[,:\[{]\s", re.sub(r'"[^"]*"', "", text))
    assert len(set(texts)) > 1


def test_a_pydantic_class(llm):
    for answer in ask(llm, following(3, n=4, json=Friend, whitespace_pattern="[ ]?")):
        Friend.model_validate_json(answer.text)
        assert answer.finish_reason == "stop"


def test_white_space_as_it_is_asked_for(llm):
    schema = {"type": "array", "items": {"enum": [1]}, "minItems": 4, "maxItems": 4}
    for answer in ask(llm, following(5, n=4, json=schema, whitespace_pattern="[_]{2}")):
        assert answer.text.replace("_", "") == "[1,1,1,1]"
        assert set(re.findall("_+", answer.text)) <= {"__"}


def test_no_other_properties(llm):
    schema = {
        "type": "object",
        "properties": {
            "properties": {"type": "object", "properties": {"a": {"enum": [1]}}},
            "b": {"$ref": "#/$defs/c"},
        },
        "$defs": {"c": {"anyOf": [{"type": "object", "properties": {"d": {"enum": [2]}}}, {"enum": [3]}]}},
        "required": ["properties", "b"],
    }
    options = {"disable_additional_properties": True, "disable_any_whitespace": True}
    for answer in ask(llm, following(1, n=8, json=schema, **options)):
        found = json.loads(answer.text)
        assert found["properties"] in ({}, {"a": 1})
        assert found["b"] in ({}, {"d": 2}, 3)
        assert found.keys() == {"properties", "b"}


def test_any_object_is_one_or_its_beginning(llm):
    finished = 0
    for answer in ask(llm, following(2, n=8, max_tokens=100, json_object=True, disable_any_whitespace=True)):
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.text), dict)
            finished += 1
        else:
            assert answer.finish_reason == "length"
            assert len(answer.token_ids) == 100
            with pytest.raises(json.JSONDecodeError):
                json.loads(answer.text)
    assert finished


@few
@given(
    pattern=st.sampled_from(
        [
            r"[a-f]{3,9}",
            r"(ab|c)*d?",
            r"\d{1,3}(\.\d{1,3}){3}",
            r"(你|好|😀){2,5}",
            r"[^\n]{2,6}!",
            r"x(\s+y)+z?",
            r"é+|ü",
        ]
    ),
    seed=st.integers(0, 99),
    max_tokens=st.integers(1, 24),
)
def test_text_matches_its_expression(llm, pattern, seed, max_tokens):
    (answer,) = ask(llm, following(seed, max_tokens, regex=pattern))
    if answer.finish_reason == "stop":
        assert re.fullmatch(pattern, answer.text)
    else:
        assert answer.finish_reason == "length"
        assert len(answer.token_ids) == max_tokens
        assert regex.fullmatch(pattern, answer.text.rstrip("�"), partial=True)


@few
@given(
    choices=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_one_of_the_choices(llm, choices, seed):
    (answer,) = ask(llm, following(seed, choice=choices))
    assert answer.text in choices
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)


GRAMMARS = {
    "lark": ('start: item+\nitem: "<" NAME ">"\nNAME: /[a-z]{1,3}/', r"(<[a-z]{1,3}>)+"),
    "gbnf": ('root ::= sum\nsum ::= num ("+" num)*\nnum ::= [0-9] [0-9]?', r"\d\d?(\+\d\d?)*"),
}


@pytest.mark.parametrize("kind", GRAMMARS)
def test_text_follows_its_grammar(llm, kind):
    grammar, pattern = GRAMMARS[kind]
    answers = ask(llm, following(4, n=8, max_tokens=40, grammar=grammar))
    for answer in answers:
        assert regex.fullmatch(pattern, answer.text, partial=answer.finish_reason == "length")
    assert "stop" in {answer.finish_reason for answer in answers}


def test_nested_parentheses(llm):
    for answer in ask(llm, following(6, n=8, max_tokens=60, grammar='start: "(" start* ")"')):
        depth = 0
        for at, letter in enumerate(answer.text, start=1):
            depth += 1 if letter == "(" else -1
            assert depth > 0 or at == len(answer.text)
        assert (depth == 0) == (answer.finish_reason == "stop")


def test_neighbours_and_answers_have_their_own(llm):
    """In a batch, and where memory is so short that requests are computed again: what each is alone."""
    asked = [
        SamplingParams(seed=1, max_tokens=40),
        following(2, n=3, json=PERSON),
        SamplingParams(temperature=0, max_tokens=30),
        following(3, n=2, max_tokens=30, regex="[a-z ]+"),
        following(4, choice=["yes", "no", "maybe so"]),
    ]
    alone = [ask(llm, params) for params in asked]
    together = llm.generate([PROMPT] * len(asked), asked, use_tqdm=False)
    assert [output.outputs for output in together] == alone
    assert len({answer.text for answer in alone[1]}) > 1


def test_preemption(folder, llm):
    asked = [following(seed, n=2, json=PERSON, disable_any_whitespace=True) for seed in range(4)]
    expected = [output.outputs for output in llm.generate([PROMPT] * 4, asked, use_tqdm=False)]
    sizes = SIZES | {"max_model_len": 216}
    with LLM(folder, **sizes, max_num_seqs=8, max_num_batched_tokens=64, num_gpu_blocks_override=27) as small:
        outputs = small.generate([PROMPT] * 4, asked, use_tqdm=False)
        assert small.engine.counts.num_preemptions > 0
    assert [output.outputs for output in outputs] == expected
    for answer in (answer for output in outputs for answer in output.outputs):
        jsonschema.validate(json.loads(answer.text), PERSON)


def test_an_end_only_where_the_grammar_may_end(llm):
    end = llm.get_tokenizer().eos_token_id
    wants = {"logit_bias": {end: 100.0}, "temperature": 0, "max_tokens": 60}
    long = StructuredOutputsParams(regex="a{3,20}")
    (answer,) = ask(llm, SamplingParams(structured_outputs=long, **wants))
    assert answer.token_ids[-1] == end
    assert answer.text.count("a") == len(answer.text) >= 3
    for params in ({"ignore_eos": True}, {"min_tokens": 50}):
        (answer,) = ask(llm, SamplingParams(structured_outputs=long, **wants, **params))
        assert (answer.text, answer.finish_reason, answer.stop_reason) == ("a" * 20, "stop", None)
        assert end not in answer.token_ids


def test_other_restrictions_hold_too(llm):
    tokenizer = llm.get_tokenizer()
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    form = StructuredOutputsParams(regex="[abc]{6}")
    for restriction, expected in (
        ({"allowed_token_ids": [b]}, "bbbbbb"),
        ({"allowed_token_ids": [a, b], "logit_bias": {a: 90.0}}, "aaaaaa"),
        ({"logits_processors": [lambda written, row: torch.full_like(row, 1.0).index_fill(0, torch.tensor([a]), 2.0)]},
         "aaaaaa"),
    ):  # fmt: skip
        (answer,) = ask(llm, SamplingParams(structured_outputs=form, temperature=0, **restriction))
        assert (answer.text, answer.finish_reason) == (expected, "stop")
    if token_ids(tokenizer, "a") == [a]:  # SentencePiece's word begins with a space
        (answer,) = ask(llm, SamplingParams(structured_outputs=form, allowed_token_ids=[a, b], bad_words=["a"]))
        assert answer.text == "bbbbbb"
    penalised = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5, "seed": 3}
    (answer,) = ask(llm, SamplingParams(structured_outputs=form, **penalised))
    assert re.fullmatch("[abc]{6}", answer.text)
    (answer,) = ask(llm, SamplingParams(structured_outputs=form, allowed_token_ids=[llm.engine.vocab_size - 1]))
    assert answer.finish_reason == "error"
    assert "structured_outputs" in answer.stop_reason


def test_stops_and_streams(tiny):
    form = StructuredOutputsParams(regex="[a-z]+(, [a-z]+)*")
    params = SamplingParams(structured_outputs=form, seed=1, max_tokens=60, stop=",")
    (answer,) = ask(tiny, params)
    assert re.fullmatch("[a-z]+", answer.text)
    *_, last = tiny.generate_stream(PROMPT, params)
    assert last.outputs[0] == answer


def test_chosen_logprobs_are_the_models_own(tiny):
    params = following(1, choice=["They said yes.", "Nobody said no."])
    params.logprobs = 2
    (output,) = tiny.generate("Mia asked.", params, use_tqdm=False)
    answer = output.outputs[0]
    reference = AutoModelForCausalLM.from_pretrained(BUNDLED["tiny"], dtype=torch.float32).eval()
    ids = output.prompt_token_ids + answer.token_ids
    expected = reference_logits(reference, [ids])[0].log_softmax(dim=-1)
    for at, found in enumerate(answer.logprobs, start=len(output.prompt_token_ids)):
        assert found[ids[at]].logprob == pytest.approx(float(expected[at - 1, ids[at]]), abs=1e-4)


def test_chat(tiny):
    conversation = [{"role": "user", "content": "Who is it?"}]
    (output,) = tiny.chat(conversation, following(json=Friend, disable_any_whitespace=True), use_tqdm=False)
    Friend.model_validate_json(output.outputs[0].text)


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({}, "one of json, regex, choice, grammar, json_object, not none of them"),
        ({"json_object": False}, "none of them"),
        ({"regex": "a", "choice": ["a"]}, "not regex, choice"),
        ({"json": {}, "json_object": True}, "not json, json_object"),
        ({"regex": 5}, r"structured_outputs\.regex must be a text"),
        ({"choice": []}, "choice is empty"),
        ({"choice": "yes"}, "choice must be a list of texts"),
        ({"choice": ["a", ""]}, "choice must be a list of texts"),
        ({"json": 5}, "pydantic class"),
        ({"structural_tag": "{}"}, "structural_tag is not implemented"),
        ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace is for json"),
        ({"choice": ["a"], "whitespace_pattern": " "}, "whitespace_pattern is for json"),
        ({"json_object": True, "disable_additional_properties": True}, "disable_additional_properties"),
        ({"json": {}, "disable_any_whitespace": True, "whitespace_pattern": " "}, "whitespace_pattern"),
        ({"json": {}, "disable_any_whitespace": "no"}, "True or False"),
    ],
)
def test_forms_that_contradict_themselves(form, told):
    with pytest.raises(InvalidRequestError, match=told):
        StructuredOutputsParams(**form)


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"json": "{"}, "cannot be compiled"),
        ({"json": "[1]"}, "a JSON schema is an object"),
        ({"json": {"type": "nothing"}}, "nothing"),
        ({"json": {"not": {}}}, "not"),
        ({"json": {"type": "string", "format": "surprise"}}, "surprise"),
        ({"json": {"enum": [{1}]}}, "set"),
        ({"json": {"$ref": "http://example.com/schema"}}, "example.com"),
        ({"json": {"$ref": "file:///etc/passwd"}}, "passwd"),
        ({"json": {"type": "integer", "minimum": 2, "maximum": 1}}, "minimum"),
        ({"json": {}, "whitespace_pattern": "("}, "("),
        ({"regex": "(a"}, "unclosed"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "a\ud800"}, "half a character"),
        ({"choice": ["\udc00"]}, "cannot be compiled"),
        ({"grammar": 'begin: "a"'}, "cannot be compiled"),
        ({"grammar": "start: other"}, "other"),
        ({"grammar": "root ::= other"}, "other"),
        ({"grammar": "root ::= " + "(" * 9000 + '"a"' + ")" * 9000}, "recursion"),
        ({"grammar": "start: " + "(" * 9000 + '"a"' + ")" * 9000}, "nested"),
        ({"regex": "a" * (MAX_GRAMMAR_CHARS + 1)}, "at most"),
        ({"json": {"enum": ["a" * MAX_GRAMMAR_CHARS]}}, "at most"),
    ],
)
def test_what_cannot_be_compiled_is_refused_and_the_engine_is_as_it_was(tiny, form, told):
    structured, seeds = StructuredOutputsParams(**form), tiny.engine._seeds.get_state()
    with pytest.raises(InvalidRequestError, match=re.escape(told)):
        tiny.engine.add_request("one", [1, 2], SamplingParams(n=3, structured_outputs=structured))
    assert not tiny.engine.has_unfinished_requests
    assert torch.equal(tiny.engine._seeds.get_state(), seeds)
    with pytest.raises(InvalidRequestError, match=re.escape(told)):
        tiny.generate([PROMPT] * 2, [SamplingParams(), SamplingParams(structured_outputs=structured)], use_tqdm=False)
    (answer,) = ask(tiny, following(choice=["yes"]))
    assert answer.text == "yes"


def test_a_changed_form_is_looked_at_again(tiny):
    params = following(choice=["yes"])
    params.structured_outputs.regex = "a"
    with pytest.raises(InvalidRequestError, match="not regex, choice"):
        ask(tiny, params)
    with pytest.raises(InvalidRequestError, match="must be StructuredOutputsParams"):
        SamplingParams(structured_outputs={"regex": "a"})


def test_chains_as_long_as_can_be(tiny):
    """Parsers that call themselves along them have the stack for it."""
    count = MAX_GRAMMAR_CHARS // 8 - 20
    names = [f"{number:x}".translate(str.maketrans("0123456789", "ghijklmnop")) for number in range(count)]
    rules = "\n".join(f"{a}:{b}" for a, b in zip(["start", *names], names, strict=False))
    grammar = rules + f'\n{names[-1]}:"yes"'
    assert MAX_GRAMMAR_CHARS * 0.9 < len(grammar) <= MAX_GRAMMAR_CHARS
    count = MAX_GRAMMAR_CHARS // 65
    parts = {f"{n}": {"type": "array", "items": {"$ref": f"#/$defs/{n + 1}"}} for n in range(count)}
    chain = {"$ref": "#/$defs/0", "$defs": {**parts, f"{count}": {"type": "integer"}}}
    for form in ({"grammar": grammar}, {"json": chain}):
        (answer,) = ask(tiny, following(max_tokens=8, **form))
        assert answer.text.startswith(("yes", "["))


def test_an_expression_that_nothing_matches_ends_its_own_answer(tiny):
    good = following(choice=["yes"])
    bad, other = tiny.generate([PROMPT] * 2, [following(regex="[a&&b]"), good], use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error"
    assert other.outputs[0].text == "yes"


def test_a_parser_that_gives_up_ends_its_own_answer(tiny):
    hard = r"start: A" + "\nA: /.*[ab].{18}/ & /.*[cd].{17}/ & /.*[ef].{16}/"
    bad, other = tiny.generate([PROMPT] * 2, [following(grammar=hard), following(choice=["yes"])], use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error"
    assert "lexer" in bad.outputs[0].stop_reason
    assert other.outputs[0].text == "yes"


def test_beams_and_engines_without_text(tiny):
    with pytest.raises(TypeError, match="structured_outputs"):
        BeamSearchParams(beam_width=2, max_tokens=2, structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(InvalidRequestError, match="BeamSearchParams"):
        tiny.beam_search(PROMPT, following(regex="a"))
    with LLM("tiny", **SIZES, skip_tokenizer_init=True) as blind, pytest.raises(InvalidRequestError, match="tokenizer"):
        blind.generate([[1, 2]], following(regex="a"), use_tqdm=False)
