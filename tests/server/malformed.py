"""Requests that are none: wrong in every way that an HTTP client could send, and bytes that are not HTTP."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from tests.server.raw import request

COMPLETION = {"prompt": "Once upon a time", "max_tokens": 2, "temperature": 0.5, "n": 1, "stop": ["a"], "seed": 1}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "top_p": 0.5, "logprobs": True}
POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")

NO_NUMBER = ["x", "", [], {}, [1], float("nan"), float("inf"), -float("inf"), -(10**40), "1e400"]
NO_COUNT = [*NO_NUMBER, 0.5, -2, 2**31, 10**30]
NO_TEXT = [1, 0.5, True, [], {}, [[]], [None]]
NO_BOOL = ["x", 2, [], {}, 0.5]
WRONG: dict[str, list[object]] = {
    "max_tokens": NO_COUNT, "n": [*NO_COUNT, 0, 129], "top_k": NO_COUNT, "min_tokens": NO_COUNT,
    "seed": [*NO_NUMBER, 2**63],
    "temperature": [*NO_NUMBER, -1], "top_p": [*NO_NUMBER, 0, 1.1], "min_p": [*NO_NUMBER, 2],
    "presence_penalty": [*NO_NUMBER, 3], "frequency_penalty": [*NO_NUMBER, -3], "repetition_penalty": [*NO_NUMBER, 0],
    "model": [*NO_TEXT, "gpt-4", "\ud800", "a" * 10_000], "user": NO_TEXT, "stream": NO_BOOL, "ignore_eos": NO_BOOL,
    "stream_options": [1, [], {"x": 1}, {"include_usage": True}, {"include_usage": 7}],
    "stop": [1, {}, "", [""], [1], ["a"] * 17, "a" * 1001, ["\ud800"]],
    "logit_bias": [1, [], {"x": 1}, {"-1": 1}, {"99999999": 1}, {"1": "x"}, {"1": None}, {"1": float("inf")},
                   {str(10**30): 1}],
    "stop_token_ids": [1, "x", ["x"], [None], [-1], [10**9], [10**30], [1] * 1025],
    "allowed_token_ids": [1, "x", ["x"], [], [-1], [10**9], [10**30]],
    "bad_words": [1, {}, [""], [1], ["a"] * 257, ["a" * 101], ["\ud800"]],
    "guided_json": [{}], "logits_processors": [["os.system"]],
    "structured_outputs": [1, [], {}, {"regex": "("}, {"regex": "a", "json": {}}, {"choice": []}, {"choice": [1]},
                           {"json": "{"}, {"grammar": "start: x"}, {"x": 1}],
    "response_format": [1, [], {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "text", "json_schema": {}}],
    "return_token_ids": NO_BOOL, "prompt_logprobs": [*NO_COUNT, 21],
}  # fmt: skip
WRONG_COMPLETION: dict[str, list[object]] = {
    "prompt": [None, 1, {}, [], "", [[]], ["a", 1], [1, "a"], [[1, "a"]], [-1], [99999], [10**30], [[1], [-1]],
               ["a", ""],
               "\ud800", ["\udc00"], "a" * 50_000, [1] * 50_000, ["a"] * 2000, [[[1]]], [1.5], [True, None]],
    "logprobs": [*NO_COUNT, 21], "echo": NO_BOOL, "suffix": ["x"], "best_of": [2],
}  # fmt: skip
WRONG_CHAT: dict[str, list[object]] = {
    "messages": [None, 1, "a", {}, [], [1], [{}], [[]], [{"role": "user"}, 1], [{"content": "a"}],
                 [{"role": 1, "content": "a"}],
                 [{"role": "user", "content": 1}], [{"role": "user", "content": [{"type": "image_url"}]}],
                 [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": "\ud800"}],
                 [{"role": "user", "content": "a" * 50_000}], [{"role": "user", "content": "a", "x": 1}]],
    "top_logprobs": [*NO_COUNT, 21], "tools": [1, {}, [1], [{}], [{"type": "function"}]],
    "tool_choice": ["auto"], "chat_template": ["{{ 1 }}"],
    "chat_template_kwargs": [1, [], {"tokenize": True}, {"chat_template": "x"}, {"self": 1}],
    "max_completion_tokens": [*NO_COUNT, 0],
}  # fmt: skip
WRONG_TOKENIZE: dict[str, list[object]] = {
    "prompt": [None, 1, [], {}, "\ud800", "a" * 50_000], "add_special_tokens": NO_BOOL, "return_token_strs": NO_BOOL,
    "model": ["x", 1], "x": [1],
}  # fmt: skip
WRONG_DETOKENIZE: dict[str, list[object]] = {
    "tokens": [None, 1, "a", {}, ["x"], [-1], [99999], [10**30], [[1]], [1.5]], "model": ["x", 1], "x": [1]
}  # fmt: skip
KINDS: list[tuple[str, dict[str, object], dict[str, list[object]]]] = [
    ("/v1/completions", COMPLETION, WRONG | WRONG_COMPLETION),
    ("/v1/chat/completions", CHAT, WRONG | WRONG_CHAT),
    ("/tokenize", {"prompt": "a"}, WRONG_TOKENIZE),
    ("/detokenize", {"tokens": [1]}, WRONG_DETOKENIZE),
]


def _valid(rng: random.Random) -> tuple[str, bytes]:
    path, asked, _ = rng.choice(KINDS)
    return path, json.dumps(asked).encode()


def _wrong_values(rng: random.Random) -> bytes:
    path, asked, wrong = rng.choice(KINDS[:2] if rng.random() < 0.9 else KINDS[2:])
    names = rng.sample(list(wrong), min(len(wrong), rng.choice([1, 1, 1, 2, 4])))
    return request(path, json.dumps(asked | {name: rng.choice(wrong[name]) for name in names}).encode())


def _unknown_field(rng: random.Random) -> bytes:
    path, asked, _ = rng.choice(KINDS)
    name = "".join(chr(rng.choice([rng.randint(1, 127), rng.randint(128, 0xFFFF)])) for _ in range(rng.randint(1, 20)))
    return request(path, json.dumps(asked | {f"_{name}": 1}).encode())


def _cut(rng: random.Random) -> bytes:
    path, body = _valid(rng)
    return request(path, body[: rng.randrange(len(body))])


def _broken_json(rng: random.Random) -> bytes:
    """Bytes overwritten until it is JSON no more."""
    path, body = _valid(rng)
    broken = bytearray(body)
    while True:
        broken[rng.randrange(len(broken))] = rng.randrange(256)
        try:
            json.loads(bytes(broken))
        except ValueError:
            return request(path, bytes(broken))


def _deep(rng: random.Random) -> bytes:
    path, asked, _ = rng.choice(KINDS)
    depth = rng.choice([10, 100, 1000, 100_000])
    nested = rng.choice([("[", "]"), ('{"a":', "}")])
    deep = nested[0] * depth + rng.choice(["1", ""]) + nested[1] * depth * rng.choice([0, 1])
    name = rng.choice(["prompt", "messages", "stop", "logit_bias", "x", "tokens"])
    return request(path, (json.dumps(asked)[:-1] + f', "{name}": {deep}}}').encode())


def _huge_number(rng: random.Random) -> bytes:
    path, asked, _ = rng.choice(KINDS[:2])
    number = rng.choice(
        ["9" * rng.choice([30, 5000]), "-" + "9" * 50, "1e999999", "NaN", "-Infinity", "0x10", "01", "1."]
    )
    name = rng.choice(["n", "seed", "top_p"])
    plain = {key: value for key, value in asked.items() if key != name}
    return request(path, (json.dumps(plain)[:-1] + f', "{name}": {number}}}').encode())


def _no_object(rng: random.Random) -> bytes:
    return request(
        rng.choice(POSTS), rng.choice([b"", b" ", b"null", b"[]", b"1", b'"x"', b"true", b"{}", b"\x00", b"\xff"])
    )


def _wrong_type(rng: random.Random) -> bytes:
    path, body = _valid(rng)
    kinds = ["text/plain", "application/xml", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded",
             "", "x", "application/json2", "application/octet-stream", "/", ";", None]  # fmt: skip
    return request(path, body, content_type=rng.choice(kinds))


def _wrong_method(rng: random.Random) -> bytes:
    path, body = _valid(rng)
    if rng.random() < 0.3:
        return request(rng.choice(["/v1/models", "/health", "/metrics", "/version"]), body, rng.choice(["POST", "PUT"]))
    return request(path, body, rng.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"]))


def _wrong_path(rng: random.Random) -> bytes:
    path, body = _valid(rng)
    broken = rng.choice([f"{path}/", f"/{path}", path.upper(), f"{path}%00", "/v1/models/%ff%fe", "/../etc/passwd",
                         "/v2", "/v1/models/..%2f..", f"{path};x=1", "*", "/" + "a" * 8000, "/%"])  # fmt: skip
    return request(broken, body, "GET" if "models" in broken else "POST")


def _bad_encoding(rng: random.Random) -> bytes:
    path, body = _valid(rng)
    text = rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"])
    at = rng.randrange(1, len(body))
    return request(path, body[:at] + text + body[at:])


MALFORMED: list[Callable[[random.Random], bytes]] = [
    _wrong_values, _wrong_values, _wrong_values, _wrong_values, _unknown_field, _cut, _broken_json, _deep, _huge_number,
    _no_object, _wrong_type, _wrong_method, _wrong_path, _bad_encoding,
]  # fmt: skip


def malformed(rng: random.Random) -> bytes:
    """A request in HTTP that no server should answer."""
    return rng.choice(MALFORMED)(rng)


def junk(rng: random.Random) -> bytes:
    """Bytes that are not HTTP, or hardly."""
    body = json.dumps(COMPLETION | {"n": 0}).encode()
    plain = request("/v1/completions", body)
    kind = rng.randrange(10)
    if kind == 0:
        return rng.randbytes(rng.randint(1, 5000))
    if kind == 1:  # several at once, and then something else
        return plain * rng.randint(2, 5) + rng.randbytes(20)
    if kind == 2:
        broken = bytearray(plain)
        for _ in range(rng.randint(1, 10)):
            broken[rng.randrange(60)] = rng.randrange(256)
        return bytes(broken) if bytes(broken) != plain else b""
    if kind == 3:
        return plain[: rng.randrange(len(plain))]
    if kind == 4:
        return plain.replace(b"host: here", b"x: " + b"a" * rng.choice([100, 70_000, 200_000]))
    name = rng.choice(
        [b"\x00", b"a b", b"a\xff", b"", b":", b"content-length", b"transfer-encoding", b"host", b"expect"]
    )
    value = rng.choice(
        [b"\x00", b"\x7f", b"-1", b"99999999999999999999999", b"5, 6", b"chunked, x", b"\xff\xfe", b"a\nb: c"]
    )
    if kind in (5, 6):
        return plain.replace(b"host: here", b"host: here\r\n" + name + b": " + value)
    if kind == 7:
        return plain.replace(b"HTTP/1.1", rng.choice([b"HTTP/9.9", b"HTTP/1.1 x", b"", b"http/1.1", b"HTTP/2.0"]))
    if kind == 8:
        return plain.replace(b"content-length: %d" % len(body), b"transfer-encoding: chunked") + rng.randbytes(50)
    return (
        b"GET /nowhere HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-key: x\r\n\r\n"
    )
