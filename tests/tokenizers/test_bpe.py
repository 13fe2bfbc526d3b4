"""Byte-pair encoding from scratch: the same merges, ids and texts as the `tokenizers` library, and GPT-2's vectors."""

from __future__ import annotations

import json
import pickle
import random
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minillm.errors import InvalidRequestError, TokenizerError
from minillm.tokenizers import bpe
from minillm.tokenizers.bpe import (
    GPT2_PATTERN,
    LONG_WORD,
    WORDS_AND_HAN,
    BytePairTokenizer,
    byte_letters,
    cut,
    encode_long_word,
    encode_word,
    learn_merges,
    merge_pair,
    pair_counts,
    to_letters,
)
from tests.helpers import SHARED
from tests.tokenizers.test_gguf_tokenizer import FRAGMENTS, VECTORS, read_vectors

GPT2 = SHARED / "tokenizers" / "gpt2" / "tokenizer.json"
CORPORA = SHARED / "text"
PATTERNS = {"gpt-2": GPT2_PATTERN, "words and han": WORDS_AND_HAN}
SPECIAL = ["<pad>", "<s>", "</s>", "<s>>"]
needs_gpt2 = pytest.mark.skipif(not GPT2.exists(), reason="no shared/tokenizers beside the checkout")
needs_vectors = pytest.mark.skipif(not VECTORS.exists(), reason="no shared/tokenizers beside the checkout")
many = settings(max_examples=300, deadline=None, derandomize=True, database=None)
some = settings(max_examples=60, deadline=None, derandomize=True, database=None)

OLD_CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])
"""Known to Python's Unicode: on newer ones `regex` and the library's expressions may know different versions."""
TEXT = st.lists(st.sampled_from(FRAGMENTS) | st.text(OLD_CHARACTERS, max_size=4), max_size=12).map("".join)
WITH_SPECIAL = st.lists(TEXT | st.sampled_from([*SPECIAL, "<s", ">"]), max_size=6).map("".join)


def sample_texts() -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(FRAGMENTS, k=6)) for _ in range(500)]


def trained_by_the_library(texts: list[str], vocab_size: int, special: list[str], pattern: str) -> dict[str, Any]:
    """The model part of its tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = library_words(pattern)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())["model"]


def library_words(pattern: str) -> pre_tokenizers.PreTokenizer:
    if pattern == GPT2_PATTERN:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def assert_trained_equal(texts: list[str], vocab_size: int, special: list[str], pattern: str) -> int:
    ours = BytePairTokenizer.train(texts, vocab_size, special_tokens=special, pattern=pattern)
    theirs = trained_by_the_library(texts, vocab_size, special, pattern)
    assert ours.merges == [tuple(merge) for merge in theirs["merges"]]
    assert ours.vocab == theirs["vocab"]
    return len(ours.merges)


@pytest.fixture(scope="module", params=PATTERNS)
def trained(request):
    return BytePairTokenizer.train(sample_texts(), 700, special_tokens=SPECIAL, pattern=PATTERNS[request.param])


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "tokenizer.json"
    trained.save(path)
    return path


@pytest.fixture(scope="module")
def library(saved):
    return Tokenizer.from_file(str(saved))


@pytest.fixture(scope="module")
def gpt2():
    return BytePairTokenizer.load(GPT2)


# The pieces that the algorithm is made of.


def test_the_letters_of_bytes():
    letters = byte_letters()
    assert len(letters) == len(set(letters.values())) == 256
    assert sorted(letters.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert to_letters(" é\n") == "ĠÃ©Ċ"


@pytest.mark.parametrize(
    ("word", "merged"), [("aaa", "Xa"), ("aaaa", "XX"), ("baab", "bXb"), ("", ""), ("a", "a"), ("aba", "aba")]
)
def test_merge_pair(word, merged):
    assert merge_pair([*map(ord, word)], (ord("a"), ord("a")), ord("X")) == [*map(ord, merged)]


def test_the_papers_example():
    """The words of Sennrich et al. 2016, §3.2, without its mark for a word's end; of four pairs seen 6 times: e, w."""
    vocab = {letter: number for number, letter in enumerate("dehilnorstw")}
    counted = {"low": 5, "lowest": 2, "newer": 6, "wider": 3}
    assert learn_merges(counted, vocab, len(vocab) + 4) == [("e", "r"), ("l", "o"), ("lo", "w"), ("e", "w")]
    assert len(learn_merges(counted, vocab, 1000)) == len(learn_merges(counted, vocab, 2000))


@many
@given(words=st.dictionaries(st.text("abc", min_size=1, max_size=9), st.integers(1, 5), max_size=8))
def test_counts_kept_up_to_date_equal_counts_made_anew(words):
    vocab = {letter: number for number, letter in enumerate("abc")}
    learnt = learn_merges(words, vocab, 24)
    ids, split, naive = dict(vocab), [[vocab[letter] for letter in word] for word in words], []
    while len(ids) < 24 and (counts := pair_counts(split, list(words.values()))):
        best = max(counts, key=lambda pair: (counts[pair], -pair[0], -pair[1]))
        left, right = ([*ids][number] for number in best)
        naive.append((left, right))
        merged = ids.setdefault(left + right, len(ids))
        split = [merge_pair(word, best, merged) for word in split]
    assert learnt == naive


@many
@given(word=st.text("abc", max_size=30), data=st.data())
def test_long_words_are_encoded_as_short_ones(word, data):
    """With merges in any order, even ones that make pieces before their halves."""
    pieces = st.text("abc", min_size=1, max_size=3)
    ranks = {pair: rank for rank, pair in enumerate(data.draw(st.lists(st.tuples(pieces, pieces), max_size=12)))}
    assert encode_long_word(word, ranks) == encode_word(word, ranks)
    assert "".join(encode_word(word, ranks)) == word


def test_a_very_long_word_takes_no_time(trained):
    word = "".join(random.Random(0).choices("helo wrd", k=100_000)).replace(" ", "")
    started = time.perf_counter()
    assert trained.decode(trained.encode(word)) == word
    assert time.perf_counter() - started < 5


# Words.


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@many
@given(text=TEXT)
def test_the_same_words_as_the_library(pattern, text):
    words = [word for word, _ in cut(text, regex.compile(pattern))]
    assert "".join(words) == text
    assert [to_letters(word) for word in words] == [word for word, _ in library_words(pattern).pre_tokenize_str(text)]


def test_every_chinese_character_is_a_word():
    text = "我们 don't，  中文ABC 你\n好 12三〇  x  "
    words = [word for word, is_match in cut(text, regex.compile(WORDS_AND_HAN)) if is_match]
    assert words == [
        *(
            "我",
            "们",
            " don",
            "'t",
            "，",
            "  ",
            "中",
            "文",
            "ABC",
            " ",
            "你",
            "\n",
            "好",
            " 12",
            "三",
            "〇",
            " ",
            " x",
            "  ",
        )
    ]


def test_no_merge_crosses_chinese_characters():
    trained = BytePairTokenizer.train(["中文中文中文 中文"], 300, pattern=WORDS_AND_HAN)
    assert trained.merges
    assert all(trained.decode([number]) in ("中", "文") for number in trained.encode("中文"))
    assert len(BytePairTokenizer.train(["中文中文中文 中文"], 300).encode("中文")) < len(trained.encode("中文"))


def test_what_a_pattern_leaves_out_is_a_word_too():
    trained = BytePairTokenizer.train(["ab-ab"], 257, pattern="[a-z]+")
    assert [trained.decode([number]) for number in trained.encode("ab--ab!")] == ["ab", "-", "-", "ab", "!"]


# Training.


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize(("name", "lines"), [("tinyshakespeare.txt", 10000), ("cmn_eng.txt", 4000)])
def test_the_same_merges_as_the_library_on_real_text(name, lines, pattern, report):
    path = CORPORA / name
    if not path.exists():
        pytest.skip(f"no {name} in shared/text")
    texts = path.read_text("utf-8").splitlines(keepends=True)[:lines]
    merges = assert_trained_equal(texts, 1200, ["<pad>", "<s>"], pattern)
    assert merges == 1200 - 258
    shown = next(name for name, value in PATTERNS.items() if value == pattern)
    report("merges learnt as the tokenizers library learns them", f"{name:20} {shown:14} {merges} merges equal")


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@some
@given(texts=st.lists(TEXT | st.text("ab", max_size=20) | st.text("abc é中", max_size=20), max_size=8))
@example(texts=["aaaa", "aaa aaaaa"])
@example(texts=[])
def test_the_same_merges_as_the_library_on_any_text(pattern, texts):
    assert_trained_equal(texts, 300, ["<s>"], pattern)


def test_training_is_deterministic(trained):
    again = BytePairTokenizer.train(iter(sample_texts()), 700, special_tokens=tuple(SPECIAL), pattern=trained.pattern)
    assert (again.vocab, again.merges) == (trained.vocab, trained.merges)


def test_ids_are_special_tokens_then_bytes_then_merges(trained):
    by_id = sorted(trained.vocab, key=trained.vocab.get)
    assert by_id[:4] == SPECIAL
    assert by_id[4:260] == sorted(byte_letters().values())
    assert by_id[260] == "".join(trained.merges[0])
    assert len(trained) == 700


def test_the_vocabulary_stays_small_where_the_text_is_short():
    assert len(BytePairTokenizer.train(["ab"], 1000)) == 257
    assert len(BytePairTokenizer.train([], 256)) == 256


# Encoding and decoding.


@needs_vectors
@needs_gpt2
def test_llama_cpps_vectors_for_gpt2(gpt2, report):
    vectors = read_vectors("gpt-2")
    for text, ids in vectors:
        assert gpt2.encode(text) == ids
        assert gpt2.decode(ids) == text
    report("llama.cpp's tokenizer vectors", f"gpt-2, minillm's own encoder  {len(vectors)} strings equal")


@needs_gpt2
def test_the_same_ids_as_the_library_with_gpt2s_merges(gpt2):
    library = Tokenizer.from_file(str(GPT2))

    @many
    @given(text=TEXT | st.just("<|endoftext|>a<|endoftext|>"))
    def compare(text):
        ids = gpt2.encode(text)
        assert ids == library.encode(text).ids
        assert gpt2.decode(ids) == text

    compare()
    assert gpt2.special_tokens == ("<|endoftext|>",)
    assert len(gpt2) == 50257


@many
@given(text=WITH_SPECIAL)
def test_the_same_ids_as_the_library(trained, library, text):
    ids = trained.encode(text)
    assert ids == library.encode(text).ids
    assert trained.decode(ids) == text


@many
@given(text=st.text())
def test_any_text_comes_back(trained, text):
    assert trained.decode(trained.encode(text)) == text


@many
@given(ids=st.lists(st.integers(0, 699), max_size=12))
def test_any_ids_decode_to_the_same_text(trained, library, ids):
    assert trained.decode(ids) == library.decode(ids, skip_special_tokens=False)


def test_half_a_character(trained):
    assert trained.decode([trained.token_to_id(to_letters("中")[0])]) == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_matched_whole_and_the_longest_first(trained):
    assert trained.encode("<s><pad></s>") == [1, 0, 2]
    assert trained.encode("<s>>") == [3]
    assert trained.encode("<s> >") == [1, *trained.encode(" >")]
    assert trained.decode([1, *trained.encode("hello"), 2]) == "<s>hello</s>"


def test_special_tokens_that_letters_could_be_taken_for():
    trained = BytePairTokenizer.train(["x"], 300, special_tokens=["Ġé", "(é)|.*"])
    assert trained.encode("aĠé(é)|.*") == [trained.token_to_id("a"), 0, 1]
    assert trained.decode([0, 1]) == "Ġé(é)|.*"


def test_what_is_remembered_is_bounded(trained, monkeypatch):
    monkeypatch.setattr(bpe, "REMEMBERED_WORDS", 10)
    fresh = BytePairTokenizer(trained.vocab, trained.merges, trained.special_tokens, trained.pattern)
    texts = [" ".join(f"w{number}" for number in range(100)), "é" * LONG_WORD]
    for text in texts * 2:
        assert fresh.encode(text) == trained.encode(text)
        assert len(fresh._remembered) <= 10
    assert pickle.loads(pickle.dumps(fresh)).encode(texts[0]) == trained.encode(texts[0])


# Files.


def test_save_and_load(trained, saved, tmp_path):
    loaded = BytePairTokenizer.load(saved)
    assert (loaded.vocab, loaded.merges) == (trained.vocab, trained.merges)
    assert (loaded.special_tokens, loaded.pattern) == (trained.special_tokens, trained.pattern)
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == saved.read_bytes()


def test_transformers_reads_it(trained, saved):
    fast = PreTrainedTokenizerFast(tokenizer_file=str(saved))
    assert len(fast) == len(trained)
    for text in [*sample_texts()[:50], "<s>你好 , world !</s>"]:
        ids = fast(text)["input_ids"]
        assert ids == trained.encode(text)
        assert fast.decode(ids) == text


def test_the_librarys_own_file(trained, library, tmp_path):
    library.save(str(tmp_path / "tokenizer.json"))
    loaded = BytePairTokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.vocab, loaded.merges, loaded.pattern) == (trained.vocab, trained.merges, trained.pattern)


def changed(saved: Path, path: Path, **parts: Any) -> Path:
    """The saved file with other parts; ``model__x`` is the model's x."""
    content = json.loads(saved.read_text("utf-8"))
    for name, value in parts.items():
        *outer, key = name.split("__")
        (content[outer[0]] if outer else content)[key] = value
    path.write_text(json.dumps(content))
    return path


def test_merges_written_as_strings(trained, saved, tmp_path):
    path = changed(saved, tmp_path / "t.json", model__merges=[" ".join(merge) for merge in trained.merges])
    assert BytePairTokenizer.load(path).merges == trained.merges


def test_added_tokens_behind_the_models_vocabulary(trained, saved, tmp_path):
    added = [{"id": 700, "content": "<new>", "special": True}]
    loaded = BytePairTokenizer.load(changed(saved, tmp_path / "t.json", added_tokens=added, model__vocab=trained.vocab))
    assert loaded.encode("<new>") == [700]
    assert len(loaded) == 701


LEADING = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, LEADING]}
TEMPLATE = {"type": "TemplateProcessing", "single": []}


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"normalizer": {"type": "NFC"}}, r'normalizer: \{"type": "NFC"\} is not implemented here, only null'),
        ({"truncation": {"max_length": 4}}, "truncation: .* is not implemented"),
        ({"padding": {"pad_id": 0}}, "padding: .* is not implemented"),
        ({"model": {"type": "Unigram", "vocab": []}}, "model: Unigram is not implemented here, only BPE"),
        ({"model__dropout": 0.1}, "model's dropout: 0.1 is not implemented"),
        ({"model__ignore_merges": True}, "model's ignore_merges: true"),
        ({"model__continuing_subword_prefix": "##"}, "model's continuing_subword_prefix: ##"),
        ({"model__end_of_word_suffix": "</w>"}, "model's end_of_word_suffix: </w>"),
        ({"pre_tokenizer": None}, "pre_tokenizer: null is not implemented here, only ByteLevel"),
        ({"pre_tokenizer": LEADING}, "pre_tokenizer: .*without a prefix space; minillm.get_tokenizer"),
        ({"pre_tokenizer": DIGITS}, "pre_tokenizer: .*Digits"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer: .*Metaspace"),
        ({"post_processor": TEMPLATE}, "post_processor: .*TemplateProcessing"),
        ({"decoder": {"type": "WordPiece"}}, "decoder: .*WordPiece.*only ByteLevel"),
        ({"added_tokens": [{"id": 0, "content": "<s>", "special": True}]}, "different ids to '<s>'"),
        ({"added_tokens": [{"id": 9, "content": "a", "special": False}]}, "added token 'a': special: false"),
        ({"added_tokens": [{"id": 1, "content": "<s>", "special": True, "lstrip": True}]}, "'<s>': lstrip"),
        ({"added_tokens": [{"id": 1}]}, "not a tokenizer.json, or a damaged one: KeyError"),
        (
            {"model__merges": [["h", "zzz"]]},
            "the merge of 'h' and 'zzz' names what .* lacks: 'zzz', 'hzzz'",
        ),
        ({"model__merges": ["h e l"]}, "damaged"),
        ({"model__merges": None}, "damaged"),
        ({"model__vocab": {"a": 0}}, "the vocabulary lacks byte letters or special tokens: .* and 25. more"),
        ({"model": None}, "damaged"),
        ({"model": {"merges": [], "vocab": [1]}}, "damaged"),
    ],
)
def test_what_cannot_be_honoured_is_refused(saved, parts, sentence, tmp_path):
    with pytest.raises(TokenizerError, match=sentence) as caught:
        BytePairTokenizer.load(changed(saved, tmp_path / "t.json", **parts))
    assert str(tmp_path / "t.json") in str(caught.value)


def test_damaged_files(saved, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(TokenizerError, match="there is no file"):
        BytePairTokenizer.load(path)
    path.write_bytes(saved.read_bytes()[:5000])
    with pytest.raises(TokenizerError, match="is not JSON"):
        BytePairTokenizer.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match="is not JSON"):
        BytePairTokenizer.load(path)
    path.write_text("[]")
    with pytest.raises(TokenizerError, match="does not hold an object"):
        BytePairTokenizer.load(path)
    path.write_text("{}")
    with pytest.raises(TokenizerError, match="damaged"):
        BytePairTokenizer.load(path)


# Bad arguments.


def test_too_small_a_vocabulary():
    with pytest.raises(InvalidRequestError, match=r"vocab_size=257 has no room for the 256 bytes and 2 .* make it 258"):
        BytePairTokenizer.train(["x"], 257, special_tokens=["<a>", "<b>"])


@pytest.mark.parametrize(
    ("special", "sentence"),
    [
        (["<a>", "<b>", "<a>"], "given twice: '<a>'"),
        (["<a>", ""], "empty or a byte's letter: ''"),
        (["a"], "empty or a byte's letter: 'a'"),
        (["ab"], "merges of ordinary text make special tokens: 'ab'"),
    ],
)
def test_bad_special_tokens(special, sentence):
    with pytest.raises(TokenizerError, match=sentence):
        BytePairTokenizer.train(["ab ab"], 300, special_tokens=special)


def test_one_string_is_no_list_of_texts():
    with pytest.raises(InvalidRequestError, match="give a list of texts"):
        BytePairTokenizer.train("hello", 300)


def test_a_pattern_that_is_none():
    with pytest.raises(TokenizerError, match=r"the pattern '\(' is not a regular expression"):
        BytePairTokenizer.train(["x"], 300, pattern="(")


BYTES = {letter: byte for byte, letter in byte_letters().items()}


@pytest.mark.parametrize(
    ("vocab", "merges", "special", "sentence"),
    [
        ({}, [], [], "lacks byte letters or special tokens: '!'.* and 251 more"),
        (BYTES, [], ["<s>"], "lacks byte letters or special tokens: '<s>'"),
        (BYTES | {"ab": 300}, [("a", "b")], [], "ids are not 0 to 256, each once"),
        (BYTES | {"ab": 7}, [("a", "b")], [], "ids are not 0 to 256, each once"),
        (BYTES, [("a", "b")], [], "the merge of 'a' and 'b' names what the vocabulary lacks: 'ab'"),
        (BYTES | {"a b": 256}, [], [], "neither special tokens nor written in byte letters: 'a b'"),
    ],
)
def test_parts_that_contradict_each_other(vocab, merges, special, sentence):
    with pytest.raises(TokenizerError, match=sentence):
        BytePairTokenizer(vocab, merges, special)


def test_unknown_ids_and_tokens(trained):
    with pytest.raises(InvalidRequestError, match="no tokens with these ids: -1, 700; ids are 0 to 699"):
        trained.decode([1, -1, 700])
    with pytest.raises(TokenizerError, match="'<new>' is not in the vocabulary"):
        trained.token_to_id("<new>")


def test_half_a_character_in_the_text(trained):
    with pytest.raises(InvalidRequestError, match=r"half a character \('\\ud800'\)"):
        trained.encode("a\ud800")


def test_pair_counts():
    words = ["aab", "ab"]
    counts = pair_counts([[*map(ord, word)] for word in words], [2, 3])
    assert counts == Counter({(97, 97): 2, (97, 98): 5})
    assert set(counts) == {pair for word in words for pair in pairwise(map(ord, word))}
