"""Byte-pair encoding from scratch: learn merges from text, apply them, keep them in a file.

Sennrich et al. 2016, §3.2: start from single symbols and join the most frequent pair of neighbours, again and again.
Radford et al. 2019, §2.2: let the symbols be bytes, so that no text is ever unknown, and let no merge cross words.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex

from minillm.errors import InvalidRequestError, TokenizerError
from minillm.text import read_json, some

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's words: contractions, letters, digits, the rest; each takes one space before it along."""

WORDS_AND_HAN = (
    r"\p{Han}|'s|'t|'re|'ve|'m|'ll|'d| ?[^\P{L}\p{Han}]+| ?[^\P{N}\p{Han}]+| ?[^\s\p{L}\p{N}\p{Han}]+"
    r"|\s+(?![^\s\p{Han}])|\s+"
)
"""The same with every Chinese character as a word of its own: it takes no space along, and no merge crosses it."""

LONG_WORD = 64
"""Letters from which on a word is encoded with a queue, and not remembered."""
REMEMBERED_WORDS = 1 << 16


# Bytes as letters.


@cache
def byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte (GPT-2's table: Radford et al. 2019, ``encoder.py``).

    Bytes that are printable in Latin-1 stand for themselves, the others for the letters from U+0100 on: a space is Ġ.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


@cache
def letter_bytes() -> dict[str, int]:
    """The byte that each letter stands for."""
    return {letter: byte for byte, letter in byte_letters().items()}


def to_letters(text: str) -> str:
    """The text's UTF-8 bytes, each written as its letter."""
    letters = byte_letters()
    try:
        return "".join([letters[byte] for byte in text.encode()])
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"the text holds half a character ({text[error.start]!r}), which UTF-8 cannot write: decode it with "
            "errors='replace'"
        ) from error


# Text into words.


def cut(text: str, pattern: regex.Pattern[str]) -> Iterator[tuple[str, bool]]:
    """The pieces that match and the pieces between them, in order; joined they are the text."""
    end = 0
    for match in pattern.finditer(text):
        if end < match.start():
            yield text[end : match.start()], False
        yield match[0], True
        end = match.end()
    if end < len(text):
        yield text[end:], False


def count_words(texts: Iterable[str], pattern: str) -> dict[str, int]:
    """How often each word stands in the texts, words written in letters: merges are learnt from this alone."""
    compiled = _compiled(pattern)
    counts = Counter(word for text in texts for word, _ in cut(text, compiled))
    return {to_letters(word): count for word, count in counts.items()}


def _compiled(pattern: str) -> regex.Pattern[str]:
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise TokenizerError(f"the pattern {pattern!r} is not a regular expression: {error}") from error


# Learning merges.


Pair = tuple[int, int]
"""The ids of two neighbours."""


def pair_counts(words: Sequence[Sequence[int]], times: Sequence[int]) -> dict[Pair, int]:
    """How often each pair of neighbours occurs in words that occur so many times."""
    counts: dict[Pair, int] = defaultdict(int)
    for word, count in zip(words, times, strict=True):
        for pair in pairwise(word):
            counts[pair] += count
    return counts


def merge_pair(word: Sequence[int], pair: Pair, merged: int) -> list[int]:
    """The word with each occurrence of the pair, from left to right, replaced by one id."""
    left, right = pair
    out: list[int] = []
    for piece in word:
        if piece == right and out and out[-1] == left:
            out[-1] = merged
        else:
            out.append(piece)
    return out


class CountedPairs:
    """The words while merges are learnt: which pair is the most frequent, and what changes when it is merged.

    Counts are not made anew for each merge: only those words change that hold the pair. A queue keeps the most
    frequent pair in front; a pair that has become rarer is put back when its turn comes.
    """

    def __init__(self, words: Sequence[Sequence[int]], times: Sequence[int]) -> None:
        self.words, self.times = list(words), times
        self.counts = pair_counts(words, times)
        self.where: dict[Pair, set[int]] = defaultdict(set)
        for index, word in enumerate(words):
            for pair in pairwise(word):
                self.where[pair].add(index)
        self._queue = [(-count, pair) for pair, count in self.counts.items()]
        heapq.heapify(self._queue)

    def most_frequent(self) -> Pair | None:
        """The pair to merge next; of equally frequent ones the one with the lower ids."""
        while self._queue:
            count, pair = heapq.heappop(self._queue)
            if -count == self.counts[pair]:
                return pair
            if self.counts[pair]:
                heapq.heappush(self._queue, (-self.counts[pair], pair))
        return None

    def merge(self, pair: Pair, merged: int) -> None:
        """Replace the pair by one id in each word that holds it, and count that word's pairs again."""
        risen = set()
        for index in self.where.pop(pair):
            word, count = self.words[index], self.times[index]
            for old in pairwise(word):
                self.counts[old] -= count
            self.words[index] = word = merge_pair(word, pair, merged)
            for new in pairwise(word):
                self.counts[new] += count
                if merged in new:
                    self.where[new].add(index)
                    risen.add(new)
        for new in risen:
            heapq.heappush(self._queue, (-self.counts[new], new))


def learn_merges(counted: Mapping[str, int], vocab: Mapping[str, int], vocab_size: int) -> list[tuple[str, str]]:
    """The most frequent pair, merged everywhere, and again, until the vocabulary is full or no pair is left.

    Sennrich et al. 2016, algorithm 1. `counted` is words in letters and how often each occurs.
    """
    ids, pieces, merges = dict(vocab), list(vocab), []
    pairs = CountedPairs([[ids[letter] for letter in word] for word in counted], list(counted.values()))
    while len(ids) < vocab_size and (pair := pairs.most_frequent()):
        left, right = pieces[pair[0]], pieces[pair[1]]
        merged = ids.setdefault(left + right, len(ids))
        if merged == len(pieces):
            pieces.append(left + right)
        merges.append((left, right))
        pairs.merge(pair, merged)
    return merges


# Applying merges.


def encode_word(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """The word's pieces: of all neighbours the pair that was learnt first is joined, until none can be."""
    pieces = list(word)
    while len(pieces) > 1:
        rank, at = min((ranks.get(pair, math.inf), at) for at, pair in enumerate(pairwise(pieces)))
        if rank == math.inf:
            break
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def encode_long_word(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """The same pieces in n log n steps, not n²: pairs wait in a queue, and a merge looks at its two neighbours only."""
    pieces = [*word, ""]  # a piece stands where its first letter stood; the end is empty
    after, before = list(range(1, len(pieces) + 1)), list(range(-1, len(pieces) - 1))
    pairs = enumerate(pairwise(word))
    queue = [(ranks[pair], at, *pair) for at, pair in pairs if pair in ranks]
    heapq.heapify(queue)
    while queue:
        _, at, left, right = heapq.heappop(queue)
        taken = after[at]
        if pieces[at] != left or pieces[taken] != right:  # one of the two has been merged since
            continue
        pieces[at], pieces[taken] = left + right, ""
        after[at] = after[taken]
        before[after[at]] = at
        for start in (before[at], at):
            pair = (pieces[start], pieces[after[start]]) if start >= 0 else ("", "")
            if pair in ranks:
                heapq.heappush(queue, (ranks[pair], start, *pair))
    return [piece for piece in pieces if piece]


class BytePairTokenizer:
    """A vocabulary, merges in the order in which they were learnt, special tokens, and the pattern that cuts words.

    Special tokens are matched whole wherever they stand in a text, before anything else looks at it.

    Raises:
        TokenizerError: these parts contradict each other; the message says where.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        special_tokens: Sequence[str] = (),
        pattern: str = GPT2_PATTERN,
    ) -> None:
        _check_special_tokens(special_tokens)
        _check_parts(vocab, merges, special_tokens)
        self.vocab, self.merges = dict(vocab), list(merges)
        self.special_tokens, self.pattern = tuple(special_tokens), pattern
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._words = _compiled(pattern)
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special = _compiled("|".join(map(regex.escape, longest_first)) or "(?!)")
        self._bytes = {
            vocab[piece]: bytes(map(letter_bytes().__getitem__, piece)) for piece in vocab.keys() - {*special_tokens}
        }
        self._bytes |= {vocab[token]: token.encode() for token in special_tokens}
        self._remembered: dict[str, list[int]] = {}

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, *, special_tokens: Sequence[str] = (), pattern: str = GPT2_PATTERN
    ) -> BytePairTokenizer:
        """Learn merges from texts. Ids are the special tokens, the 256 bytes, then a new one for each merge.

        The vocabulary stays smaller than `vocab_size` where the texts have no more pairs.
        """
        if isinstance(texts, str):
            raise InvalidRequestError("texts is one string: give a list of texts")
        _check_special_tokens(special_tokens)
        smallest = 256 + len(special_tokens)
        if vocab_size < smallest:
            raise InvalidRequestError(
                f"vocab_size={vocab_size} has no room for the 256 bytes and {len(special_tokens)} special tokens: "
                f"make it {smallest} or more"
            )
        vocab = {piece: number for number, piece in enumerate([*special_tokens, *sorted(letter_bytes())])}
        merges = learn_merges(count_words(texts, pattern), vocab, vocab_size)
        for left, right in merges:
            vocab.setdefault(left + right, len(vocab))
        return cls(vocab, merges, special_tokens, pattern)

    def __len__(self) -> int:
        return len(self.vocab)

    def token_to_id(self, token: str) -> int:
        """The id of a piece or a special token."""
        if token not in self.vocab:
            raise TokenizerError(
                f"{token!r} is not in the vocabulary; pieces are written in byte letters, a space as Ġ"
            )
        return self.vocab[token]

    def encode(self, text: str) -> list[int]:
        """The ids of a text; no token is added to it."""
        ids: list[int] = []
        for part, is_special in cut(text, self._special):
            if is_special:
                ids.append(self.vocab[part])
            else:
                for word, _ in cut(part, self._words):
                    ids += self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        if word in self._remembered:
            return self._remembered[word]
        letters = to_letters(word)
        if len(letters) >= LONG_WORD:
            return [self.vocab[piece] for piece in encode_long_word(letters, self._ranks)]
        if len(self._remembered) == REMEMBERED_WORDS:
            self._remembered.clear()
        ids = self._remembered[word] = [self.vocab[piece] for piece in encode_word(letters, self._ranks)]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included; bytes that are no whole character become �."""
        unknown = [str(number) for number in ids if number not in self._bytes]
        if unknown:
            raise InvalidRequestError(f"no tokens with these ids: {some(unknown)}; ids are 0 to {len(self) - 1}")
        return b"".join([self._bytes[number] for number in ids]).decode(errors="replace")

    def save(self, path: str | Path) -> None:
        """Write a ``tokenizer.json``, which the libraries ``tokenizers`` and ``transformers`` read too."""
        Path(path).write_text(json.dumps(_to_json(self), ensure_ascii=False, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> BytePairTokenizer:
        """Read a ``tokenizer.json`` whose model is byte-level byte-pair encoding: GPT-2's, or one that was saved here.

        Raises:
            TokenizerError: no such file, a damaged one, or one that asks for what is not implemented here.
        """
        path = Path(path)
        if not path.is_file():
            raise TokenizerError(f"there is no file {path}")
        content = read_json(path, TokenizerError)
        try:
            return cls(*_from_json(content))
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise TokenizerError(f"{path} is not a tokenizer.json, or a damaged one: {error!r}") from error


def _check_special_tokens(special_tokens: Sequence[str]) -> None:
    twice = [repr(token) for token, count in Counter(special_tokens).items() if count > 1]
    if twice:
        raise TokenizerError(f"special tokens are given twice: {some(twice)}")
    letters = [repr(token) for token in special_tokens if not token or token in letter_bytes()]
    if letters:
        raise TokenizerError(f"special tokens that are empty or a byte's letter: {some(letters)}: make them longer")


def _check_parts(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], special_tokens: Sequence[str]) -> None:
    """Every byte and special token has a piece, each piece an id, and each merge joins pieces to a piece."""
    absent = [repr(piece) for piece in (*letter_bytes(), *special_tokens) if piece not in vocab]
    if absent:
        raise TokenizerError(f"the vocabulary lacks byte letters or special tokens: {some(absent)}")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise TokenizerError(f"the vocabulary's ids are not 0 to {len(vocab) - 1}, each once")
    for left, right in merges:
        missing = [repr(piece) for piece in (left, right, left + right) if piece not in vocab]
        if missing:
            raise TokenizerError(
                f"the merge of {left!r} and {right!r} names what the vocabulary lacks: {some(missing)}"
            )
    made = [repr(token) for token in {left + right for left, right in merges}.intersection(special_tokens)]
    if made:
        raise TokenizerError(f"merges of ordinary text make special tokens: {some(made)}: choose other special tokens")
    foreign = [repr(piece) for piece in vocab.keys() - {*special_tokens} if not letter_bytes().keys() >= {*piece}]
    if foreign:
        raise TokenizerError(f"pieces that are neither special tokens nor written in byte letters: {some(foreign)}")


# tokenizer.json.

_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _to_json(tokenizer: BytePairTokenizer) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    by_gpt2 = tokenizer.pattern == GPT2_PATTERN
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": tokenizer.vocab[token], "content": token, **plain} for token in tokenizer.special_tokens
        ],
        "normalizer": None,
        "pre_tokenizer": _BYTES | {"use_regex": True}
        if by_gpt2
        else {"type": "Sequence", "pretokenizers": [split, _BYTES]},
        "post_processor": _BYTES | {"trim_offsets": False},
        "decoder": _BYTES,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": tokenizer.vocab,
            "merges": tokenizer.merges,
        },
    }


def _from_json(content: Mapping[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]], list[str], str]:
    """Vocabulary, merges, special tokens and pattern, where nothing else is asked for."""
    for part in ("normalizer", "truncation", "padding"):
        if content.get(part):
            raise _not_implemented(part, content[part], "null")
    for part in ("post_processor", "decoder"):
        if content.get(part) and content[part]["type"] != "ByteLevel":
            raise _not_implemented(part, content[part], "ByteLevel")
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise _not_implemented("model", model["type"], "BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(option):
            raise _not_implemented(f"model's {option}", model[option], "null")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    special = _special_ids(content.get("added_tokens") or [])
    vocab = {**model["vocab"], **special}
    moved = [repr(token) for token, number in special.items() if model["vocab"].get(token, number) != number]
    if moved:
        raise TokenizerError(f"added_tokens and the model's vocabulary give different ids to {some(moved)}: damaged")
    return vocab, merges, list(special), _pattern(content.get("pre_tokenizer"))


def _special_ids(added: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    for token in added:
        asked = [flag for flag in ("single_word", "lstrip", "rstrip") if token.get(flag)]
        if asked or not token["special"]:
            found = asked or ["special: false"]
            raise _not_implemented(
                f"added token {token['content']!r}", some(found), "a special token, matched as it is"
            )
    return {token["content"]: token["id"] for token in added}


def _pattern(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """The pattern that a pre-tokenizer cuts words by: ByteLevel's own, or a Split's before it."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, **rest} if rest.get("use_regex", True):
            return GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    expected = "ByteLevel, or a Split by an isolated Regex and ByteLevel, without a prefix space"
    raise _not_implemented("pre_tokenizer", pre_tokenizer, expected)


def _not_implemented(part: str, found: Any, expected: str) -> TokenizerError:
    shown = json.dumps(found) if not isinstance(found, str) else found
    shown = shown if len(shown) <= 200 else shown[:200] + "…"
    return TokenizerError(
        f"{part}: {shown} is not implemented here, only {expected}; minillm.get_tokenizer reads such a folder with "
        "transformers"
    )
