"""Byte-level byte-pair tokenizers of the `tokenizers` library, put together from published parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_LETTERS_AND_DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS_BY_THREE = _LETTERS_AND_DIGITS.replace("DIGITS", r"\p{N}{1,3}")
"""How text is cut into words before byte pairs are merged: Llama 3, GLM-4 (as in OpenAI's cl100k)."""
DIGITS_ALONE = _LETTERS_AND_DIGITS.replace("DIGITS", r"\p{N}")
"""The same with every digit on its own: Qwen2 and Qwen3."""

_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), _BYTES])


PRE_TOKENIZERS: dict[str, pre_tokenizers.PreTokenizer] = {
    "gpt-2": _GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "qwen2": _split(DIGITS_ALONE),
    "deepseek-r1-qwen": _split(DIGITS_ALONE),
    "llama-bpe": _split(DIGITS_BY_THREE),
    "glm4": _split(DIGITS_BY_THREE),
    "chatglm-bpe": _split(DIGITS_BY_THREE),
}
"""llama.cpp's names of the pre-tokenizers (GGUF's ``tokenizer.ggml.pre``) of the families that minillm runs."""

_WHOLE_WORDS = ("llama-bpe", "glm4", "chatglm-bpe")
"""Of these, the ones made for tiktoken, which looks for the whole word among the pieces before it merges any."""


def byte_level_bpe(vocab: Mapping[str, int], merges: Iterable[tuple[str, str]], pre_tokenizer: str) -> Tokenizer:
    """Byte-pair encoding over the 256 bytes written as letters (Radford et al. 2019, §2.2)."""
    model = models.BPE(dict(vocab), list(merges), ignore_merges=pre_tokenizer in _WHOLE_WORDS)
    tokenizer = Tokenizer(model)
    if pre_tokenizer == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def merges_by_rank(rank: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces whose join is a piece, best (lowest) rank of the join first.

    Tokenizers published as ranked pieces (tiktoken, SentencePiece) merge the pair whose *join* ranks best, whichever
    its halves; as a list of merges that is all the ways to cut each piece in two.
    """
    merges = []
    for piece, piece_rank in rank.items():
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        pairs = [pair for pair in cuts if pair[0] in rank and pair[1] in rank]
        merges += [(piece_rank, rank[left], rank[right], left, right) for left, right in pairs]
    return [(left, right) for *_, left, right in sorted(merges)]


def add_tokens(tokenizer: Tokenizer, contents: Iterable[str], *, special: bool) -> None:
    """Tokens matched in the text as they stand, before anything else looks at it."""
    tokens = [AddedToken(content, special=special, normalized=False) for content in contents]
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(tokens)


def add_template(tokenizer: Tokenizer, prefix: Iterable[str], suffix: Iterable[str] = ()) -> None:
    """Special tokens put before and after every encoded text."""
    before, after = list(prefix), list(suffix)
    ids = {token: tokenizer.token_to_id(token) for token in (*before, *after)}
    template = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=list(ids.items()))
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
