"""GLM-4's tokenizer in its remote-code form: the same ids as tiktoken's, and none of the repository's code run."""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.errors import TokenizerError
from minillm.models.tokenizer import get_tokenizer
from minillm.tokenizers.building import DIGITS_BY_THREE
from minillm.tokenizers.tiktoken import GLM4_SPECIAL, glm4_tokenizer, is_tiktoken, read_ranks, write_ranks
from tests.tokenizers.test_gguf_tokenizer import FRAGMENTS, TEXT

many = settings(max_examples=500, deadline=None, derandomize=True, database=None)
PUBLISHED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""In tokenization_chatglm.py of the published repositories."""


def trained_ranks(num_merges: int = 300) -> dict[bytes, int]:
    """The 256 bytes, the most frequent pairs one after the other, and two pieces that no merge reaches."""
    draw = random.Random(0)
    words = Counter(tuple(bytes([byte]) for byte in "".join(draw.choices(FRAGMENTS, k=3)).encode()) for _ in range(600))
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < 256 + num_merges:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.setdefault(left + right, len(ranks))
        words = Counter({merged(word, left, right): count for word, count in words.items()})
    return ranks | {b"zebra": len(ranks), "，斑马".encode(): len(ranks) + 1}


def merged(word: tuple[bytes, ...], left: bytes, right: bytes) -> tuple[bytes, ...]:
    out: list[bytes] = []
    for piece in word:
        if out and out[-1] == left and piece == right:
            out[-1] = left + right
        else:
            out.append(piece)
    return tuple(out)


RANKS = trained_ranks()
TIKTOKEN = tiktoken.Encoding(
    "glm4",
    pat_str=PUBLISHED,
    mergeable_ranks=RANKS,
    special_tokens={token: len(RANKS) + number for number, token in enumerate(GLM4_SPECIAL)},
)
PREFIX = [TIKTOKEN.encode_single_token(token) for token in ("[gMASK]", "<sop>")]


def write(folder: Path, ranks: dict[bytes, int] = RANKS, config: dict[str, Any] | None = None) -> Path:
    """The folder as published: the pieces, the code that reads them, and where that code is."""
    folder.mkdir(exist_ok=True)
    write_ranks(folder / "tokenizer.model", ranks)
    said = {"auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(said | (config or {})))
    (folder / "tokenization_chatglm.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('executed').touch()\nclass ChatGLM4Tokenizer: ...\n"
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "chatglm"}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("glm4"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return get_tokenizer(folder)


def test_the_published_pattern():
    assert DIGITS_BY_THREE == PUBLISHED


def test_no_code_of_the_repository_runs(folder, tokenizer):
    assert tokenizer("x")["input_ids"]
    assert not (folder / "executed").exists()


@many
@given(
    text=TEXT | st.lists(st.sampled_from(["zebra", " zebra", "，斑马", "zebras", *FRAGMENTS]), max_size=8).map("".join)
)
def test_the_same_ids_as_tiktokens(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == PREFIX + TIKTOKEN.encode_ordinary(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[2:]


@many
@given(ids=st.lists(st.integers(0, len(RANKS) - 1), max_size=12))
def test_any_ids_decode_to_the_same_text(tokenizer, ids):
    assert tokenizer.decode(ids) == TIKTOKEN.decode(ids)


def test_whole_words_come_before_merges(tokenizer):
    assert TIKTOKEN.encode_ordinary("zebra") == [RANKS[b"zebra"]]
    assert tokenizer("zebra", add_special_tokens=False)["input_ids"] == [RANKS[b"zebra"]]


def test_special_tokens_follow_the_pieces(tokenizer):
    for number, token in enumerate(GLM4_SPECIAL):
        assert tokenizer.convert_tokens_to_ids(token) == len(RANKS) + number
        assert tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"] == (
            TIKTOKEN.encode(f"a{token}b", allowed_special="all")
        )
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert len(tokenizer) == len(RANKS) + len(GLM4_SPECIAL)


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "你好"}]
    text = "[gMASK]<sop><|user|>\n你好<|assistant|>"
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == TIKTOKEN.encode(text, allowed_special="all")
    assert ids[:2] == PREFIX
    assert PREFIX[0] not in ids[2:]
    longer = [
        {"role": "system", "content": "Be brief."},
        *messages,
        {"role": "assistant", "metadata": "", "content": "你好！"},
    ]
    assert tokenizer.apply_chat_template(longer, tokenize=False) == (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\n你好<|assistant|>\n你好！"
    )


def test_the_configs_own_special_tokens_and_template(tmp_path):
    tokens = ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|mine|>"]
    added = {str(len(RANKS) + number): {"content": token, "special": True} for number, token in enumerate(tokens)}
    config = {"added_tokens_decoder": added, "chat_template": "{{ messages[0]['content'] }}<|mine|>"}
    tokenizer = get_tokenizer(write(tmp_path, config=config))
    assert [tokenizer.convert_tokens_to_ids(token) for token in tokens] == [int(number) for number in added]
    assert tokenizer("a<|mine|>")["input_ids"] == [len(RANKS) + 1, len(RANKS) + 2, ord("a"), len(RANKS) + 4]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a<|mine|>"


def test_without_a_config(tmp_path):
    folder = write(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    assert glm4_tokenizer(folder)("a")["input_ids"] == [*PREFIX, ord("a")]


@pytest.mark.parametrize("line", ["not-base64! 7", "YWI=", "YWI= x", "YWI= 7 8", "YWI= -7.5"])
def test_bad_lines_are_numbered(line, tmp_path):
    write(tmp_path)
    lines = (tmp_path / "tokenizer.model").read_text().splitlines()
    lines[41] = line
    (tmp_path / "tokenizer.model").write_text("\n".join(lines))
    with pytest.raises(TokenizerError, match=r"tokenizer\.model, line 42: not a base64 piece and its rank"):
        get_tokenizer(tmp_path)


def without(ranks: dict[bytes, int], *pieces: bytes) -> dict[bytes, int]:
    return {piece: rank for piece, rank in ranks.items() if piece not in pieces}


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [
        (dict(list(RANKS.items())[:100]), "lacks 156 of the 256 single bytes: truncated"),
        (without(RANKS, b"a", b"b"), "lacks 2 of the 256 single bytes"),
        (without(RANKS, list(RANKS)[300]), "ranks are not 0 to 556, each once"),
        (RANKS | {list(RANKS)[300]: 299}, "ranks are not 0 to 557, each once"),
    ],
)
def test_incomplete_files(ranks, sentence, tmp_path):
    with pytest.raises(TokenizerError, match=sentence):
        get_tokenizer(write(tmp_path, ranks))


def test_a_repeated_piece(tmp_path):
    write(tmp_path)
    with (tmp_path / "tokenizer.model").open("a") as file:
        file.write(f"{base64.b64encode(b'a').decode()} {len(RANKS)}\n")
    with pytest.raises(TokenizerError, match="ranks are not"):
        get_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"added_tokens_decoder": {"7": {"content": "[gMASK]"}}}, r"special tokens the ids \[7\]; after 558 pieces"),
        ({"added_tokens_decoder": {"x": {"content": "[gMASK]"}}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"558": "[gMASK]"}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"558": {"content": "<|user|>"}}}, r"no \[gMASK\], <sop>, <\|endoftext\|>"),
        ([], "does not hold an object"),
    ],
)
def test_bad_configs(config, sentence, tmp_path):
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match=sentence):
        get_tokenizer(tmp_path)


def test_config_that_is_not_json(tmp_path):
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match="is not JSON"):
        get_tokenizer(tmp_path)


def test_a_sentencepiece_model_is_not_taken_for_one(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n")
    assert not is_tiktoken(path)
    path.write_bytes(b"")
    assert not is_tiktoken(path)
    write(tmp_path)
    assert is_tiktoken(path)
    assert read_ranks(path) == RANKS
