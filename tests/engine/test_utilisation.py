"""Of the slots in the blocks that requests hold, nearly all hold a token (Kwon et al. 2023, §4.2: at most one block a
sequence is not full)."""

from __future__ import annotations

import random

from minillm import LLM, SamplingParams

SIZE = 16


def test_slots_are_used_while_requests_are_preempted(report):
    """64 requests at once, prompts and answers of 16 to 256 tokens, memory for about twenty of them."""
    rng = random.Random(0)
    prompts = [[rng.randrange(1000) for _ in range(rng.randint(16, 256))] for _ in range(64)]
    params = [SamplingParams(temperature=0, max_tokens=rng.randint(16, 256), ignore_eos=True) for _ in prompts]
    sizes = {"block_size": SIZE, "num_gpu_blocks_override": 320, "max_model_len": 512}
    with LLM("tiny", dtype="float32", device="cpu", trace=True, enable_prefix_caching=False, **sizes) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        steps = llm.trace.steps
    assert [len(output.outputs[0].token_ids) for output in outputs] == [one.max_tokens for one in params]
    preempted = sum(len(step.preempted) for step in steps)
    assert preempted > 0
    shares = []
    for step in steps:
        assert {part.name for part in step.parts} == set(step.running), "so that the parts tell of all that is held"
        tokens = sum(part.start + part.count for part in step.parts)
        shares.append(tokens / (SIZE * sum(len(part.blocks) for part in step.parts)))
    utilisation = sum(shares) / len(shares)
    assert utilisation >= 0.95
    report("KV memory", f"{utilisation:.1%} of the slots held a token; {preempted} preemptions in {len(steps)} steps")
