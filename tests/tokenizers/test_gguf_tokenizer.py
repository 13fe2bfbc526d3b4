"""Tokenizers from GGUF headers against llama.cpp's vectors, the original tokenizer.json files, and SentencePiece."""

from __future__ import annotations

import io
import json
import random
import tarfile
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minillm.errors import TokenizerError
from minillm.models.gguf import metadata
from minillm.models.source import cache_folder
from minillm.tokenizers.gguf import SPACE, TokenType, gguf_tokenizer
from tests.helpers import SHARED

VECTORS = SHARED / "tokenizers" / "vectors"
SMOLLM2 = cache_folder() / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf"
needs_shared = pytest.mark.skipif(not VECTORS.exists(), reason="no shared/tokenizers beside the checkout")
many = settings(max_examples=300, deadline=None, derandomize=True, database=None)

FRAGMENTS = (
    *("'s", "don't", "I'LL", "hello", " world", "HELLO", "über", "_x", "::", "https://", "...", "?)", "<tool>", "@@"),
    *("1", "42", "1234567", " 90", "½", "٣", " ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", SPACE),
    *(
        "你好",
        "，世界",
        "中",
        "😀",
        "👩‍👩‍👧",
        "é",
        "e\u0301",
        "Ω",
        "д",
        "ß",
        "العربية",
        "हिन्दी",
        "한국어",
        "ไทย",
        "<0x0A>",
    ),
)
TEXT = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=12).map("".join)
"""What tokenizers stumble over: contractions, runs of digits and of spaces, scripts, emoji, and any text at all."""


# Byte pairs: GPT-2, Qwen2, SmolLM2, Llama 3, GLM-4.


def read_published(name: str) -> tuple[Tokenizer, dict[str, Any]]:
    """A tokenizer.json: as the library reads it, and as it is."""
    if name == "gpt-2":
        text = (SHARED / "tokenizers" / "gpt2" / "tokenizer.json").read_text("utf-8")
    else:
        with tarfile.open(SHARED / "tokenizers" / "qwen3.tar.gz") as packed:
            text = packed.extractfile("qwen3/tokenizer.json").read().decode()
    return Tokenizer.from_str(text), json.loads(text)


def as_header(published: dict[str, Any], pre: str) -> dict[str, Any]:
    """A tokenizer.json's parts under GGUF's keys, as llama.cpp's converter writes them."""
    added = {token["id"]: token for token in published["added_tokens"]}
    ids = published["model"]["vocab"] | {token["content"]: number for number, token in added.items()}
    tokens = sorted(ids, key=ids.get)
    kinds = {True: TokenType.CONTROL, False: TokenType.USER_DEFINED}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in published["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            kinds[added[number]["special"]] if number in added else TokenType.NORMAL for number in range(len(tokens))
        ],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": ids["<|endoftext|>"],
    }


@pytest.fixture(scope="module", params=["gpt-2", "qwen2"])
def published(request):
    """A name, the original tokenizer, and ours from a header made of its parts."""
    original, parts = read_published(request.param)
    return request.param, original, gguf_tokenizer(as_header(parts, request.param))


@needs_shared
def test_llama_cpps_vectors(published, report):
    name, original, ours = published
    compared = check_vectors(name, ours)
    for text, _ in read_vectors(name):
        assert original.encode(text, add_special_tokens=False).ids == ours(text)["input_ids"]
    report("llama.cpp's tokenizer vectors", f"{name:12} {compared} strings equal")


@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm"])
def test_llama_cpps_vectors_over_its_own_headers(name, report):
    path = VECTORS / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"no {path.name} in shared/tokenizers/vectors (llama.cpp's repository has it under models/)")
    compared = check_vectors(name, gguf_tokenizer(metadata(path)))
    report("llama.cpp's tokenizer vectors", f"{name:12} {compared} strings equal")


def read_vectors(name: str) -> list[tuple[str, list[int]]]:
    base = VECTORS / f"ggml-vocab-{name}.gguf"
    texts = base.with_suffix(".gguf.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = base.with_suffix(".gguf.out").read_text("utf-8").split("\n")
    return [(text, [int(number) for number in line.split()]) for text, line in zip(texts, lines, strict=True)]


def check_vectors(name: str, tokenizer: PreTrainedTokenizerFast) -> int:
    vectors = read_vectors(name)
    for text, ids in vectors:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, repr(text)
    return len(vectors)


@needs_shared
@many
@given(text=TEXT, special=st.sampled_from(["", "<|endoftext|>", "<think>", "<|im_end|>"]), after=TEXT)
def test_the_same_ids_and_text_as_the_original(published, text, special, after):
    _, original, ours = published
    text = text + special + after
    expected = original.encode(text, add_special_tokens=False).ids
    assert ours(text)["input_ids"] == expected
    assert ours.decode(expected) == original.decode(expected, skip_special_tokens=False)


def letters() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def small_header(pre: str, merges: tuple[str, ...] = (), whole: tuple[str, ...] = ()) -> dict[str, Any]:
    """A vocabulary of the 256 bytes, these merges, and pieces that no merge reaches."""
    tokens = [*letters(), *(merge.replace(" ", "") for merge in merges), *whole, "<s>", "</s>", "<think>"]
    kinds = [TokenType.NORMAL] * (len(tokens) - 3) + [TokenType.CONTROL] * 2 + [TokenType.USER_DEFINED]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
    }


MERGES = ("1 2", "12 3", "4 5", "45 6", "h e", "l l", "he ll", "hell o", "Ġ hello", "Ġ Ġ", "Ġ 1")


@many
@given(text=TEXT | st.text(alphabet="0123456 hello", max_size=20))
def test_smollm_splits_digits_then_words(text):
    header = small_header("smollm", MERGES)
    vocab = {token: number for number, token in enumerate(header["tokenizer.ggml.tokens"])}
    expected = Tokenizer(models.BPE(vocab, [tuple(merge.split()) for merge in MERGES]))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    expected.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    expected.decoder = decoders.ByteLevel()
    expected.add_tokens(["<s>", "</s>", "<think>"])
    tokenizer = gguf_tokenizer(header)
    ids = tokenizer(text)["input_ids"]
    assert ids == expected.encode(text).ids
    assert tokenizer.decode(ids) == text


@pytest.mark.skipif(not SMOLLM2.exists(), reason="SmolLM2 is not in minillm's cache (minillm pull smollm2-135m)")
def test_smollm2s_own_header():
    tokenizer = gguf_tokenizer(metadata(SMOLLM2))
    text = "In 2024, 1,234,567 people saw 9 stars."
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert [token for token in tokens if any(letter.isdigit() for letter in token)] == list("202412345679")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert prompt == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["I", "Ġhave", "Ġ1234567", "'ll", "ĊĊĠĠ", "Ġx"]),
        ("smollm", ["I", "Ġhave", "Ġ", *"1234567", "'ll", "ĊĊĠĠ", "Ġx"]),
        ("qwen2", ["I", "Ġhave", "Ġ", *"1234567", "'ll", "ĊĊ", "ĠĠ", "Ġx"]),
        ("deepseek-r1-qwen", ["I", "Ġhave", "Ġ", *"1234567", "'ll", "ĊĊ", "ĠĠ", "Ġx"]),
        ("llama-bpe", ["I", "Ġhave", "Ġ", "123", "456", "7", "'ll", "ĊĊ", "ĠĠ", "Ġx"]),
        ("glm4", ["I", "Ġhave", "Ġ", "123", "456", "7", "'ll", "ĊĊ", "ĠĠ", "Ġx"]),
        ("chatglm-bpe", ["I", "Ġhave", "Ġ", "123", "456", "7", "'ll", "ĊĊ", "ĠĠ", "Ġx"]),
    ],
)
def test_words(pre, words):
    backend = gguf_tokenizer(small_header(pre)).backend_tokenizer
    assert [word for word, _ in backend.pre_tokenizer.pre_tokenize_str("I have 1234567'll\n\n   x")] == words


@pytest.mark.parametrize(
    ("pre", "whole", "bos"),
    [("llama-bpe", True, True), ("glm4", True, False), ("gpt-2", False, False), ("qwen2", False, False)],
)
def test_whole_words_and_beginnings(pre, whole, bos):
    header = small_header(pre, MERGES, whole=("zebra",))
    tokenizer = gguf_tokenizer(header)
    assert tokenizer.tokenize("zebra") == (["zebra"] if whole else list("zebra"))
    assert tokenizer.tokenize(" hello") == ["Ġhello"]
    assert (tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id) is bos
    for said in (True, False):
        ids = gguf_tokenizer(header | {"tokenizer.ggml.add_bos_token": said})("x")["input_ids"]
        assert (ids[0] == tokenizer.bos_token_id) is said
    both = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert gguf_tokenizer(header | both).decode(gguf_tokenizer(header | both)("x<think>y")["input_ids"]) == (
        "<s>x<think>y</s>"
    )


def test_a_beginning_that_is_no_control_token():
    header = small_header("gpt-2") | {"tokenizer.ggml.add_bos_token": True}
    header["tokenizer.ggml.token_type"] = [TokenType.NORMAL] * len(header["tokenizer.ggml.tokens"])
    tokenizer = gguf_tokenizer(header)
    assert tokenizer("x")["input_ids"] == [tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("x")]


def test_ids_outside_the_vocabulary_are_passed_over():
    tokenizer = gguf_tokenizer(small_header("gpt-2") | {"tokenizer.ggml.padding_token_id": 2**32 - 1})
    assert tokenizer.pad_token is None


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer.ggml.merges": ["h ello"]},
        {"tokenizer.ggml.merges": ["he"]},
        {"tokenizer.ggml.token_type": [1, 2]},
        {"tokenizer.ggml.tokens": "abc"},
    ],
)
def test_headers_that_contradict_themselves(change):
    with pytest.raises(TokenizerError, match="contradicts itself"):
        gguf_tokenizer(small_header("gpt-2", MERGES) | change)


# SentencePiece: Llama 2, Gemma.

USER_DEFINED = ("<tool>", "@@", SPACE * 3)


def train(prefix: bool, user_defined: tuple[str, ...] = ()) -> sentencepiece.SentencePieceProcessor:
    """A small byte-pair model of a made-up language."""
    draw = random.Random(0)
    syllables = [a + b for a in "bdhklmnst" for b in ("a", "e", "i", "o", "ee")] + ["你", "好", "世界", "é", "12"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(300)]
    lines = [draw.choice([" ", " ", "  "]).join(draw.choices(words, k=9)) for _ in range(800)]
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=file,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=list(user_defined),
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())


def kind_of(model: sentencepiece.SentencePieceProcessor, number: int) -> TokenType:
    if model.id_to_piece(number) in USER_DEFINED:
        return TokenType.USER_DEFINED
    kinds = {
        TokenType.UNKNOWN: model.is_unknown,
        TokenType.CONTROL: model.is_control,
        TokenType.BYTE: model.is_byte,
        TokenType.UNUSED: model.is_unused,
    }
    return next((kind for kind, holds in kinds.items() if holds(number)), TokenType.NORMAL)


def spm_header(model: sentencepiece.SentencePieceProcessor, prefix: bool, **more: Any) -> dict[str, Any]:
    ids = range(model.get_piece_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(number) for number in ids],
        "tokenizer.ggml.scores": [model.get_score(number) for number in ids],
        "tokenizer.ggml.token_type": [kind_of(model, number) for number in ids],
        "tokenizer.ggml.add_space_prefix": prefix,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no prefix"])
def spm(request):
    """Whether a space is put before the text, SentencePiece's model, and our tokenizer without beginnings."""
    model = train(request.param)
    return request.param, model, gguf_tokenizer(spm_header(model, request.param, add_bos_token=False))


@many
@given(text=TEXT | st.text(alphabet="bdhaeio 你好\n", max_size=30))
def test_the_same_ids_and_text_as_sentencepiece(spm, text):
    _, model, ours = spm
    ids = ours(text)["input_ids"]
    assert ids == model.encode(text)
    assert ours.decode(ids) == model.decode(ids)


@many
@given(parts=st.lists(TEXT, min_size=2, max_size=3))
def test_control_tokens_inside_text_start_it_anew(spm, parts):
    _, model, ours = spm
    expected = [number for part in parts for number in [*model.encode(part), model.eos_id()]]
    assert ours("".join(part + "</s>" for part in parts))["input_ids"] == expected


def test_users_tokens_inside_text():
    model = train(False, USER_DEFINED)
    ours = gguf_tokenizer(spm_header(model, False, add_bos_token=False))
    for text in ("<tool>bada @@deko", "a   b    c", "   ", "@@@", "x<tool><tool>y", "   <tool>   你好"):
        ids = ours(text)["input_ids"]
        assert ids == model.encode(text)
        assert ours.decode(ids) == ours.decode(ids, skip_special_tokens=True) == model.decode(ids) == text


@pytest.mark.parametrize(
    ("said", "added"), [({}, True), ({"add_bos_token": True}, True), ({"add_bos_token": False}, False)]
)
def test_beginnings(said, added):
    model = train(True)
    tokenizer = gguf_tokenizer(spm_header(model, True, **said))
    ids = model.encode("bada deko")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer("bada deko")["input_ids"] == ([1, *ids] if added else ids)
    assert tokenizer.decode([1, *ids], skip_special_tokens=True) == "bada deko"
    with_end = gguf_tokenizer(spm_header(model, True, add_eos_token=True, **said))
    assert with_end("bada deko")["input_ids"][-1] == 2


def test_bytes_and_control_tokens_are_not_merged_from_text():
    """SentencePiece never joins letters to what is no ordinary piece."""
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "<", "s", ">", "<s", "0", "x", "A", "<0", "<0x", "<0x0", "<0x0A"]
    kinds = [2, 3, 3, 6] + [1] * 11
    header = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 4 + [-float(number) for number in range(11)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert gguf_tokenizer(header).tokenize("<0x0A>") == ["<0x0A", ">"]
    assert gguf_tokenizer(header)("\n")["input_ids"] == [3]
