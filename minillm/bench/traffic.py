"""Requests and when they are sent: random prompts in a Poisson process, or times and lengths of recorded traffic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minillm.errors import InvalidRequestError
from minillm.simulate.trace import load_trace

WORDS = (  # noqa: SIM905
    "the of and to in is was that it for on with as at be by he she they we you his her are this have from or had not "
    "but what all were when there can an your which their said if do will each about how up out then them some so time "
    "has look two more day could go come did number sound no most people my over know water than call first who may "
    "down side been now find long made day get part new take place work year live back give good name sentence man "
    "think say great where help line turn cause mean before move right boy old too same tell does set three want air"
).split()
"""What prompts are made of where token ids are not to be had."""


@dataclass(frozen=True)
class TimedRequest:
    """A request to be sent.

    Attributes:
        at_s: seconds after the start of the measurement.
        prompt_ids: token ids; for a chat, and for servers that take no ids, a text.
        max_tokens: how many tokens to ask for.
    """

    at_s: float
    prompt_ids: Sequence[int] | str
    max_tokens: int


def poisson(
    num: int, rate: float, input_len: int, output_len: int, seed: int = 0, vocab_size: int | None = None
) -> list[TimedRequest]:
    """Requests of random prompts, all equally long, that arrive independently of each other.

    Args:
        rate: requests a second; infinite: all at once.
        vocab_size: prompts are of token ids below it; of words when None.

    Raises:
        InvalidRequestError: as `arrival_times` and `random_requests`.
    """
    tokens = WORDS if vocab_size is None else range(vocab_size)
    return random_requests(arrival_times(num, rate, 1.0, seed), input_len, output_len, 0.0, tokens, seed)


def arrival_times(num: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """When requests arrive, in seconds: the times between them are of a gamma distribution.

    As vLLM's benchmark does it, they are stretched so that the last arrives at ``num / rate``: the rate is exact.

    Args:
        burstiness: the distribution's shape: 1 is a Poisson process, less comes in bursts, more is more regular;
            infinite: at equal distances.

    Raises:
        InvalidRequestError: a rate or burstiness that is not above 0, or no requests.
    """
    if num < 1 or not rate > 0 or not burstiness > 0:
        raise InvalidRequestError(
            f"{num} requests, rate {rate}, burstiness {burstiness}: each of the three must be above 0"
        )
    if math.isinf(rate):
        return [0.0] * num
    if math.isinf(burstiness):
        gaps = np.ones(num)
    else:
        gaps = np.random.default_rng(seed).gamma(burstiness, 1 / burstiness, num)
    times = np.cumsum(gaps)
    return list((times * (num / rate / times[-1])).tolist())


def random_requests(
    times: Sequence[float],
    input_len: int,
    output_len: int,
    range_ratio: float,
    tokens: Sequence[int] | Sequence[str],
    seed: int,
) -> list[TimedRequest]:
    """Prompts drawn from `tokens`, one for each time.

    Args:
        range_ratio: lengths are drawn evenly between ``length * (1 - range_ratio)`` and ``length * (1 + range_ratio)``.
        tokens: token ids, or words.

    Raises:
        InvalidRequestError: a length below 1, no tokens, or a ratio outside [0, 1).
    """
    if input_len < 1 or output_len < 1 or not tokens or not 0 <= range_ratio < 1:
        raise InvalidRequestError(
            f"lengths of {input_len} and {output_len}, range ratio {range_ratio}, {len(tokens)} tokens to draw from: "
            "the ratio must be in [0, 1), the others at least 1"
        )
    rng = np.random.default_rng(seed)
    inputs, outputs = (_lengths(rng, len(times), length, range_ratio) for length in (input_len, output_len))
    return [
        TimedRequest(at_s, draw_prompt(rng, tokens, int(count)), int(new))
        for at_s, count, new in zip(times, inputs, outputs, strict=True)
    ]


def trace_requests(path: Path, num: int | None, tokens: Sequence[int] | Sequence[str], seed: int) -> list[TimedRequest]:
    """The requests of recorded traffic: their times and lengths, with random prompts.

    Args:
        num: the first so many; all when None.

    Raises:
        InvalidRequestError: a file that is no trace, or that holds fewer.
    """
    found = load_trace(path, limit=num)
    if num is not None and len(found) < num:
        raise InvalidRequestError(f"{path} holds {len(found)} requests: set --num-prompts to that or lower")
    rng = np.random.default_rng(seed)
    return [TimedRequest(one.time, draw_prompt(rng, tokens, one.prompt_tokens), one.output_tokens) for one in found]


def draw_prompt(rng: np.random.Generator, tokens: Sequence[int] | Sequence[str], length: int) -> list[int] | str:
    """So many of the tokens at random: their ids, or words with spaces between."""
    drawn = [tokens[index] for index in rng.integers(len(tokens), size=length)]
    return " ".join(map(str, drawn)) if isinstance(tokens[0], str) else [int(token) for token in drawn]


def _lengths(rng: np.random.Generator, count: int, length: int, ratio: float) -> np.ndarray:
    low, high = math.floor(length * (1 - ratio)), math.ceil(length * (1 + ratio))
    return rng.integers(max(1, low), high, size=count, endpoint=True)
