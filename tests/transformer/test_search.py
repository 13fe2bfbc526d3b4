"""Greedy and beam search against MarianMT's generate, a plain beam search and every possible target."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.cache.contiguous import ContiguousCache
from minillm.errors import CacheFullError, InvalidRequestError
from minillm.transformer import search
from minillm.transformer.kv import PaddedBatch
from minillm.transformer.search import Hypothesis, beam_search, greedy_search
from minillm.transformer.seq2seq import Seq2Seq, Seq2SeqConfig
from tests.helpers import TokenComparison
from tests.transformer.test_seq2seq import SOURCES, lengths, marian_twin, padded, scatter, small_marian, small_model

TOKENS = 16
IDS = {"start_id": 0, "stop_id": 1}


def teach(model: nn.Module, logits_of, vocab_size: int, *, longest: int, steps: int, seed: int) -> None:
    """Learn some random targets halfway by heart: a random model repeats one token for ever and never stops."""
    draw = random.Random(seed)
    others = [token for token in range(vocab_size) if token != 1]
    targets = [[0, *draw.choices(others, k=draw.randint(longest // 3, longest)), 1] for _ in range(8)]
    sources = torch.tensor([draw.choices(others, k=5) for _ in targets])
    labels = padded(targets, -100)[:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        logits = logits_of(sources, padded(targets)[:, :-1])
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
        optimizer.step()


def tiny_model(vocab_size: int, seed: int) -> Seq2Seq:
    model = Seq2Seq(Seq2SeqConfig(vocab_size, 12, 2, 24, 1, 2, 32)).eval()
    scatter(model, seed)
    teach(model, model, vocab_size, longest=5, steps=30, seed=seed)
    return model


@pytest.fixture(scope="module", params=[0, 1, 2])
def marian(request):
    """MarianMT and our model with its weights."""
    theirs = small_marian(request.param)
    for _ in range(10):
        teach(theirs, lambda s, t: theirs(s, decoder_input_ids=t).logits, 39, longest=8, steps=60, seed=request.param)
        ours = marian_twin(theirs)
        if any(len(row) < TOKENS for row in greedy_search(ours, SOURCES, **IDS, max_tokens=TOKENS)):
            return theirs, ours
    raise AssertionError("no answer ends before its limit, however long the models learn")


@torch.inference_mode()
def log_probability(model: Seq2Seq, source: list[int], written: list[int]) -> float:
    """Of the whole target at once, in float64."""
    logits = model(torch.tensor([source]), torch.tensor([[0, *written[:-1]]]))[0].double()
    return float(logits.log_softmax(-1)[range(len(written)), written].sum())


def normalised(log_probability: float, n: int, alpha: float) -> float:
    return log_probability / ((5 + n) / 6) ** alpha


def without_stop(written: list[int]) -> list[int]:
    return written[: written.index(1)] if 1 in written else written


def every_target(vocab_size: int, max_tokens: int) -> list[list[int]]:
    others = [token for token in range(vocab_size) if token != 1]
    stopped = [[*row, 1] for n in range(max_tokens) for row in product(others, repeat=n)]
    return stopped + [list(row) for row in product(others, repeat=max_tokens)]


@torch.inference_mode()
def plain_beam_search(model, source, max_tokens, num_beams, alpha):
    """Lists, one source, the whole target again at every step, and no stop before max_tokens."""
    beams, finished = [(0.0, [])], []
    for n in range(1, max_tokens + 1):
        candidates = []
        for log_prob, written in beams:
            steps = model(torch.tensor([source]), torch.tensor([[0, *written]]))[0, -1].log_softmax(-1)
            candidates += [(log_prob + step, [*written, token]) for token, step in enumerate(steps.tolist())]
        candidates.sort(key=lambda candidate: -candidate[0])
        ending = [c for c in candidates[:num_beams] if c[1][-1] == 1 or n == max_tokens]
        finished += [(normalised(log_prob, n, alpha), written) for log_prob, written in ending]
        beams = [c for c in candidates if c[1][-1] != 1][:num_beams]
    return sorted(finished, key=lambda hypothesis: -hypothesis[0])[:num_beams]


@torch.inference_mode()
def test_greedy_tokens_are_marians(marian, report):
    theirs, ours = marian
    compared = TokenComparison()
    rows = greedy_search(ours, SOURCES, **IDS, max_tokens=TOKENS)
    for source, row in zip(SOURCES, rows, strict=True):
        out = theirs.generate(
            input_ids=torch.tensor([source]),
            max_new_tokens=TOKENS,
            num_beams=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(out.logits).topk(2).values
        written = out.sequences[0, 1:].tolist()
        compared.add([*row, 1][: len(written)], written, (best[:, 0] - best[:, 1]).tolist())
    assert any(len(row) < TOKENS for row in rows)
    report("search: greedy tokens as MarianMT's", str(compared))


@pytest.mark.parametrize("cached", [False, True])
@torch.inference_mode()
def test_beams_are_marians(marian, cached, report):
    """transformers' length penalty is another one: at 0 the two agree. Without early stopping its search is ours."""
    theirs, ours = marian
    mask = PaddedBatch((0, 0, 0), tuple(lengths(SOURCES))).is_real().long()
    out = theirs.generate(
        input_ids=padded(SOURCES, 39),
        attention_mask=mask,
        max_new_tokens=TOKENS,
        num_beams=4,
        num_return_sequences=4,
        do_sample=False,
        length_penalty=0.0,
        early_stopping=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    kv = ContiguousCache.for_decoder(ours, 12, TOKENS) if cached else None
    rows = beam_search(ours, SOURCES, **IDS, max_tokens=TOKENS, length_penalty=0.0, kv=kv)
    scores = out.sequences_scores.view(3, 4).tolist()
    found = out.sequences[:, 1:].unflatten(0, (3, 4)).tolist()
    for row, written, expected in zip(rows, found, scores, strict=True):
        assert [hypothesis.score for hypothesis in row] == pytest.approx(expected, abs=1e-4)
        assert [hypothesis.tokens for hypothesis in row] == [without_stop(tokens) for tokens in written]
    counts = [len(hypothesis.tokens) for row in rows for hypothesis in row]
    assert len(set(counts)) > 1
    title = "search: beams as MarianMT's (hypotheses, their lengths)"
    report(title, f"{len(counts)} {min(counts)}…{max(counts)} {'cached' if cached else 'recomputed'}")


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize("seed", [0, 1])
def test_enough_beams_find_the_best_of_all_targets(alpha, seed):
    model, source = tiny_model(4, seed), [2, 3, 3]
    targets = every_target(4, 3)
    scored = [(normalised(log_probability(model, source, row), len(row), alpha), row) for row in targets]
    expected = sorted(scored, key=lambda pair: -pair[0])
    found = beam_search(model, [source], **IDS, max_tokens=3, num_beams=len(targets), length_penalty=alpha)[0]
    assert [hypothesis.score for hypothesis in found] == pytest.approx([score for score, _ in expected], abs=1e-5)
    assert [hypothesis.tokens for hypothesis in found] == [without_stop(row) for _, row in expected]
    assert sum(math.exp(log_probability(model, source, row)) for row in targets) == pytest.approx(1)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("num_beams", [1, 2, 5])
def test_stopping_early_loses_nothing(num_beams, alpha):
    for seed in range(2):
        model, sources = tiny_model(6, seed), [[2, 3, 4, 5], [5], [3, 3]]
        cache = ContiguousCache.for_decoder(model, len(sources) * num_beams, 8)
        options = {"max_tokens": 8, "num_beams": num_beams, "length_penalty": alpha, **IDS}
        plain = [plain_beam_search(model, source, 8, num_beams, alpha) for source in sources]
        for kv in (None, cache, cache):
            for expected, found in zip(plain, beam_search(model, sources, **options, kv=kv), strict=True):
                assert [hypothesis.tokens for hypothesis in found] == [without_stop(row) for _, row in expected]
                assert [hypothesis.score for hypothesis in found] == pytest.approx([s for s, _ in expected], abs=1e-4)


def test_the_search_stops_when_nothing_can_win():
    """With α = 0 and a target that ends at once, one step is enough; a bound that is too low would go on."""
    model = tiny_model(6, 0)
    steps = []
    model.decoder[0].register_forward_hook(lambda *_: steps.append(1))
    first = greedy_search(model, [[2, 3]], start_id=0, stop_id=5, max_tokens=1)[0]
    steps.clear()
    stop = first[0] if first else 5
    found = beam_search(model, [[2, 3]], start_id=0, stop_id=stop, max_tokens=20, num_beams=1, length_penalty=0.0)
    assert found[0][0].tokens == []
    assert len(steps) == 1


def test_a_longer_target_may_still_win(monkeypatch):
    """At the first step, stopping is likelier than what becomes, by the length penalty, the better target."""

    def scripted(model, tokens, memory, kv):
        first, on, last = [0.05, 0.5, 0.45], [0.005, 0.005, 0.99], [0.005, 0.99, 0.005]
        length = tokens.shape[1]
        return torch.tensor([first if length == 1 else on if length < 6 else last] * len(tokens)).log()

    monkeypatch.setattr(search, "next_logits", scripted)
    found = beam_search(tiny_model(3, 0), [[2]], **IDS, max_tokens=8, num_beams=1, length_penalty=2.0)
    log_prob = math.log(0.45) + 5 * math.log(0.99)
    assert found == [[Hypothesis([2] * 5, pytest.approx(normalised(log_prob, 6, 2.0), abs=1e-5))]]


@pytest.mark.parametrize("placement", ["post", "pre"])
def test_a_batch_decodes_as_each_row_alone_cached_or_not(placement):
    model = small_model(placement)
    teach(model, model, 40, longest=TOKENS - 4, steps=100, seed=0)
    ids = {"max_tokens": TOKENS, **IDS}
    alone = [greedy_search(model, [source], **ids)[0] for source in SOURCES]
    assert len({len(row) for row in alone}) > 1
    assert greedy_search(model, SOURCES, **ids) == alone
    assert greedy_search(model, SOURCES, **ids, kv=ContiguousCache.for_decoder(model, 3, TOKENS)) == alone
    beams = [[h.tokens for h in beam_search(model, [source], **ids)[0]] for source in SOURCES]
    for kv in (None, ContiguousCache.for_decoder(model, 12, TOKENS)):
        assert [[h.tokens for h in row] for row in beam_search(model, SOURCES, **ids, kv=kv)] == beams


@pytest.mark.parametrize("find", [greedy_search, beam_search])
def test_the_source_is_read_once(find):
    model = small_model()
    calls = []
    for layer in model.cross_attentions:
        layer.kv.register_forward_hook(lambda *_: calls.append(1))
    find(model, SOURCES, **IDS, max_tokens=5)
    assert len(calls) == model.config.num_decoder_layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "at least one token"),
        ({"sources": [[1], []]}, "at least one token"),
        ({"sources": [[40]]}, r"must be in \[0, 40\), not \[40\]"),
        ({"start_id": -1}, r"not \[-1\]"),
        ({"stop_id": 40}, r"not \[40\]"),
        ({"sources": [[2] * 65]}, "source has 65 tokens"),
        ({"max_tokens": 0}, "max_tokens must be between 1 and the model's 64"),
        ({"max_tokens": 65}, "max_tokens must be between 1 and the model's 64"),
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"length_penalty": -0.5}, "length_penalty must be 0 or"),
    ],
)
def test_bad_requests_are_refused(change, message):
    model = small_model()
    request = {"sources": SOURCES, "max_tokens": 4, **IDS, **change}
    with pytest.raises(InvalidRequestError, match=message):
        beam_search(model, **request)
    if not change.keys() & {"num_beams", "length_penalty"}:
        with pytest.raises(InvalidRequestError, match=message):
            greedy_search(model, **request)


def test_a_random_model_and_a_small_store_are_refused():
    model = small_model()
    with pytest.raises(CacheFullError, match="max_len=5"):
        greedy_search(model, SOURCES, start_id=0, stop_id=39, max_tokens=8, kv=ContiguousCache.for_decoder(model, 3, 4))
    with pytest.raises(InvalidRequestError, match="made for 3 rows, not 12"):
        beam_search(model, SOURCES, **IDS, max_tokens=8, kv=ContiguousCache.for_decoder(model, 3, 8))
    with pytest.raises(InvalidRequestError, match=r"call model\.eval\(\)"):
        greedy_search(model.train(), SOURCES, **IDS, max_tokens=4)
    assert greedy_search(small_model(dropout=0.0).train(), SOURCES, **IDS, max_tokens=1)
