"""Generation in one loop, on any key/value store for padded rows: the first engine of the course."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence

import torch

from minillm.checks import check_token_ids
from minillm.errors import InvalidRequestError
from minillm.transformer.decoder import Decoder
from minillm.transformer.kv import KVStore, NoCache, PaddedBatch, pad_right
from minillm.transformer.sampling import GREEDY, Sampling


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    kv: KVStore | None = None,
    *,
    max_tokens: int = 16,
    sampling: Sampling = GREEDY,
    stop_ids: Collection[int] = (),
) -> Iterator[list[int | None]]:
    """Yield, step by step, the next token of every prompt: None for a row that has met a stop token (not yielded).

    The loop feeds whatever the store has not seen: the prompts first, then one token a row; everything again each
    time when the store keeps nothing.

    Args:
        kv: a store that remembers (with room for prompt + max_tokens), or None to recompute everything.
        max_tokens: how many new tokens at most.
    """
    check_prompts(decoder, prompts, max_tokens)
    store = NoCache(decoder.config.attention_specs) if kv is None else kv
    generator = sampling.generator(decoder.device)
    rows = [list(prompt) for prompt in prompts]
    seen, finished = [0] * len(rows), [False] * len(rows)
    for _ in range(max_tokens):
        fed = [row[start:] for row, start in zip(rows, seen, strict=True)]
        batch = PaddedBatch(tuple(seen), tuple(len(tokens) for tokens in fed))
        store.begin(batch)
        hidden = decoder.hidden(pad_right(fed).to(decoder.device), batch.positions(decoder.device), store)
        last = hidden[range(len(rows)), [length - 1 for length in batch.lengths]]
        if store.remembers:
            seen = [len(row) for row in rows]
        chosen: list[int] = sampling.choose(decoder.logits(last), generator).tolist()
        finished = [done or token in stop_ids for done, token in zip(finished, chosen, strict=True)]
        rows = [[*row, token] for row, token in zip(rows, chosen, strict=True)]
        if all(finished):
            return
        yield [None if done else token for done, token in zip(finished, chosen, strict=True)]


def check_prompts(decoder: Decoder, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """Raise InvalidRequestError for what the decoder cannot read: no tokens, ids it does not have, too many."""
    config = decoder.config
    if not prompts or not all(prompts):
        raise InvalidRequestError("every prompt needs at least one token")
    if max_tokens < 1:
        raise InvalidRequestError(f"max_tokens must be at least 1, not {max_tokens}")
    check_token_ids(itertools.chain.from_iterable(prompts), config.vocab_size)
    longest = max(map(len, prompts)) + max_tokens
    if longest > config.max_position_embeddings:
        raise InvalidRequestError(
            f"{longest - max_tokens} prompt tokens and max_tokens={max_tokens} exceed the model's context of "
            f"{config.max_position_embeddings} tokens: shorten the prompt or lower max_tokens"
        )
