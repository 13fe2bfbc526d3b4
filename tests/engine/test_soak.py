"""Two thousand random requests through a tiny pool: none is lost, no block is kept, each is what it is alone."""

from __future__ import annotations

import random

import pytest

from minillm import LLM, SamplingParams, get_tokenizer
from tests.engine.test_families import PROMPTS
from tests.models.families import FAMILIES

REQUESTS, COMPARED = 2000, 700


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of 160 tokens, with the tokenizer of `tiny` (its first 160 tokens are bytes and short pieces)."""
    folder = tmp_path_factory.mktemp("model")
    FAMILIES["llama"](folder)
    get_tokenizer("tiny").save_pretrained(folder)
    return folder


def random_request(rng: random.Random) -> tuple[list[int], SamplingParams]:
    prompt = list(rng.choice(PROMPTS))
    if rng.random() < 0.5:
        prompt += [rng.randrange(160) for _ in range(rng.randrange(1, 20))]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789 .,"
    params = SamplingParams(
        n=rng.choice((1, 1, 1, 2, 3)),
        temperature=rng.choice((0.0, 0.0, 1.0)),
        seed=rng.randrange(1000),
        max_tokens=rng.randrange(1, 16),
        stop_token_ids=[rng.randrange(160) for _ in range(rng.choice((0, 0, 5)))],
        stop=[rng.choice(letters) for _ in range(rng.choice((0, 0, 2)))],
        top_k=rng.choice((0, 5)),
        ignore_eos=True,
    )
    return prompt, params


def test_soak(folder, report):
    rng = random.Random(0)
    sizes = {"dtype": "float32", "device": "cpu", "max_model_len": 100, "block_size": 4}
    with LLM(folder, **sizes, num_gpu_blocks_override=60, max_num_seqs=8, max_num_batched_tokens=32) as llm:
        engine, pool = llm.engine, llm.engine.scheduler.pool
        asked, done, aborted = {}, {}, set()
        while len(asked) < REQUESTS or engine.has_unfinished_requests:
            for _ in range(rng.randrange(4)):
                if len(asked) < REQUESTS:
                    name = str(len(asked))
                    asked[name] = random_request(rng)
                    engine.add_request(name, *asked[name])
            for output in engine.step():
                if output.finished:
                    assert output.request_id not in done
                    done[output.request_id] = output
            if rng.random() < 0.05:
                name = str(rng.randrange(len(asked)))
                if (output := engine.abort(name)) is not None:
                    assert {answer.finish_reason for answer in output.outputs} >= {"abort"}
                    aborted.add(name)
        assert pool.num_free == pool.num_blocks
        assert not engine.scheduler.has_requests
        assert done.keys() | aborted == asked.keys()
        assert not done.keys() & aborted
        preemptions = engine.counts.num_preemptions
    assert preemptions > 0
    assert aborted

    by_text = {name for name, output in done.items() if any(isinstance(one.stop_reason, str) for one in output.outputs)}
    assert len(by_text) > 20
    compared = by_text.union(rng.sample(sorted(done), COMPARED))
    with LLM(folder, **sizes, max_num_seqs=4) as llm:
        for name in sorted(compared):
            prompt, params = asked[name]
            (expected,) = llm.generate([prompt], params, use_tqdm=False)
            assert done[name].outputs == expected.outputs, name
    told = f"{REQUESTS} requests, {len(aborted)} aborted, {preemptions} preemptions"
    report("soak", f"{told}, {len(compared)} compared alone, {len(by_text)} ended by a stop text")
