"""One door to every tokenizer: whatever form a model was published in, `get_tokenizer` reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from minillm.checks import check_text
from minillm.errors import ConfigError, TokenizerError
from minillm.models.chat_template import chat_text
from minillm.models.gguf import metadata
from minillm.models.source import resolve
from minillm.text import read_json
from minillm.tokenizers.gguf import gguf_tokenizer
from minillm.tokenizers.tiktoken import glm4_tokenizer, is_tiktoken

NEEDED_LIBRARIES = " (a SentencePiece model without a tokenizer.json needs: pip install sentencepiece protobuf)"
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>")
"""What ends an answer in GGUF files that do not say so: ChatML's, Llama 3's and Gemma's, as llama.cpp finds them."""


def get_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with transformers' interface (`apply_chat_template` included).

    Nothing from the model's repository is executed.

    Args:
        name: as for `load_model`: a local folder or ``.gguf`` file, a hub id, or a short name.

    Raises:
        ModelNotFoundError, DownloadError: when `name` leads nowhere.
        TokenizerError: no tokenizer there, or one that cannot be read.
    """
    path = resolve(name)
    if path.suffix == ".gguf":
        return gguf_tokenizer(metadata(path))
    pieces = path / "tokenizer.model"
    if not (path / "tokenizer.json").exists() and pieces.exists() and is_tiktoken(pieces):
        return glm4_tokenizer(path)
    if not any((path / file).exists() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise TokenizerError(f"{path} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise bare exceptions of many kinds
        hint = "" if (path / "tokenizer.json").exists() or not pieces.exists() else NEEDED_LIBRARIES
        raise TokenizerError(f"the tokenizer in {path} cannot be read: {error}{hint}") from error
    return tokenizer


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase, conversation: Sequence[Mapping[str, Any]], **options: Any
) -> tuple[str, list[int]]:
    """A conversation as the model's chat template writes it down: text, and its tokens.

    Args:
        options: as for `chat_text`.

    Raises:
        InvalidRequestError: a message that is none, or a text that no tokenizer can read.
        TokenizerError: as from `chat_text`.
    """
    text = chat_text(tokenizer, conversation, **options)
    return text, token_ids(tokenizer, text)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text's tokens, without special ones in front.

    Raises:
        InvalidRequestError: a text that no tokenizer can read.
    """
    check_text(text)
    return cast(list[int], tokenizer(text, add_special_tokens=False).input_ids)


def stop_token_ids(name: str | Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's, generation_config.json's and config.json's ``eos_token_id``.

    Raises:
        ConfigError: for one of these files that cannot be read.
    """
    path = resolve(name)
    found = {tokenizer.eos_token_id}
    if path.suffix == ".gguf":
        header, added = metadata(path), tokenizer.get_added_vocab()
        found |= {header.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")}
        found |= {added.get(content) for content in END_OF_TURN}
    else:
        for file in ("generation_config.json", "config.json"):
            said = read_json(path / file, ConfigError) if (path / file).exists() else {}
            eos = said.get("eos_token_id")
            found |= set(eos) if isinstance(eos, list) else {eos}
    return frozenset(token for token in found if token is not None)
