"""What is measured: prompts and how many tokens to write for each."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from minillm.bench.worker import common_beginning
from minillm.errors import ConfigError, InvalidRequestError

SEED = 0


class Ask(NamedTuple):
    """A prompt, and how many tokens are to be written for it."""

    prompt: list[int]
    output_len: int


@dataclass(frozen=True)
class Workload:
    """Prompts that arrive together.

    Attributes:
        what: one line that describes it.
    """

    name: str
    what: str
    asks: list[Ask]

    @property
    def is_single(self) -> bool:
        """Whether it is one request: what counts then is the time between tokens, and before the first one."""
        return len(self.asks) == 1

    @property
    def output_tokens(self) -> int:
        return sum(ask.output_len for ask in self.asks)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(len(ask.prompt) + ask.output_len for ask in self.asks)

    @property
    def shared_prefix(self) -> int:
        """Leading tokens that all of several prompts have in common."""
        return 0 if self.is_single else common_beginning([ask.prompt for ask in self.asks])

    def shortened(self, output_len: int) -> Workload:
        """The same prompts with at most so many new tokens each: to warm up."""
        return Workload(self.name, self.what, [Ask(ask.prompt, min(ask.output_len, output_len)) for ask in self.asks])


def _one(prompt_len: int, output_len: int) -> Callable[[random.Random, int], list[Ask]]:
    return lambda rng, vocab_size: [Ask(_tokens(rng, vocab_size, prompt_len), output_len)]


def _many(rng: random.Random, vocab_size: int) -> list[Ask]:
    return [Ask(_tokens(rng, vocab_size, rng.randint(16, 256)), rng.randint(16, 256)) for _ in range(64)]


def _sharing(rng: random.Random, vocab_size: int) -> list[Ask]:
    prefix = _tokens(rng, vocab_size, 512)
    return [Ask(prefix + _tokens(rng, vocab_size, 16), 32) for _ in range(32)]


_WORKLOADS: dict[str, tuple[str, Callable[[random.Random, int], list[Ask]]]] = {
    "W1": ("one prompt of 32 tokens, 128 new", _one(32, 128)),
    "W2": ("64 requests at once, prompts and answers of 16 to 256 tokens", _many),
    "W3": ("32 requests that share 512 tokens, 16 of their own, 32 new", _sharing),
    "W4": ("one prompt of 4,096 tokens, 64 new", _one(4096, 64)),
}
WORKLOADS = tuple(_WORKLOADS)


def workload(name: str, vocab_size: int) -> Workload:
    """One of `WORKLOADS`, of random tokens; always the same ones.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in _WORKLOADS:
        raise ConfigError(f"workload {name!r} is not one of {', '.join(WORKLOADS)}")
    what, make = _WORKLOADS[name]
    return Workload(name, what, make(random.Random(SEED), vocab_size))


def random_asks(count: int, input_len: int, output_len: int, vocab_size: int, seed: int) -> list[Ask]:
    """Prompts of random tokens, all equally long."""
    rng = random.Random(seed)
    return [Ask(_tokens(rng, vocab_size, input_len), output_len) for _ in range(count)]


def sharegpt_asks(
    path: Path, count: int, tokenizer: PreTrainedTokenizerBase, max_len: int, output_len: int | None, seed: int
) -> list[Ask]:
    """First questions of recorded conversations, in random order; as many new tokens as the recorded answer has.

    Args:
        path: a JSON list of ``{"conversations": [{"value": question}, {"value": answer}, …]}``.
        max_len: longer ones are left out, as are questions and answers of less than four tokens.
        output_len: write so many tokens instead.

    Raises:
        ConfigError: the file cannot be read, or is not of that form.
        InvalidRequestError: it holds fewer conversations that fit.
    """
    turns = list(_first_turns(path))
    random.Random(seed).shuffle(turns)
    found: list[Ask] = []
    for question, answer in turns:
        prompt = list(tokenizer(question).input_ids)
        new = len(tokenizer(answer, add_special_tokens=False).input_ids) if output_len is None else output_len
        if len(prompt) >= 4 and (output_len is not None or new >= 4) and len(prompt) + new <= max_len:
            found.append(Ask(prompt, new))
        if len(found) == count:
            return found
    raise InvalidRequestError(
        f"{path} holds {len(found)} conversations that fit into {max_len} tokens: set --num-prompts to that or lower"
    )


def _first_turns(path: Path) -> Iterator[tuple[str, str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    try:
        conversations: list[Sequence[dict[str, Any]]] = [entry["conversations"] for entry in content]
        yield from ((str(talk[0]["value"]), str(talk[1]["value"])) for talk in conversations if len(talk) >= 2)
    except (TypeError, LookupError) as error:
        raise ConfigError(
            f"{path} is not of ShareGPT's form, a list of "
            '{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}'
        ) from error


def _tokens(rng: random.Random, vocab_size: int, count: int) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(count)]
