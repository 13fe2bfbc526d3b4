"""One door to every tokenizer: model folders in their published forms, what ends an answer, and what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer, pre_tokenizers

from minillm.errors import ConfigError, ModelNotFoundError, TokenizerError
from minillm.models.tokenizer import get_tokenizer, stop_token_ids
from minillm.tokenizers.building import add_tokens, byte_level_bpe
from minillm.tokenizers.gguf import TokenType
from tests.helpers import SHARED
from tests.tokenizers.test_gguf_tokenizer import TEXT, small_header

OPT = SHARED / "tokenizers" / "opt"
GPT2 = SHARED / "tokenizers" / "gpt2"
needs_shared = pytest.mark.skipif(not OPT.exists(), reason="no shared/tokenizers beside the checkout")
TEMPLATE = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"


def write_json(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
    return folder


def token(content: str) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "__type": "AddedToken"}
    return {"content": content, **plain}


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    """The tokenizer's files as facebook/opt-125m publishes them."""
    folder = tmp_path_factory.mktemp("opt")
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(OPT / file, folder / file)
    special = {f"{role}_token": token("</s>") for role in ("bos", "eos", "unk")} | {"pad_token": token("<pad>")}
    config = {"errors": "replace", "add_prefix_space": False, "add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"}
    write_json(
        folder,
        tokenizer_config=special | config,
        special_tokens_map=special,
        config={"model_type": "opt", "architectures": ["OPTForCausalLM"], "bos_token_id": 2, "eos_token_id": 2},
    )
    return folder


@needs_shared
def test_opts_vocab_and_merges(opt):
    tokenizer = get_tokenizer(opt)
    assert tokenizer("Hello, my name is")["input_ids"] == [2, 31414, 6, 127, 766, 16]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2, 1)
    assert tokenizer.decode([2, 31414, 6, 127], skip_special_tokens=True) == "Hello, my"
    assert tokenizer("a", add_special_tokens=False)["input_ids"] == [102]
    assert stop_token_ids(opt, tokenizer) == {2}


@pytest.fixture(scope="module")
def opt_tokenizer(opt):
    return get_tokenizer(opt)


@needs_shared
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(text=TEXT)
def test_opt_returns_every_text(opt_tokenizer, text):
    ids = opt_tokenizer(text)["input_ids"]
    assert ids[0] == 2
    assert opt_tokenizer.decode(ids[1:]) == text


@needs_shared
def test_tokenizer_json_as_published():
    tokenizer = get_tokenizer(GPT2)
    original = Tokenizer.from_file(str(GPT2 / "tokenizer.json"))
    for text in ("Hello, my name is", "  a\n\n b ", "你好 😀", "<|endoftext|>", "can 't . stop , !"):
        ids = tokenizer(text)["input_ids"]
        assert ids == original.encode(text).ids
        assert tokenizer.decode(ids) == text


def byte_level(folder: Path) -> Path:
    """A tokenizer.json of the 256 bytes and two special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = byte_level_bpe({letter: number for number, letter in enumerate(letters)}, [], "gpt-2")
    add_tokens(tokenizer, ["<|end|>", "<|stop|>"], special=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return write_json(
        folder,
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|end|>",
            "chat_template": TEMPLATE,
            "auto_map": {"AutoTokenizer": [None, "tokenization_mine.Mine"]},
        },
    )


def test_folder_with_its_own_code(tmp_path):
    code = "from pathlib import Path\nPath(__file__).with_name('executed').touch()\nclass Mine: ...\n"
    (byte_level(tmp_path) / "tokenization_mine.py").write_text(code)
    tokenizer = get_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer("Hi 你好")["input_ids"]) == "Hi 你好"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<|user|>Hi"
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {256}),
        ({"config": {"eos_token_id": 257}}, {256, 257}),
        ({"generation_config": {"eos_token_id": [257, 5]}}, {256, 257, 5}),
        ({"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": 257}}, {256, 257, 7}),
        ({"config": {"eos_token_id": None}, "generation_config": {}}, {256}),
    ],
)
def test_stop_tokens_of_a_folder(files, expected, tmp_path):
    write_json(byte_level(tmp_path), **files)
    assert stop_token_ids(tmp_path, get_tokenizer(tmp_path)) == expected


@pytest.mark.parametrize(("text", "sentence"), [("{", "is not JSON"), ("[]", "does not hold an object")])
def test_stop_tokens_of_a_broken_config(text, sentence, tmp_path):
    tokenizer = get_tokenizer(byte_level(tmp_path))
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        stop_token_ids(tmp_path, tokenizer)


def write_gguf(path: Path, also: tuple[str, ...] = (), **more: int) -> Path:
    """A header of the 256 bytes, "ab", <s>, </s> and <think>; `also` is control tokens, `more` their roles."""
    header = small_header("gpt-2", ("a b",))
    header["tokenizer.ggml.tokens"] += also
    header["tokenizer.ggml.token_type"] += [TokenType.CONTROL] * len(also)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in header.items():
        kinds = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}
        kinds[type(value)](key, [*map(int, value)] if key.endswith("token_type") else value)
    for key, value in more.items():
        writer.add_uint32(f"tokenizer.ggml.{key}", value)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", eot_token_id=5, eom_token_id=6)
    tokenizer = get_tokenizer(path)
    assert tokenizer.tokenize("ab<think>") == ["ab", "<think>"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<|user|>Hi"
    assert stop_token_ids(path, tokenizer) == {tokenizer.eos_token_id, 5, 6}
    plain = write_gguf(tmp_path / "plain.gguf")
    assert stop_token_ids(plain, get_tokenizer(plain)) == {tokenizer.eos_token_id}


@pytest.mark.parametrize("end", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>"])
def test_ends_of_a_turn_that_a_gguf_does_not_name(end, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", also=(end,))
    tokenizer = get_tokenizer(path)
    assert stop_token_ids(path, tokenizer) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}


def test_no_tokenizer(tmp_path):
    write_json(tmp_path, config={"model_type": "llama"})
    with pytest.raises(TokenizerError, match=r"no tokenizer \(tokenizer\.json, tokenizer\.model or vocab\.json\)"):
        get_tokenizer(tmp_path)
    with pytest.raises(ModelNotFoundError):
        get_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"type": "BPE", "vocab": 3}}', "\0\1\2"])
def test_broken_tokenizer_json(text, tmp_path):
    (byte_level(tmp_path) / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"the tokenizer in .* cannot be read: .+"):
        get_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "tokenizer_config.json"])
@needs_shared
def test_broken_vocab_and_merges(file, opt, tmp_path):
    for source in opt.iterdir():
        shutil.copy(source, tmp_path / source.name)
    (tmp_path / file).write_text("{ broken")
    with pytest.raises(TokenizerError, match=r"the tokenizer in .* cannot be read: .+"):
        get_tokenizer(tmp_path)


def test_broken_sentencepiece_model(tmp_path):
    write_json(tmp_path, config={"model_type": "llama"}, tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15 truncated")
    with pytest.raises(TokenizerError, match=r"cannot be read: .+ pip install sentencepiece protobuf"):
        get_tokenizer(tmp_path)
