"""GLM-4's tokenizer: a text file of base64 pieces with their ranks, as tiktoken reads them.

The published repositories bring a Python class to read it; that class is never executed.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minillm.errors import TokenizerError
from minillm.text import read_json
from minillm.tokenizers.building import add_template, add_tokens, byte_level_bpe, merges_by_rank

GLM4_SPECIAL = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
"""In the order of their ids, which start after the last piece (151329 in the published file)."""

_PREFIX = ("[gMASK]", "<sop>")
_END = "<|endoftext|>"

GLM4_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>{{ message['metadata'] or '' }}\n"
    "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The published prompt form, for repositories whose tokenizer_config.json holds no template."""


def is_tiktoken(path: Path) -> bool:
    """Whether a ``tokenizer.model`` is such a text file, not a SentencePiece model."""
    with path.open("rb") as file:
        parts = file.readline().split()
    return len(parts) == 2 and parts[1].isdigit()


def read_ranks(path: Path) -> dict[bytes, int]:
    """Each piece's bytes and its rank, which is also its id.

    Raises:
        TokenizerError: with the number of the first line that is not base64, a space and a number.
    """
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(f"{path}, line {number}: not a base64 piece and its rank ({error})") from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(f"{path} lacks {len(missing)} of the 256 single bytes: truncated?")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"{path}: ranks are not 0 to {len(ranks) - 1}, each once")
    return ranks


def write_ranks(path: Path, ranks: Mapping[bytes, int]) -> None:
    """The file that `read_ranks` reads."""
    lines = [f"{base64.b64encode(piece).decode()} {rank}\n" for piece, rank in ranks.items()]
    path.write_text("".join(lines), encoding="ascii", newline="\n")


def glm4_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a GLM-4 repository in its remote-code form.

    Every encoded text starts with ``[gMASK]<sop>``, as the published class does it.
    """
    letters = _byte_letters()
    by_bytes = read_ranks(folder / "tokenizer.model")
    ranks = {"".join(letters[byte] for byte in piece): rank for piece, rank in by_bytes.items()}
    tokenizer = byte_level_bpe(ranks, merges_by_rank(ranks), "glm4")
    path = folder / "tokenizer_config.json"
    config = read_json(path, TokenizerError) if path.exists() else {}
    add_tokens(tokenizer, _special_tokens(config, len(ranks)), special=True)
    add_template(tokenizer, _PREFIX)
    jinja = folder / "chat_template.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_END,
        pad_token=_END,
        padding_side="left",
        chat_template=jinja.read_text("utf-8") if jinja.exists() else config.get("chat_template") or GLM4_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _special_tokens(config: Mapping[str, Any], first_id: int) -> list[str]:
    """Contents in the order of their ids, which must follow the pieces without a gap."""
    added = config.get("added_tokens_decoder")
    if not added:
        return list(GLM4_SPECIAL)
    try:
        by_id = {int(number): str(token["content"]) for number, token in added.items()}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"tokenizer_config.json's added_tokens_decoder is not ids and tokens: {error!r}"
        ) from error
    expected = list(range(first_id, first_id + len(by_id)))
    if sorted(by_id) != expected:
        raise TokenizerError(
            f"tokenizer_config.json gives special tokens the ids {sorted(by_id)}; after {first_id} pieces they are "
            f"{first_id} to {expected[-1]}"
        )
    missing = [token for token in (*_PREFIX, _END) if token not in by_id.values()]
    if missing:
        raise TokenizerError(f"tokenizer_config.json has no {', '.join(missing)} among its added tokens")
    return [by_id[number] for number in expected]


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies (Radford et al. 2019, §2.2)."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain = {ord(letter): letter for letter in alphabet if ord(letter) < 256}
    shifted = sorted(letter for letter in alphabet if ord(letter) >= 256)
    rest = [byte for byte in range(256) if byte not in plain]
    return plain | dict(zip(rest, shifted, strict=True))
