"""From a source to a target: greedy search and beam search, on any key/value store.

Sources: beam search as in Vaswani et al. 2017, §6.1 (4 beams, α = 0.6), with the length penalty of Wu et al. 2016,
"Google's Neural Machine Translation System", §7.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minillm.checks import check_token_ids
from minillm.errors import InvalidRequestError
from minillm.transformer.kv import KVStore, NoCache, PaddedBatch, ReorderableStore, pad_right
from minillm.transformer.seq2seq import Memory, Seq2Seq, check_eval_mode


class Hypothesis(NamedTuple):
    """A target that beam search found.

    Attributes:
        tokens: without start and stop tokens.
        score: log-probability / ((5 + n) / 6)^α; n counts the tokens and the stop token, if it was reached.
    """

    tokens: list[int]
    score: float


@torch.inference_mode()
def greedy_search(
    model: Seq2Seq,
    sources: Sequence[Sequence[int]],
    *,
    start_id: int,
    stop_id: int,
    max_tokens: int,
    kv: KVStore | None = None,
) -> list[list[int]]:
    """Take the likeliest token at every step; return each source's target without start and stop tokens.

    Args:
        max_tokens: of a target at most, the stop token included.
        kv: a store that remembers, with a row a source and room for max_tokens; None recomputes everything.

    Raises:
        InvalidRequestError: no sources or empty ones, ids that the model does not have, too many tokens, a model
            whose dropout is on.
    """
    check_request(model, sources, start_id, stop_id, max_tokens)
    store = NoCache(model.config.attention_specs) if kv is None else kv
    memory = encode_sources(model, sources)
    tokens = torch.full((len(sources), 1), start_id, device=model.device)
    stopped = torch.zeros(len(sources), dtype=torch.bool, device=model.device)
    for _ in range(max_tokens):
        chosen = next_logits(model, tokens, memory, store).argmax(dim=-1)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        stopped |= chosen == stop_id
        if stopped.all():
            break
    # Rows that stopped early went on with the others: what they wrote after the stop token is cut off.
    rows: list[list[int]] = tokens[:, 1:].tolist()
    return [row[: row.index(stop_id)] if stop_id in row else row for row in rows]


@torch.inference_mode()
def beam_search(
    model: Seq2Seq,
    sources: Sequence[Sequence[int]],
    *,
    start_id: int,
    stop_id: int,
    max_tokens: int,
    num_beams: int = 4,
    length_penalty: float = 0.6,
    kv: ReorderableStore | None = None,
) -> list[list[Hypothesis]]:
    """Keep the `num_beams` likeliest unfinished targets at every step; return each source's finished ones, best first.

    A target that takes the stop token leaves the beam, and the next likeliest takes its place. A source is done when
    it has `num_beams` finished targets and nothing in its beam can still beat the worst of them.

    Args:
        max_tokens: of a target at most, the stop token included; a longer one is cut off there, and counts.
        length_penalty: α; 0 compares log-probabilities, more favours longer targets.
        kv: a store that remembers, with ``len(sources) * num_beams`` rows and room for max_tokens; None recomputes
            everything.

    Raises:
        InvalidRequestError: as `greedy_search`, and for num_beams below 1 or a negative length_penalty.
    """
    check_request(model, sources, start_id, stop_id, max_tokens)
    check_beams(num_beams, length_penalty)
    store = NoCache(model.config.attention_specs) if kv is None else kv
    every_beam = torch.arange(len(sources), device=model.device).repeat_interleave(num_beams)
    memory = encode_sources(model, sources).select(every_beam)
    tokens = torch.full((len(every_beam), 1), start_id, device=model.device)
    log_probs = torch.full((len(sources), num_beams), -math.inf, device=model.device)
    log_probs[:, 0] = 0.0  # the beams of a source begin alike: one of them is enough
    finished: list[list[Hypothesis]] = [[] for _ in sources]
    for n in range(1, max_tokens + 1):
        best = best_continuations(log_probs, next_logits(model, tokens, memory, store))
        ends = (best.tokens == stop_id) | (n == max_tokens)
        collect(finished, tokens, best, ends[:, :num_beams], {stop_id}, penalty(n, length_penalty))

        log_probs, going = best.log_probs.masked_fill(ends, -math.inf).topk(num_beams)
        # Log-probabilities only fall, and no target is longer than max_tokens: no beam's score can come to exceed this.
        bounds = (log_probs[:, 0] / penalty(max_tokens, length_penalty)).tolist()
        if all(len(row) == num_beams and row[-1].score >= bound for row, bound in zip(finished, bounds, strict=True)):
            break
        rows = best.rows.gather(1, going).flatten()
        tokens = torch.cat([tokens[rows], best.tokens.gather(1, going).flatten()[:, None]], dim=1)
        store.reorder(rows)
    return finished


class Continuations(NamedTuple):
    """The best ways to go on from each source's beams, best first.

    Attributes:
        log_probs: of the target so far, this token included.
        rows: which row of the batch goes on.
        tokens: with which token.
    """

    log_probs: Float[Tensor, "batch continuations"]
    rows: Int[Tensor, "batch continuations"]
    tokens: Int[Tensor, "batch continuations"]


def best_continuations(
    log_probs: Float[Tensor, "batch beams"], logits: Float[Tensor, "rows vocab"], num_stops: int = 1
) -> Continuations:
    """The best of beams · vocab, so many that enough go on: at most `num_stops` of a beam are stop tokens."""
    batch_size, num_beams = log_probs.shape
    vocab_size = logits.shape[-1]
    steps = logits.log_softmax(dim=-1, dtype=torch.float32).view(batch_size, num_beams, vocab_size)
    best, index = (
        (log_probs[..., None] + steps).flatten(1).topk(min((1 + max(num_stops, 1)) * num_beams, num_beams * vocab_size))
    )
    first_row = torch.arange(batch_size, device=logits.device)[:, None] * num_beams
    return Continuations(best, first_row + index // vocab_size, index % vocab_size)


def collect(
    finished: list[list[Hypothesis]],
    tokens: Int[Tensor, "rows target"],
    best: Continuations,
    ends: Bool[Tensor, "batch beams"],
    stop_ids: Collection[int],
    penalty: float,
) -> None:
    """Put what ends among the best `beams` continuations of each source into its list: best first, at most `beams`.

    A stop token further down does not count, as in fairseq and transformers: otherwise a poor target would finish
    merely because its list is not full yet.
    """
    for source, rank in ends.nonzero().tolist():
        log_prob, token = float(best.log_probs[source, rank]), int(best.tokens[source, rank])
        if log_prob > -math.inf:
            written = tokens[best.rows[source, rank], 1:].tolist() + [token] * (token not in stop_ids)
            finished[source].append(Hypothesis(written, log_prob / penalty))
            finished[source].sort(key=lambda hypothesis: -hypothesis.score)
            del finished[source][ends.shape[1] :]


def penalty(n: int, alpha: float) -> float:
    """What the log-probability of n tokens is divided by: ((5 + n) / 6)^α (Wu et al. 2016, eq. 14)."""
    return ((5 + n) / 6) ** alpha


def encode_sources(model: Seq2Seq, sources: Sequence[Sequence[int]]) -> Memory:
    """One padded batch of all sources, read by the encoder."""
    return model.encode(pad_right(sources).to(model.device), [len(source) for source in sources])


def next_logits(
    model: Seq2Seq, tokens: Int[Tensor, "rows target"], memory: Memory, kv: KVStore
) -> Float[Tensor, "rows vocab"]:
    """Logits after the last token of each row; feeds what the store has not seen: one column, or everything."""
    rows, length = tokens.shape
    start = length - 1 if kv.remembers else 0
    kv.begin(PaddedBatch.full(rows, length - start, start))
    positions = torch.arange(start, length, device=tokens.device)[None]
    return model.logits(model.hidden(tokens[:, start:], positions, kv, memory)[:, -1])


def check_request(
    model: Seq2Seq, sources: Sequence[Sequence[int]], start_id: int, stop_id: int, max_tokens: int
) -> None:
    """Raise InvalidRequestError for what the model cannot do."""
    check_eval_mode(model)
    config = model.config
    if not sources or not all(sources):
        raise InvalidRequestError("every source needs at least one token")
    check_token_ids({start_id, stop_id}.union(*sources), config.vocab_size)
    if not 1 <= max_tokens <= config.max_position_embeddings:
        raise InvalidRequestError(
            f"max_tokens must be between 1 and the model's {config.max_position_embeddings} positions, not {max_tokens}"
        )


def check_beams(num_beams: int, length_penalty: float) -> None:
    """Raise InvalidRequestError for a beam without room, or a penalty for which the search's bound would not hold."""
    if num_beams < 1:
        raise InvalidRequestError(f"num_beams must be at least 1, not {num_beams}")
    if not 0 <= length_penalty < math.inf:
        raise InvalidRequestError(f"length_penalty must be 0 or a positive number, not {length_penalty}")
