"""`LLM` on the bundled model: what is asked for is what comes, whatever shares the batch."""

from __future__ import annotations

import gc
import math
import re
import warnings
import weakref
from itertools import pairwise

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import minillm
from minillm import LLM, SamplingParams
from minillm.engine.params import BeamSearchParams, RequestOutputKind
from minillm.errors import ConfigError, InvalidRequestError, MinillmError, OutOfMemoryError, TokenizerError
from minillm.models.source import BUNDLED
from tests.helpers import SHARED, TokenComparison, reference_greedy, reference_logits

PROMPTS = ["Once upon a time", "Mia had a red kite.", "One sunny morning Tom", "Long ago there lived"]
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    with LLM("tiny", dtype="float32", device="cpu", max_num_seqs=16, max_num_batched_tokens=64) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(BUNDLED["tiny"], dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(llm):
    yield
    assert not llm.engine.has_unfinished_requests
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_blocks


def generate(llm, prompts, params):
    return llm.generate(prompts, params, use_tqdm=False)


def test_greedy_is_transformers(llm, reference):
    compared = TokenComparison()
    for prompt, output in zip(PROMPTS, generate(llm, PROMPTS, GREEDY), strict=True):
        ids = llm.get_tokenizer()(prompt).input_ids
        tokens, gaps = reference_greedy(reference, ids, 30)
        answer = output.outputs[0]
        assert output.prompt == prompt
        assert output.prompt_token_ids == ids
        assert answer.finish_reason == "length"
        compared.add(answer.token_ids, tokens, gaps)
        assert answer.text == llm.get_tokenizer().decode(answer.token_ids, skip_special_tokens=True)
    assert compared.equal == 120


def test_prompts_in_all_their_forms(llm):
    ids = llm.get_tokenizer()(PROMPTS[0]).input_ids
    expected = generate(llm, PROMPTS[0], GREEDY)[0].outputs[0].token_ids
    for prompt in (PROMPTS[0], ids, {"prompt": PROMPTS[0]}, {"prompt_token_ids": ids}):
        assert generate(llm, prompt, GREEDY)[0].outputs[0].token_ids == expected
        assert [o.outputs[0].token_ids for o in generate(llm, [prompt, prompt], GREEDY)] == [expected] * 2


def test_logprobs_are_the_models_own(llm, reference):
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=8, logprobs=3, prompt_logprobs=2)
    (output,) = generate(llm, PROMPTS[1], params)
    answer = output.outputs[0]
    ids = output.prompt_token_ids + answer.token_ids
    expected = reference_logits(reference, [ids])[0].log_softmax(dim=-1)
    for at, found in enumerate(output.prompt_logprobs):
        if at == 0:
            assert found is None
            continue
        assert found[ids[at]].logprob == pytest.approx(float(expected[at - 1, ids[at]]), abs=1e-4)
        assert 2 <= len(found) <= 3
    for at, found in enumerate(answer.logprobs, start=len(output.prompt_token_ids)):
        best = expected[at - 1].topk(3).indices.tolist()
        assert set(found) == {ids[at], *best}
        for token, logprob in found.items():
            assert logprob.logprob == pytest.approx(float(expected[at - 1, token]), abs=1e-4)
            assert logprob.rank == 1 + int((expected[at - 1] > expected[at - 1, token]).sum())
            assert logprob.decoded_token == llm.get_tokenizer().decode([token])
    total = sum(found[token].logprob for found, token in zip(answer.logprobs, answer.token_ids, strict=True))
    assert answer.cumulative_logprob == pytest.approx(total)


def test_a_seed_gives_the_same_draws_whatever_shares_the_batch(llm):
    seeded = SamplingParams(temperature=1.0, seed=7, max_tokens=20)
    alone = generate(llm, PROMPTS[0], seeded)[0].outputs[0].token_ids
    others = [SamplingParams(temperature=1.5, max_tokens=25), SamplingParams(temperature=0, max_tokens=3)]
    outputs = generate(llm, [PROMPTS[2], PROMPTS[0], PROMPTS[3]], [others[0], seeded, others[1]])
    assert outputs[1].outputs[0].token_ids == alone


def test_n_answers_are_those_of_n_seeds_and_share_the_prompt(llm):
    prompt = PROMPTS[1] * 6
    several = generate(llm, prompt, SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=12))[0]
    assert [answer.index for answer in several.outputs] == [0, 1, 2, 3]
    for index, answer in enumerate(several.outputs):
        single = SamplingParams(temperature=1.0, seed=3 + index, max_tokens=12)
        assert generate(llm, prompt, single)[0].outputs[0].token_ids == answer.token_ids
    assert len({tuple(answer.token_ids) for answer in several.outputs}) > 1


def test_siblings_hold_the_prompts_blocks_together(llm):
    pool = llm.engine.scheduler.pool
    ids = llm.get_tokenizer()(PROMPTS[1] * 6).input_ids
    llm.engine.add_request("several", ids, SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=4))
    held = []
    while llm.engine.has_unfinished_requests:
        llm.engine.step()
        held.append(pool.num_blocks - pool.num_free)
    full, size = len(ids) // pool.block_size, pool.block_size
    assert max(held) <= full + 4 * (-(-(len(ids) % size + 4) // size))


def test_more_answers_than_seats():
    with LLM("tiny", dtype="float32", device="cpu", max_num_seqs=2, max_model_len=64) as small:
        outputs = small.generate(PROMPTS[0], SamplingParams(n=5, seed=1, max_tokens=6), use_tqdm=False)[0].outputs
    assert [len(answer.token_ids) for answer in outputs] == [6] * 5


@pytest.mark.parametrize("beams", [2, 4, 8])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_beams_are_transformers(llm, reference, beams, length_penalty):
    prompt = PROMPTS[2]
    ids = llm.get_tokenizer()(prompt).input_ids
    expected = reference.generate(
        torch.tensor([ids]),
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=20,
        do_sample=False,
        length_penalty=length_penalty,
        early_stopping=False,
        return_dict_in_generate=True,
        output_scores=True,
        eos_token_id=[0, 2, 13],  # a full stop, so that beams end
        pad_token_id=0,
    )
    ends, llm._end_ids = llm._end_ids, frozenset({0, 2, 13})
    try:
        params = BeamSearchParams(beam_width=beams, max_tokens=20, length_penalty=length_penalty)
        (output,) = llm.beam_search([prompt], params)
    finally:
        llm._end_ids = ends
    for ours, theirs, score in zip(
        output.sequences, expected.sequences.tolist(), expected.sequences_scores.tolist(), strict=True
    ):
        written = theirs[len(ids) :]
        stop = next((at for at, token in enumerate(written) if token in (0, 2, 13)), len(written))
        assert ours.tokens == ids + written[:stop]
        assert ours.score == pytest.approx(score, abs=1e-4)
        assert ours.text == llm.get_tokenizer().decode(ours.tokens, skip_special_tokens=True)


def test_stops(llm):
    text = generate(llm, PROMPTS[0], SamplingParams(temperature=0, max_tokens=60))[0].outputs[0].text
    stop = text[25:34]  # across the borders of tokens
    for include in (False, True):
        params = SamplingParams(temperature=0, max_tokens=60, stop=stop, include_stop_str_in_output=include)
        answer = generate(llm, PROMPTS[0], params)[0].outputs[0]
        assert answer.text == text[: text.index(stop) + len(stop) * include]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    tokens = generate(llm, PROMPTS[0], SamplingParams(temperature=0, max_tokens=60))[0].outputs[0].token_ids
    params = SamplingParams(temperature=0, max_tokens=60, stop_token_ids=[tokens[9]])
    answer = generate(llm, PROMPTS[0], params)[0].outputs[0]
    assert answer.token_ids == tokens[: tokens.index(tokens[9]) + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", tokens[9])


def test_streams_join_to_the_whole_and_hold_back_what_may_be_a_stop(llm):
    whole = generate(llm, PROMPTS[0], SamplingParams(temperature=0, max_tokens=60))[0].outputs[0]
    for stop in (None, whole.text[40:60]):
        expected = whole.text if stop is None else whole.text[: whole.text.index(stop)]
        params = SamplingParams(temperature=0, max_tokens=60, stop=stop, output_kind=RequestOutputKind.DELTA)
        text = ""
        for output in llm.generate_stream(PROMPTS[0], params):
            text += output.outputs[0].text
            assert expected.startswith(text)
        assert text == expected
    cumulative = [output.outputs[0].text for output in llm.generate_stream(PROMPTS[0], GREEDY)]
    assert all(later.startswith(earlier) for earlier, later in pairwise(cumulative))
    assert len(cumulative) == 30


def test_a_stream_that_nobody_hears_any_more_ends(llm):
    stream = llm.generate_stream(PROMPTS[0], SamplingParams(max_tokens=100))
    next(stream)
    stream.close()


def test_streams_side_by_side_lose_nothing_to_each_other(llm):
    expected = [output.outputs[0].text for output in generate(llm, PROMPTS[:2], GREEDY)]
    first, second = (llm.generate_stream(prompt, GREEDY) for prompt in PROMPTS[:2])
    next(first)
    next(second)
    assert generate(llm, PROMPTS[0], GREEDY)[0].outputs[0].text == expected[0]
    assert [list(stream)[-1].outputs[0].text for stream in (first, second)] == expected
    assert not llm._outbox


def test_what_may_be_written(llm):
    tokenizer = llm.get_tokenizer()
    allowed = tokenizer(" red blue green").input_ids
    answer = generate(llm, PROMPTS[1], SamplingParams(max_tokens=20, allowed_token_ids=allowed, seed=1))[0].outputs[0]
    assert set(answer.token_ids) <= set(allowed)
    word = generate(llm, PROMPTS[0], GREEDY)[0].outputs[0].text.split()[2]
    answer = generate(llm, PROMPTS[0], SamplingParams(temperature=0, max_tokens=30, bad_words=[word]))[0].outputs[0]
    assert word not in answer.text.split()
    (kite,) = tokenizer(" kite").input_ids
    answer = generate(llm, PROMPTS[0], SamplingParams(temperature=0, max_tokens=4, logit_bias={kite: 100.0}))[0]
    assert answer.outputs[0].token_ids == [kite] * 4

    def only_kites(written, logits):
        return torch.full_like(logits, -math.inf).index_fill(0, torch.tensor([kite]), 0.0)

    answer = generate(llm, PROMPTS[0], SamplingParams(max_tokens=4, logits_processors=[only_kites]))[0].outputs[0]
    assert answer.token_ids == [kite] * 4


@pytest.mark.parametrize(
    ("forbidding", "written"),
    [
        ({"allowed_token_ids": [0], "min_tokens": 1, "stop_token_ids": [0]}, 0),
        ({"allowed_token_ids": [0], "min_tokens": 1, "stop_token_ids": [0], "temperature": 0}, 0),
        ({"logits_processors": [lambda written, logits: logits * math.nan]}, 0),
        ({"logits_processors": [lambda written, logits: logits if len(written) < 3 else logits - math.inf]}, 3),
    ],
)
def test_where_no_token_can_be_chosen_the_request_ends_and_others_go_on(llm, forbidding, written):
    alone = generate(llm, PROMPTS[1], GREEDY)[0].outputs[0]
    params = [SamplingParams(**{"max_tokens": 8, "seed": 1, **forbidding}), GREEDY]
    stuck, other = (output.outputs[0] for output in generate(llm, PROMPTS[:2], params))
    assert (stuck.finish_reason, len(stuck.token_ids)) == ("error", written)
    assert "no token can be chosen" in stuck.stop_reason
    assert other.token_ids == alone.token_ids
    assert llm._pool.num_free == llm._pool.num_blocks


@pytest.mark.parametrize("token", [-1, 10**9, 10**30])
def test_stop_tokens_that_the_model_does_not_have_forbid_nothing(llm, token):
    plain = generate(llm, PROMPTS[0], SamplingParams(temperature=0, max_tokens=4, min_tokens=4))[0].outputs[0].text
    params = SamplingParams(temperature=0, max_tokens=4, min_tokens=4, stop_token_ids=[token])
    with pytest.warns(UserWarning, match="end nothing"):
        assert generate(llm, PROMPTS[0], params)[0].outputs[0].text == plain


def raises(written, logits):
    raise KeyError("mine")


@pytest.mark.parametrize(
    ("processor", "told"),
    [
        (raises, "KeyError"),
        (lambda written, logits: None, "not NoneType"),
        (lambda written, logits: logits[:5], r"not \[5\]"),
    ],
)
def test_a_processor_that_fails_ends_its_own_request_only(llm, processor, told):
    alone = generate(llm, PROMPTS[1], GREEDY)[0].outputs[0].text
    stream = llm.generate_stream(PROMPTS[1], GREEDY)
    next(stream)
    (bad,) = generate(llm, PROMPTS[0], SamplingParams(logits_processors=[processor]))
    assert bad.outputs[0].finish_reason == "error"
    assert re.search(told, bad.outputs[0].stop_reason)
    assert list(stream)[-1].outputs[0].text == alone


@pytest.mark.parametrize("where", ["runner.compute", "sampler.sample", "scheduler.computed"])
def test_an_interrupted_step_loses_nothing(llm, where, monkeypatch):
    """Ctrl-C in the middle of somebody else's step, with answers open that share blocks and must copy some."""
    params = SamplingParams(n=3, temperature=0.8, seed=4, max_tokens=20)
    expected = [answer.text for answer in generate(llm, PROMPTS[0], params)[0].outputs]
    part, method = where.split(".")
    owner = getattr(llm.engine, part)
    for steps in (1, 2, 6):
        stream = llm.generate_stream(PROMPTS[0], params)
        for _ in range(steps):
            next(stream)
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, interrupt)
            with pytest.raises(KeyboardInterrupt):
                generate(llm, PROMPTS[1], GREEDY)
        assert [answer.text for answer in list(stream)[-1].outputs] == expected
        assert llm._pool.num_free == llm._pool.num_blocks


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_stream_whose_request_is_gone_says_so(llm):
    stream = llm.generate_stream(PROMPTS[0], GREEDY)
    next(stream)
    (name,) = llm.engine.unfinished
    llm.engine.abort(name)
    with pytest.raises(InvalidRequestError, match="aborted"):
        next(stream)


def test_generate_gives_everything_whatever_the_kind_of_output(llm):
    whole = generate(llm, PROMPTS[0], GREEDY)[0].outputs[0]
    for kind in RequestOutputKind:
        params = SamplingParams(temperature=0, max_tokens=GREEDY.max_tokens, output_kind=kind)
        assert generate(llm, PROMPTS[0], params)[0].outputs[0] == whole


def test_end_tokens_and_min_tokens(llm):
    chat = [{"role": "user", "content": "What is gravity?"}]
    (output,) = llm.chat(chat, SamplingParams(temperature=0, max_tokens=60), use_tqdm=False)
    answer = output.outputs[0]
    assert answer.finish_reason == "stop"
    assert answer.stop_reason is None
    assert "<|im_end|>" not in answer.text
    for params, longest in (
        (SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), 40),
        (SamplingParams(temperature=0, max_tokens=60, min_tokens=30), 30),
    ):
        assert len(llm.chat(chat, params, use_tqdm=False)[0].outputs[0].token_ids) >= longest


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_penalties_are_transformers_or_their_formula(llm, reference, name):
    params = SamplingParams(temperature=0, max_tokens=12, **{name: 1.4})
    (output,) = generate(llm, PROMPTS[1], params)
    prompt, written = output.prompt_token_ids, []
    for token in output.outputs[0].token_ids:
        logits = reference_logits(reference, [prompt + written])[0][-1]
        if name == "repetition_penalty":
            process = transformers.RepetitionPenaltyLogitsProcessor(1.4)
            logits = process(torch.tensor([prompt + written]), logits[None])[0]
        else:
            counts = torch.bincount(torch.tensor(written, dtype=torch.int64), minlength=len(logits))
            logits = logits - 1.4 * (counts if name == "frequency_penalty" else (counts > 0))
        assert token == int(logits.argmax())
        written.append(token)


def test_sampling_by_the_distribution(llm, reference):
    """2,000 draws against the probabilities after temperature, top-k and top-p, by transformers' own processors."""
    ids = llm.get_tokenizer()("One sunny morning Mia went to the park with her friend").input_ids
    params = SamplingParams(n=2000, temperature=1.3, top_k=12, top_p=0.9, max_tokens=1, seed=5)
    with LLM("tiny", dtype="float32", device="cpu", max_num_seqs=2048, max_model_len=64) as wide:
        drawn = [a.token_ids[0] for a in wide.generate([ids], params, use_tqdm=False)[0].outputs]
    logits = reference_logits(reference, [ids])[0][-1:] / 1.3
    logits = transformers.TopKLogitsWarper(12)(None, logits)
    expected = transformers.TopPLogitsWarper(0.9)(None, logits).softmax(dim=-1)[0]
    assert {token for token in drawn if expected[token] == 0} == set()
    counts = torch.bincount(torch.tensor(drawn), minlength=len(expected))
    kept = expected > 0
    chi_square = float(((counts - 2000 * expected)[kept] ** 2 / (2000 * expected[kept])).sum())
    assert chi_square < 3 * int(kept.sum()) + 10


def test_prefixes_are_found_and_change_nothing(llm):
    llm.reset_prefix_cache()
    prompt = PROMPTS[1] * 8
    first = generate(llm, prompt, GREEDY)[0]
    second = generate(llm, prompt, GREEDY)[0]
    size, length = llm.engine.scheduler.pool.block_size, len(first.prompt_token_ids)
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == min(length // size * size, length - 1)
    assert second.outputs[0].token_ids == first.outputs[0].token_ids
    assert llm.reset_prefix_cache()
    assert generate(llm, prompt, GREEDY)[0].num_cached_tokens == 0


def test_prompts_that_come_together_share_what_the_step_computes(llm, monkeypatch):
    """Each beginning is computed once, also when the step is interrupted and done again."""
    size = llm.engine.scheduler.pool.block_size
    begin = (llm.get_tokenizer()(PROMPTS[1]).input_ids * 9)[: 3 * size]
    prompts = [begin, [*begin, 5, 6], [*begin[: 2 * size], 7], [*begin, 5, 6, 7]]
    alone = []
    for prompt in prompts:
        llm.reset_prefix_cache()
        alone.append(generate(llm, [prompt], GREEDY)[0].outputs[0].token_ids)
    llm.reset_prefix_cache()
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "hidden", interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(llm, prompts, GREEDY)
    for number, prompt in enumerate(prompts):
        llm.engine.add_request(str(number), prompt, GREEDY)
    step = llm.engine.scheduler.schedule()
    assert [(part.start, part.count, part.num_stored) for part in step.scheduled] == [
        (0, 3 * size, 0),
        (3 * size, 2, 0),
        (2 * size, 1, 0),
        (3 * size, 3, 0),
    ]
    for number in range(len(prompts)):
        llm.engine.abort(str(number))
    together = generate(llm, prompts, GREEDY)
    assert [output.num_cached_tokens for output in together] == [0, 3 * size, 2 * size, 3 * size]
    assert [output.outputs[0].token_ids for output in together] == alone


def test_a_prompt_that_is_found_whole_computes_exactly_its_last_token(llm):
    size = llm.engine.scheduler.pool.block_size
    ids = (llm.get_tokenizer()(PROMPTS[1]).input_ids * 9)[: 3 * size]
    first = generate(llm, [ids], GREEDY)[0]
    llm.engine.add_request("again", ids, GREEDY)
    step = llm.engine.scheduler.schedule()
    assert [(part.start, part.count, part.num_stored) for part in step.scheduled] == [(3 * size - 1, 1, 1)]
    llm.engine.abort("again")
    second = generate(llm, [ids], GREEDY)[0]
    assert second.num_cached_tokens == 3 * size - 1
    assert second.outputs[0].token_ids == first.outputs[0].token_ids


def test_chat(llm):
    conversations = [[{"role": "user", "content": f"Tell me a story about {name}."}] for name in ("Mia", "Tom")]
    outputs = llm.chat(conversations, GREEDY, use_tqdm=False)
    assert [llm.chat(one, GREEDY, use_tqdm=False)[0].outputs[0].text for one in conversations] == [
        output.outputs[0].text for output in outputs
    ]
    begun = [*conversations[0], {"role": "assistant", "content": "Once upon"}]
    (output,) = llm.chat(begun, GREEDY, use_tqdm=False, add_generation_prompt=False, continue_final_message=True)
    assert llm.get_tokenizer().decode(output.prompt_token_ids).endswith("Once upon")
    assert output.prompt.endswith("Once upon")
    parts = [{"role": "user", "content": [{"type": "text", "text": "Tell me a story about Mia."}]}]
    assert llm.chat(parts, GREEDY, False)[0].outputs[0].text == outputs[0].outputs[0].text
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    for wrong in ("hello", None, [], [{"content": "x"}], image, [{"role": "user", "content": 5}]):
        with pytest.raises(InvalidRequestError, match=r"message|image_url"):
            llm.chat(wrong, GREEDY, use_tqdm=False)
    template = "{% for m in messages %}{{ m['content'] }}{{ suffix }}{% endfor %}"
    (output,) = llm.chat(
        conversations[0], GREEDY, use_tqdm=False, chat_template=template, chat_template_kwargs={"suffix": "!"}
    )
    assert llm.get_tokenizer().decode(output.prompt_token_ids) == "Tell me a story about Mia.!"


def test_metrics_and_defaults(llm):
    before = {metric.name: metric.value for metric in llm.get_metrics()}
    generate(llm, PROMPTS, GREEDY)
    after = {metric.name: metric.value for metric in llm.get_metrics()}
    assert after["minillm:generation_tokens"] - before["minillm:generation_tokens"] == 120
    assert after["minillm:kv_cache_usage_perc"] == 0
    assert llm.get_default_sampling_params() == SamplingParams()


@pytest.mark.parametrize(
    ("prompt", "options", "told"),
    [
        ("", {}, "empty"),
        ([], {}, "no prompt"),
        ("a " * 600, {}, "max_model_len"),
        ([1, 99_999], {}, "token ids must be in"),
        ([-1], {}, "token ids must be in"),
        ({"text": "x"}, {}, "prompt_token_ids"),
        (b"abc", {}, "not bytes"),
        ({"prompt_token_ids": "ab"}, {}, "not str"),
        (5, {}, "not int"),
        ([None], {}, "not NoneType"),
        ("x", {"logit_bias": {-5: 1.0}}, "logit_bias"),
    ],
)
def test_prompts_that_cannot_be_are_refused_and_the_engine_goes_on(llm, prompt, options, told):
    good = generate(llm, PROMPTS[0], GREEDY)[0].outputs[0].text
    with pytest.raises(InvalidRequestError, match=told):
        generate(
            llm,
            [PROMPTS[0], prompt] if prompt and prompt not in (5, [None]) else prompt,
            SamplingParams(max_tokens=5, **options),
        )
    assert generate(llm, PROMPTS[0], GREEDY)[0].outputs[0].text == good


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("temperature", math.nan, "temperature must be a number of at least 0"),
        ("temperature", -1, "temperature"),
        ("top_k", -2, "top_k must be a whole number of at least -1"),
        ("top_p", 0.0, "top_p must be a number above 0 and at most 1"),
        ("min_p", 1.5, "min_p"),
        ("n", 0, "n must be a whole number of at least 1"),
        ("n", 1.5, "n must be"),
        ("stop", "", "stop"),
        ("stop", ["a", ""], "stop"),
        ("max_tokens", 0, "max_tokens"),
        ("repetition_penalty", 0.0, "repetition_penalty"),
        ("presence_penalty", 3.0, "presence_penalty"),
        ("seed", 2**70, "seed"),
        ("logprobs", -2, "logprobs"),
        ("allowed_token_ids", [], "allowed_token_ids"),
        ("spaces_between_special_tokens", False, "spaces_between"),
        ("stop", 5, "stop must be a list of texts"),
        ("stop_token_ids", 5, "stop_token_ids must be a list of token ids"),
        ("stop_token_ids", [1.5], "stop_token_ids"),
        ("allowed_token_ids", ["a"], "allowed_token_ids"),
        ("logit_bias", {"5": 1.0}, "logit_bias"),
        ("logit_bias", {5: math.nan}, "logit_bias"),
        ("logit_bias", [5], "logit_bias"),
        ("logits_processors", [5], "logits_processors"),
        ("logits_processors", len, "logits_processors"),
        ("ignore_eos", "false", "ignore_eos must be True or False"),
        ("output_kind", "delta", "output_kind must be a RequestOutputKind"),
        ("min_tokens", 17, "min_tokens"),
    ],
)
def test_parameters_out_of_range_name_the_field_and_the_range(name, value, told):
    with pytest.raises(InvalidRequestError, match=told):
        SamplingParams(**{name: value})


def test_stop_tokens_that_the_model_does_not_have_are_told_of(llm):
    with pytest.warns(UserWarning, match="99999"):
        (output,) = generate(llm, PROMPTS[0], SamplingParams(temperature=0, max_tokens=4, stop_token_ids=[99_999]))
    assert len(output.outputs[0].token_ids) == 4


def test_a_parameter_changed_afterwards_is_looked_at_again(llm):
    params = SamplingParams(max_tokens=5)
    params.temperature = math.nan
    with pytest.raises(InvalidRequestError, match="temperature"):
        generate(llm, PROMPTS[0], params)


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        ({"tensor_parallel_size": 5}, ConfigError, "tensor_parallel_size may be 1, 2"),
        ({"block_size": 0}, ConfigError, "block_size must be a whole number"),
        ({"max_num_seqs": 2.5}, ConfigError, "max_num_seqs"),
        ({"kv_cache_memory_bytes": "1GiB"}, ConfigError, "kv_cache_memory_bytes"),
        ({"max_model_len": "auto"}, ConfigError, "max_model_len"),
        ({"seed": None}, ConfigError, "seed"),
        ({"attention_backend": "flash"}, ConfigError, "attention_backend"),
        ({"attention_backend": "triton"}, ConfigError, "cuda"),
        ({"quantization": "awq"}, ConfigError, "quantization"),
        ({"nonsense": 1}, ConfigError, "nonsense"),
        ({"num_gpu_blocks_override": 0}, ConfigError, "num_gpu_blocks_override"),
        ({"kv_cache_memory_bytes": 10}, OutOfMemoryError, "kv_cache_memory_bytes"),
        ({"kv_cache_memory_bytes": 100_000}, OutOfMemoryError, "max_model_len"),
        ({"max_num_seqs": 0}, ConfigError, "max_num_seqs"),
        ({"max_num_batched_tokens": 3, "max_num_seqs": 4}, ConfigError, "max_num_batched_tokens"),
        ({"max_model_len": 0}, ConfigError, "max_model_len"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(options, kind, told):
    with pytest.raises(kind, match=told):
        LLM("tiny", device="cpu", **options)


def test_a_request_that_could_never_fit_is_refused(llm):
    with (
        LLM("tiny", dtype="float32", device="cpu", num_gpu_blocks_override=4) as small,
        pytest.raises(InvalidRequestError, match="blocks"),
    ):
        small.generate("Once", SamplingParams(max_tokens=100), use_tqdm=False)


def test_without_a_tokenizer(tmp_path, llm):
    for file in BUNDLED["tiny"].iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(TokenizerError):
        LLM(tmp_path, device="cpu")
    ids = llm.get_tokenizer()(PROMPTS[0]).input_ids
    with LLM(tmp_path, device="cpu", dtype="float32", skip_tokenizer_init=True) as blind:
        answer = blind.generate([ids], GREEDY, use_tqdm=False)[0].outputs[0]
        with pytest.raises(TokenizerError, match="skip_tokenizer_init"):
            blind.generate(["Once"], GREEDY, use_tqdm=False)
    assert answer.token_ids == generate(llm, [ids], GREEDY)[0].outputs[0].token_ids
    assert answer.text == ""


def test_vllms_words_that_need_nothing_here_are_taken():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with LLM("tiny", device="cpu", trust_remote_code=True, gpu_memory_utilization=0.5, enforce_eager=True):
            pass
    said = " ".join(str(warning.message) for warning in caught)
    assert "trust_remote_code" in said
    assert "kv_cache_memory_bytes" in said


def test_a_closed_llm_says_so_and_a_second_one_works():
    first = LLM("tiny", dtype="float32", device="cpu", max_model_len=64)
    kept = [weakref.ref(thing) for thing in (first._runner.decoder, first._runner.kv.store)]
    first.close()
    first.close()
    gc.collect()
    assert [ref() for ref in kept] == [None, None]
    with pytest.raises(MinillmError, match="closed"):
        first.generate("Once", GREEDY)
    with LLM("tiny", dtype="float32", device="cpu", max_model_len=64) as second:
        assert second.generate("Once", GREEDY, use_tqdm=False)[0].finished


@pytest.mark.parametrize("name", ["tiny", "qwen3", "minimind2"])
def test_text_as_it_comes_is_the_text_at_the_end(name, tmp_path):
    """Chinese, emoji and bytes that are no characters: never half a character, and all of it at the end."""
    from minillm.engine.detokenizer import Detokenizer

    if name == "tiny":
        tokenizer = minillm.get_tokenizer("tiny")
    elif name == "minimind2":
        if not (SHARED / "weights" / "minimind2-small").exists():
            pytest.skip("no shared/weights beside the checkout")
        tokenizer = minillm.get_tokenizer(SHARED / "weights" / "minimind2-small")
    else:
        if not (SHARED / "tokenizers" / "qwen3.tar.gz").exists():
            pytest.skip("no shared/tokenizers beside the checkout")
        import tarfile

        with tarfile.open(SHARED / "tokenizers" / "qwen3.tar.gz") as archive:
            archive.extractall(tmp_path, filter="data")
        (config,) = tmp_path.rglob("tokenizer.json")
        tokenizer = minillm.get_tokenizer(config.parent)
    text = "Hello,  world!\n你好，世界 🙂👩‍👩‍👧 naïve Привет 12,345 \t e\u0301"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    prompt = tokenizer("Say:", add_special_tokens=False).input_ids
    whole = tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]
    detokenizer, seen = Detokenizer(tokenizer, prompt), ""
    for token in ids:
        detokenizer.add(token)
        seen += detokenizer.new_text(finished=False)
        assert "�" not in seen
        assert whole.startswith(seen)
    detokenizer.finish()
    seen += detokenizer.new_text(finished=True)
    assert seen == whole
