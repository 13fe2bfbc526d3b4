"""Beam search of a decoder-only model, on forked block tables.

Beams that go on from one beam share its blocks; the last, partly filled one is copied when it is written (Kwon et al.
2023, §4.4). Tokens and scores are those of transformers' beam search with ``early_stopping=False``: an answer's score
is its log-probability over its length, end token included, to the power of the length penalty. (vLLM counts the
prompt's tokens in that length, and leaves the end token out.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from minillm.cache.block_pool import BlockPool
from minillm.cache.block_table import BlockTable
from minillm.engine.params import BeamSearchParams
from minillm.engine.runner import Chunk, ModelRunner
from minillm.transformer.search import Hypothesis, best_continuations, collect


def beam_search(
    runner: ModelRunner,
    pool: BlockPool,
    prompt: Sequence[int],
    params: BeamSearchParams,
    *,
    end_ids: frozenset[int],
    max_num_batched_tokens: int,
) -> list[Hypothesis]:
    """The best answers to a prompt, best first, without the end token.

    Raises:
        CacheFullError: the beams do not fit into the pool.
    """
    tables = [BlockTable(pool)]
    try:
        logits = _read_prompt(runner, tables[0], prompt, max_num_batched_tokens).expand(params.beam_width, -1)
        tables += [tables[0].fork() for _ in range(params.beam_width - 1)]
        return _search(runner, tables, logits, len(prompt), params, end_ids)
    finally:
        for table in tables:
            table.free()


def _read_prompt(
    runner: ModelRunner, table: BlockTable, prompt: Sequence[int], max_num_batched_tokens: int
) -> Float[Tensor, "1 vocab"]:
    """Compute a prompt in pieces; return the logits of what follows."""
    for start in range(0, len(prompt), max_num_batched_tokens):
        piece = prompt[start : start + max_num_batched_tokens]
        table.append(len(piece))
        hidden = runner.hidden([Chunk(piece, start, table)])
    return runner.logits(hidden[-1:])


def _search(
    runner: ModelRunner,
    tables: list[BlockTable],
    logits: Float[Tensor, "rows vocab"],
    num_prompt: int,
    params: BeamSearchParams,
    end_ids: frozenset[int],
) -> list[Hypothesis]:
    """`tables` holds the beams' memory, at any moment, for the caller to free."""
    width, alpha = params.beam_width, params.length_penalty
    ends_at = torch.tensor([] if params.ignore_eos else sorted(end_ids), dtype=torch.int64, device=logits.device)
    tokens = torch.zeros((width, 1), dtype=torch.int64, device=logits.device)  # the first column is no token
    log_probs = torch.full((1, width), -math.inf, device=logits.device)
    log_probs[:, 0] = 0.0  # all beams begin alike: one of them is enough
    finished: list[list[Hypothesis]] = [[]]
    for n in range(1, params.max_tokens + 1):
        best = best_continuations(log_probs, logits / (params.temperature or 1.0), len(ends_at))
        ends = torch.isin(best.tokens, ends_at) | (n == params.max_tokens)
        collect(finished, tokens, best, ends[:, :width], end_ids, n**alpha)
        log_probs, going = best.log_probs.masked_fill(ends, -math.inf).topk(width)
        if len(finished[0]) == width and finished[0][-1].score >= float(log_probs[0, 0]) / n**alpha:
            break
        rows, chosen = best.rows.gather(1, going)[0], best.tokens.gather(1, going)[0]
        tokens = torch.cat([tokens[rows], chosen[:, None]], dim=1)
        forked = [tables[row].fork() for row in rows.tolist()]
        for table in tables:
            table.free()
        tables[:] = forked
        if n < params.max_tokens:
            logits = _next_logits(runner, tables, chosen.tolist(), num_prompt + n - 1)
    return finished[0]


def _next_logits(
    runner: ModelRunner, tables: Sequence[BlockTable], tokens: Sequence[int], position: int
) -> Float[Tensor, "rows vocab"]:
    chunks = []
    for table, token in zip(tables, tokens, strict=True):
        copies = table.append(1)
        chunks.append(Chunk([token], position, table, 0, copies))
    return runner.logits(runner.hidden(chunks))
