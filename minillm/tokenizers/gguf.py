"""The tokenizer inside a GGUF file's header, with its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from minillm.errors import TokenizerError
from minillm.tokenizers.building import PRE_TOKENIZERS, add_template, add_tokens, byte_level_bpe, merges_by_rank

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""How SentencePiece writes a space."""

_SENTENCEPIECE_IDS = {"ggml.unknown_token_id": 0, "ggml.bos_token_id": 1, "ggml.eos_token_id": 2}
"""What llama.cpp takes where a header of that kind does not say."""


class TokenType(IntEnum):
    """llama.cpp's kinds of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def gguf_tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """A transformers tokenizer from a GGUF header.

    Raises:
        TokenizerError: no tokenizer in the file, one of a kind that is not implemented, or a damaged one.
    """
    header = {key.removeprefix("tokenizer."): value for key, value in metadata.items() if key.startswith("tokenizer.")}
    kind = header.get("ggml.model")
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(f"GGUF tokenizer model {kind!r} is not implemented; these are: gpt2, llama")
    missing = [key for key in ("tokens", "merges" if kind == "gpt2" else "scores") if f"ggml.{key}" not in header]
    if missing:
        raise TokenizerError(
            f"the GGUF header has no tokenizer.ggml.{missing[0]}: damaged, or made without its tokenizer"
        )
    try:
        return _tokenizer(kind, header)
    except TokenizerError:
        raise
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise TokenizerError(f"the GGUF header's tokenizer contradicts itself, it is damaged: {error}") from error


def _tokenizer(kind: str, header: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    contents: list[str] = header["ggml.tokens"]
    types: list[int] = header.get("ggml.token_type") or [TokenType.NORMAL] * len(contents)
    if kind == "llama":
        header = {**_SENTENCEPIECE_IDS, **header}
        # A user's token is matched in the text, where a space is a space.
        user = TokenType.USER_DEFINED
        contents = [c.replace(SPACE, " ") if found == user else c for c, found in zip(contents, types, strict=True)]
    tokenizer = _byte_pairs(header, contents) if kind == "gpt2" else _sentencepiece(header, contents, types)
    of_type = {wanted: [c for c, found in zip(contents, types, strict=True) if found == wanted] for wanted in TokenType}
    add_tokens(tokenizer, of_type[TokenType.CONTROL], special=True)
    add_tokens(tokenizer, of_type[TokenType.USER_DEFINED], special=False)

    special = _special_tokens(header, contents)
    adds_bos = header.get("ggml.add_bos_token", kind == "llama" or header.get("ggml.pre") == "llama-bpe")
    adds_eos = header.get("ggml.add_eos_token", False)
    before = [special["bos_token"]] if adds_bos and "bos_token" in special else []
    after = [special["eos_token"]] if adds_eos and "eos_token" in special else []
    if before or after:
        tokenizer.add_special_tokens(before + after)
        add_template(tokenizer, before, after)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=header.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _special_tokens(header: Mapping[str, Any], contents: list[str]) -> dict[str, str]:
    """transformers' name of each special token → its content; ids outside the vocabulary mean that there is none."""
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {role: header.get(f"ggml.{key}_token_id", -1) for role, key in keys.items()}
    return {f"{role}_token": contents[number] for role, number in ids.items() if 0 <= number < len(contents)}


def _byte_pairs(header: Mapping[str, Any], contents: list[str]) -> Tokenizer:
    name = header.get("ggml.pre")
    if name not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"GGUF pre-tokenizer {name!r} is not implemented (these are: {', '.join(PRE_TOKENIZERS)}): use the "
            "tokenizer of the original model's folder"
        )
    merges = (tuple(merge.split(" ", 1)) for merge in header["ggml.merges"])
    return byte_level_bpe({content: number for number, content in enumerate(contents)}, merges, name)


def _sentencepiece(header: Mapping[str, Any], contents: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece's byte-pair model: pieces with scores, a space written as a letter, bytes as a last resort."""
    vocab = {content: number for number, content in enumerate(contents)}
    scored = zip(contents, header["ggml.scores"], types, strict=True)
    rank = {content: -score for content, score, found in scored if found == TokenType.NORMAL}
    unknown = contents[header["ggml.unknown_token_id"]]
    model = models.BPE(vocab, merges_by_rank(rank), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefixed = header.get("ggml.add_space_prefix", True)
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizers.Sequence(([normalizers.Prepend(SPACE)] if prefixed else []) + spaces)
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefixed else []))
    return tokenizer
