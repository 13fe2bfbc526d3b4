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
        TokenizerError: no tokenizer in the file, or one of a kind that is not implemented.
    """
    header = {key.removeprefix("tokenizer."): value for key, value in metadata.items() if key.startswith("tokenizer.")}
    kind = header.get("ggml.model")
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(f"GGUF tokenizer model {kind!r} is not implemented; these are: gpt2, llama")
    contents: list[str] = header["ggml.tokens"]
    types = header.get("ggml.token_type") or [TokenType.NORMAL] * len(contents)
    tokenizer = _byte_pairs(header, contents) if kind == "gpt2" else _sentencepiece(header, contents)
    of_type = {wanted: [c for c, found in zip(contents, types, strict=True) if found == wanted] for wanted in TokenType}
    add_tokens(tokenizer, of_type[TokenType.CONTROL], special=True)
    add_tokens(tokenizer, of_type[TokenType.USER_DEFINED], special=False)

    special = {
        f"{role}_token": contents[header[f"ggml.{key}_token_id"]]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"ggml.{key}_token_id" in header
    }
    adds_bos = header.get("ggml.add_bos_token", kind == "llama" or header.get("ggml.pre") == "llama-bpe")
    adds_eos = header.get("ggml.add_eos_token", False)
    before = [special["bos_token"]] if adds_bos and "bos_token" in special else []
    after = [special["eos_token"]] if adds_eos and "eos_token" in special else []
    if before or after:
        add_template(tokenizer, before, after)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=header.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_pairs(header: Mapping[str, Any], contents: list[str]) -> Tokenizer:
    name = header.get("ggml.pre")
    if name not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"GGUF pre-tokenizer {name!r} is not implemented (these are: {', '.join(PRE_TOKENIZERS)}): use the "
            "tokenizer of the original model's folder"
        )
    merges = (tuple(merge.split(" ", 1)) for merge in header["ggml.merges"])
    return byte_level_bpe({content: number for number, content in enumerate(contents)}, merges, name)


def _sentencepiece(header: Mapping[str, Any], contents: list[str]) -> Tokenizer:
    """SentencePiece's byte-pair model: pieces with scores, a space written as a letter, bytes as a last resort."""
    vocab = {content: number for number, content in enumerate(contents)}
    rank = {content: -score for content, score in zip(contents, header["ggml.scores"], strict=True)}
    unknown = contents[header.get("ggml.unknown_token_id", 0)]
    model = models.BPE(vocab, merges_by_rank(rank), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefixed = header.get("ggml.add_space_prefix", True)
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizers.Sequence(([normalizers.Prepend(SPACE)] if prefixed else []) + spaces)
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefixed else []))
    return tokenizer
