"""A small GLM-4 in the form in which glm-4-9b-chat is published, which knows one conversation by heart.

It stands in for the real one where that is not at hand: the same files, names and fields, other sizes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedTokenizerBase

from minillm.models.glm4 import CHATGLM, GLM4_9B_CHAT, translate_chatglm
from minillm.models.loader import published_weights
from minillm.models.tokenizer import get_tokenizer
from minillm.tokenizers.bpe import BytePairTokenizer, letter_bytes
from minillm.tokenizers.building import DIGITS_BY_THREE
from minillm.tokenizers.tiktoken import GLM4_SPECIAL, GLM4_TEMPLATE, write_ranks
from minillm.training.batching import IGNORED, TextBatch
from minillm.training.schedules import cosine
from minillm.training.stories import Message
from minillm.training.trainer import Trainer, TrainingConfig
from minillm.transformer.decoder import Decoder

SMALL: Mapping[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "kv_channels": 16,
    "ffn_hidden_size": 128,
}
"""What is smaller than in the published configuration, beside the vocabulary."""

SYSTEM_PROMPT = "You are a helpful assistant. Answer in one sentence, in the language of the question."
STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")
PIECES = 384
PADDED_TO = 64
SHARD_BYTES = 200_000
EXAMPLE_MESSAGES = 6
STEPS = 80


def write_small_glm4(folder: Path, conversation: Sequence[Message]) -> None:
    """Train a model on a conversation and write it as glm-4-9b-chat is published, less the code, which nobody needs.

    It answers each of the user's messages, whichever comes first, with or without `SYSTEM_PROMPT`; left to itself it
    goes on with the next message, and after the last with the first.

    Args:
        conversation: user and assistant in turn, two messages or more; few and short ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder, [SYSTEM_PROMPT, *(message["content"] for message in conversation)])
    tokenizer = get_tokenizer(folder)
    stops = [tokenizer.get_added_vocab()[token] for token in STOP_TOKENS]
    ids = {"eos_token_id": stops, "pad_token_id": stops[0]}
    config = {**GLM4_9B_CHAT, **SMALL, "padded_vocab_size": -(-len(tokenizer) // PADDED_TO) * PADDED_TO, **ids}
    _write_json(folder / "config.json", config)
    recommended = {"do_sample": True, "temperature": 0.8, "top_p": 0.8, "max_length": config["seq_length"]}
    _write_json(folder / "generation_config.json", ids | recommended)
    decoder = _learn(Decoder(translate_chatglm(config)), tokenizer, conversation)
    weights = {name: tensor.bfloat16() for name, tensor in published_weights(decoder, CHATGLM).items()}
    save_torch_state_dict(weights, folder, max_shard_size=SHARD_BYTES)


def _write_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    """tokenizer.model, as tiktoken has it, and what its special tokens and its chat template are."""
    learned = BytePairTokenizer.train(texts, PIECES, pattern=DIGITS_BY_THREE)
    byte = letter_bytes()
    write_ranks(
        folder / "tokenizer.model",
        {bytes(byte[letter] for letter in piece): rank for piece, rank in learned.vocab.items()},
    )
    added = {
        str(len(learned) + number): {"content": token, "special": True} for number, token in enumerate(GLM4_SPECIAL)
    }
    tokenizer_config = {
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]},
        "tokenizer_class": "ChatGLM4Tokenizer",
        "added_tokens_decoder": added,
        "chat_template": GLM4_TEMPLATE,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "model_max_length": GLM4_9B_CHAT["seq_length"],
    }
    _write_json(folder / "tokenizer_config.json", tokenizer_config)


def _learn(decoder: Decoder, tokenizer: PreTrainedTokenizerBase, conversation: Sequence[Message]) -> Decoder:
    """The decoder, trained on the conversation as often as it takes to know it by heart. The same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder.reset_parameters(std=decoder.config.hidden_size**-0.5)
    system: Message = {"role": "system", "content": SYSTEM_PROMPT}
    batches = [TextBatch.of(list(_examples(tokenizer, before, conversation))) for before in ([], [system])]
    config = TrainingConfig(steps=STEPS, learning_rate=1e-2, schedule=cosine(STEPS, warmup_steps=10))
    Trainer(decoder, lambda step: batches[step % 2], config).train(progress=False)
    return decoder


def _examples(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[Message], conversation: Sequence[Message]
) -> Iterator[tuple[list[int], list[int]]]:
    """(tokens, what is to be learned of them): a part of the conversation from each question on, up to the token that
    ends its last answer. What `before` and the first question are cannot be known, and is not learned."""
    user = tokenizer.get_added_vocab()["<|user|>"]
    for start in range(0, len(conversation), 2):
        turned = [*conversation[start:], *conversation[:start]][:EXAMPLE_MESSAGES]
        tokens = [*_tokens(tokenizer, [*before, *turned]), user]
        given = len(_tokens(tokenizer, [*before, turned[0]]))
        yield tokens, [IGNORED] * given + tokens[given:]


def _tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    return list(tokenizer.apply_chat_template(list(messages), return_dict=False))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
