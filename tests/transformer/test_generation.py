"""The generation loop: batches equal single prompts, stops stop, bad prompts are refused."""

from __future__ import annotations

import pytest
import torch

from minillm.cache.contiguous import ContiguousCache
from minillm.errors import InvalidRequestError
from minillm.transformer.generation import generate
from minillm.transformer.sampling import Sampling
from tests.transformer.test_kv import small_decoder

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [3]]


def columns(steps: list[list[int | None]]) -> list[list[int | None]]:
    return [list(column) for column in zip(*steps, strict=True)]


@pytest.mark.parametrize("cached", [False, True])
def test_a_batch_writes_what_each_prompt_alone_does(cached):
    decoder = small_decoder()

    def store(rows: int) -> ContiguousCache | None:
        return ContiguousCache.for_decoder(decoder, rows, 40) if cached else None

    together = columns(list(generate(decoder, PROMPTS, store(3), max_tokens=20)))
    alone = [columns(list(generate(decoder, [prompt], store(1), max_tokens=20)))[0] for prompt in PROMPTS]
    assert together == alone


def test_a_stopped_row_is_silent_and_the_others_go_on():
    decoder = small_decoder()
    free = columns(list(generate(decoder, PROMPTS, max_tokens=20)))
    stop = free[0][5]
    stopped = columns(list(generate(decoder, PROMPTS, max_tokens=20, stop_ids={stop})))
    for ours, theirs in zip(stopped, free, strict=True):
        length = theirs.index(stop) if stop in theirs else 20
        expected = [*theirs[:length], *[None] * (20 - length)]
        assert ours == expected[: len(ours)]
    assert len(list(generate(decoder, PROMPTS[:1], max_tokens=20, stop_ids={stop}))) == free[0].index(stop)


def test_seeded_draws_repeat():
    decoder = small_decoder()
    runs = [list(generate(decoder, PROMPTS, max_tokens=8, sampling=Sampling(seed=seed))) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("prompts", "max_tokens", "message"),
    [
        ([], 5, "at least one token"),
        ([[1], []], 5, "at least one token"),
        ([[1, 50]], 5, r"must be in \[0, 50\), not \[50\]"),
        ([[-1]], 5, r"not \[-1\]"),
        ([[1]], 0, "max_tokens must be at least 1"),
        ([[1] * 60], 5, "context of 64 tokens"),
    ],
)
def test_bad_prompts_are_refused(prompts, max_tokens, message):
    with pytest.raises(InvalidRequestError, match=message):
        list(generate(small_decoder(), prompts, max_tokens=max_tokens))


def test_the_last_place_of_the_context_is_used():
    steps = list(
        generate(small_decoder(), [[1] * 60], ContiguousCache.for_decoder(small_decoder(), 1, 64), max_tokens=4)
    )
    assert len(steps) == 4


@torch.inference_mode()
def test_the_loop_is_short():
    """It is shown whole in the notebooks: at most 40 lines without its docstring."""
    import inspect

    source = inspect.getsource(inspect.unwrap(generate))
    code = source.replace(inspect.unwrap(generate).__doc__, "")
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
