"""What a generation gives back, in vLLM's form."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability.

    Attributes:
        logprob: natural logarithm of the model's own probability, before temperature and penalties.
        rank: 1 for the likeliest.
        decoded_token: its text.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""Token → its log-probability: the chosen token's and the likeliest ones'."""


@dataclass
class CompletionOutput:
    """One answer.

    Attributes:
        index: which of the `n` answers.
        cumulative_logprob: sum of the chosen tokens' log-probabilities, where they were asked for.
        logprobs: for each token.
        finish_reason: "stop" (an end token or a stop text), "length", "abort", "error" (there was no token to choose);
            None while it is being written.
        stop_reason: the stop text or token, None for the end-of-sequence token; what is wrong after an error.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether no more will come."""
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """When what happened, in seconds of a clock that only runs forward.

    Attributes:
        num_preemptions: how often its memory was taken away and computed again.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


@dataclass
class RequestOutput:
    """A prompt and its answers.

    Attributes:
        prompt_logprobs: for each token of the prompt, the first one's None.
        num_cached_tokens: how many of the prompt's tokens were found in memory and not computed.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None


@dataclass
class BeamSearchSequence:
    """A beam.

    Attributes:
        tokens: the prompt's and those written.
        cum_logprob: sum of the log-probabilities of what was written.
        score: what beams are compared by.
        text: what was written.
        finish_reason: "stop" or "length".
    """

    tokens: list[int]
    cum_logprob: float
    score: float
    text: str = ""
    finish_reason: str | None = None


@dataclass
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSearchSequence] = field(default_factory=list)
