"""One sequence on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch
from llguidance import LLMatcher

from minillm.cache.block_pool import ROOT, block_hash
from minillm.cache.block_table import BlockTable
from minillm.engine.outputs import RequestMetrics, TokenLogprobs
from minillm.engine.params import SamplingParams


class Status(Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """A prompt, what has been written behind it, and the memory that holds its keys and values.

    There is no prefill and no decode: `num_computed_tokens` catches up with `num_tokens`, many tokens a step at first
    and one a step later.

    Attributes:
        index: which of a prompt's `n` answers this is.
        siblings: the prompt's other answers, which fork this one's memory when the prompt is computed.
        num_computed_tokens: tokens whose keys and values are stored.
        num_cached_tokens: how many of them were found in memory when it was first scheduled.
        prompt_logprobs: of the prompt's tokens, as they are computed; None where they are not asked for.
        bad_word_ids: sequences of tokens whose last one is not written behind the others.
        matcher: where the answer is in the grammar that it follows, if it follows one.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    table: BlockTable
    metrics: RequestMetrics
    index: int = 0
    generator: torch.Generator | None = None
    siblings: list[Request] = field(default_factory=list)
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None
    status: Status = Status.WAITING
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    cumulative_logprob: float = 0.0
    bad_word_ids: list[list[int]] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    matcher: LLMatcher | None = None

    @property
    def name(self) -> str:
        """What tells it from all others: its id, and which answer it is where there are several."""
        return f"{self.request_id}/{self.index}" if self.params.n > 1 else self.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_complete(self) -> bool:
        """Whether it follows a grammar that lets nothing follow."""
        return self.matcher is not None and self.matcher.is_stopped() and not self.matcher.is_error()

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens start … end - 1 of prompt and answer."""
        prompt = len(self.prompt_token_ids)
        if start >= prompt:
            return self.output_token_ids[start - prompt : end - prompt]
        return self.prompt_token_ids[start:end] + self.output_token_ids[: max(0, end - prompt)]

    def hashes(self, num_tokens: int) -> list[bytes]:
        """The chained hashes of the full blocks among the first `num_tokens` tokens; each is computed once."""
        size = self.table.pool.block_size
        while (len(self.block_hashes) + 1) * size <= num_tokens:
            start = len(self.block_hashes) * size
            parent = self.block_hashes[-1] if self.block_hashes else ROOT
            self.block_hashes.append(block_hash(parent, self.tokens(start, start + size)))
        return self.block_hashes[: num_tokens // size]
