"""Chat templates: the example's, and those that clients send."""

from __future__ import annotations

import json
import multiprocessing
import tarfile
import threading
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from minillm.models.chat_template import chat_text
from minillm.server import service, template_process
from minillm.server.protocol import MAX_CHAT_TEMPLATE
from tests.helpers import SHARED
from tests.server.conftest import running

EXAMPLE = (Path(__file__).parents[2] / "docs" / "examples" / "template_chatml.jinja").read_text(encoding="utf-8")
QWEN3 = SHARED / "tokenizers" / "qwen3.tar.gz"
USER = [{"role": "user", "content": " Hello\n"}]
CONVERSATION = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "<b>Mia</b> & 'Leo'"},
    {"role": "user", "content": "And {{ 1 + 1 }}?"},
]


def example(messages, **options) -> str:
    return chat_text(PreTrainedTokenizerBase(), messages, chat_template=EXAMPLE, **options)


# --- the example


@pytest.mark.parametrize("messages", [USER, CONVERSATION, CONVERSATION[1:], CONVERSATION[:3]])
@pytest.mark.parametrize("begins", [True, False])
def test_the_example_is_chatml(messages, begins):
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    expected = "".join(turns) + "<|im_start|>assistant\n" * begins
    assert example(messages, add_generation_prompt=begins) == expected


@pytest.mark.skipif(not QWEN3.exists(), reason="no shared/tokenizers beside the checkout")
@pytest.mark.parametrize("messages", [CONVERSATION[:2], CONVERSATION])
def test_the_example_writes_what_qwens_template_writes(tmp_path, messages):
    with tarfile.open(QWEN3) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = {path.parent for path in tmp_path.rglob("tokenizer_config.json")}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert example(messages, add_generation_prompt=True) == expected


@pytest.mark.parametrize("text", ["It is ", "It is", "", "\n\n"])
def test_the_example_goes_on_with_the_last_message(text):
    messages = [*USER, {"role": "assistant", "content": text}]
    found = example(messages, continue_final_message=True)
    assert found == f"<|im_start|>user\n Hello\n<|im_end|>\n<|im_start|>assistant\n{text}"


# --- of clients


@pytest.fixture(scope="module")
def server(llm):
    with running(llm, trust_request_chat_template=True) as server:
        yield server


def tokenize(server, template: str, **asked):
    return server.http.post("/tokenize", json={"messages": USER, "chat_template": template} | asked)


def written(server, template: str, **asked) -> str:
    answer = tokenize(server, template, **asked)
    assert answer.status_code == 200, answer.text
    return server.llm.get_tokenizer().decode(answer.json()["tokens"])


def refusal(server, template: str, **asked) -> str:
    answer = tokenize(server, template, **asked)
    assert answer.status_code == 400, (template, answer.text)
    return answer.json()["error"]["message"]


def test_a_clients_template_is_refused_unless_the_server_trusts_it(llm, server):
    template = "{{ messages[-1].content }}!"
    with running(llm) as careful:
        for path in ("/tokenize", "/v1/chat/completions"):
            answer = careful.http.post(path, json={"messages": USER, "chat_template": template})
            assert answer.status_code == 400
            assert "--trust-request-chat-template" in answer.json()["error"]["message"]
    assert written(server, template) == " Hello\n!"
    chat = server.openai.chat.completions.create(
        model="tiny", messages=USER, max_tokens=1, extra_body={"chat_template": template}
    )
    assert chat.usage.prompt_tokens == tokenize(server, template).json()["count"]


@pytest.mark.parametrize("begins", [True, False])
def test_a_clients_template_sees_what_the_models_own_would(server, begins):
    template = "{{ eos_token }}{{ tools | tojson }}{{ mine }}{% if add_generation_prompt %}go{% endif %}"
    asked = {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "add_generation_prompt": begins,
    }
    expected = server.llm.get_tokenizer().apply_chat_template(
        USER, tokenize=False, chat_template=template, mine="é", **asked
    )
    assert written(server, template, chat_template_kwargs={"mine": "é"}, **asked) == expected


@pytest.mark.parametrize("name", ["chat_template", "conversation", "tools", "tokenize", "continue_final_message"])
def test_variables_are_no_options(server, name):
    assert name in refusal(server, "{{ 1 }}", chat_template_kwargs={name: "x"})


FORBIDDEN = [
    "{% include 'secret.txt' %}",
    "{% import 'secret.txt' as secret %}{{ secret }}",
    "{% extends 'secret.txt' %}",
    "{{ open('secret.txt').read() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ messages|attr('__class__')|attr('__base__')|attr('__subclasses__')() }}",
    "{{ cycler.__init__.__globals__.os.popen('cat secret.txt').read() }}",
    "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__.json }}",
    "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.x() }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{0.__class__.__mro__}'.format_map({'0': messages}) }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f(messages) }}",
    "{{ ['{0.__class__.__mro__}'] | map('format', messages) | list }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ namespace(__class__=1) }}",
    "{{ lipsum.__globals__['os'] }}",
    "{% for x in %}",
    "{{ raise_exception('no') }}",
]


@pytest.mark.parametrize("template", FORBIDDEN)
def test_a_clients_template_reaches_nothing(server, template, tmp_path, monkeypatch):
    (tmp_path / "secret.txt").write_text("the secret")
    monkeypatch.chdir(tmp_path)
    answer = tokenize(server, template)
    text = answer.text
    if answer.status_code == 200:
        text = server.llm.get_tokenizer().decode(answer.json()["tokens"])
    else:
        assert answer.status_code == 400
    assert "the secret" not in text
    assert "<class" not in text


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 10 ** (10 ** 9) }}",
]


@pytest.mark.parametrize("template", ENDLESS)
def test_a_clients_template_has_an_end(server, template, monkeypatch):
    monkeypatch.setattr(template_process, "TEMPLATE_SECONDS", 0.5)
    assert "was stopped" in refusal(server, template)
    assert multiprocessing.active_children() == []
    assert server.http.get("/health").status_code == 200


GREEDY_FOR_MEMORY = [
    "{{ 'a' * 10 ** 11 }}",
    "{{ '%0999999999999d' % 1 }}",
    "{{ 'a' | center(10 ** 11) }}",
    "{% for a in range(99999) %}{{ 'a' * 10 ** 6 }}{% endfor %}",
    "{{ 'a' * 2 ** 26 }}",
    "{{ range(10 ** 9) | list }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ " + "(" * 9999 + ")" * 9999 + " }}",
    "{{ raise_exception('a' * 10 ** 8) }}",
]


@pytest.mark.parametrize("template", GREEDY_FOR_MEMORY)
def test_a_clients_template_has_little_memory(server, template):
    assert len(refusal(server, template)) < 2 * template_process.MAX_ERROR_LETTERS
    assert server.http.get("/health").status_code == 200


def test_other_bounds(server, monkeypatch):
    assert "chat_template" in refusal(server, "a" * (MAX_CHAT_TEMPLATE + 1))
    nested: list = []
    for _ in range(900):
        nested = [nested]
    assert "nested too deeply" in refusal(server, "{{ 1 }}", chat_template_kwargs={"nested": nested})
    monkeypatch.setattr(template_process, "_seats", threading.Semaphore(0))
    answer = tokenize(server, "{{ 1 }}")
    assert answer.status_code == 429
    assert "retry-after" in answer.headers


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": json.dumps({"a": "x" * 10**6})}}
LONG_WRITTEN = {
    "the template": {"chat_template": "{% for a in range(99) %}{{ 'a' * 10 ** 5 }}{% endfor %}"},
    "tools": {
        "chat_template": "{{ tools | tojson }}",
        "tools": [{"type": "function", "function": {"name": "f", "description": "x" * 10**6}}],
    },
    "variables": {"chat_template": "{{ mine }}", "chat_template_kwargs": {"mine": "x" * 10**6}},
    "calls": {
        "chat_template": "{{ messages[-1].tool_calls | tojson }}",
        "messages": [*USER, {"role": "assistant", "tool_calls": [CALL]}],
    },
}


@pytest.mark.parametrize("what", LONG_WRITTEN)
@pytest.mark.parametrize("whose", ["the client's", "the server's"])
def test_what_a_template_writes_is_not_tokenized_where_it_cannot_fit(llm, monkeypatch, what, whose):
    tokenized = []
    monkeypatch.setattr(service, "token_ids", lambda tokenizer, text: tokenized.append(text))
    asked = {"messages": USER} | LONG_WRITTEN[what]
    options = {"trust_request_chat_template": True}
    if whose == "the server's":
        options = {"chat_template": asked.pop("chat_template")}
    with running(llm, **options) as server:
        answer = server.http.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert tokenized == []
