"""A model divided among ranks, which are threads here (as processes: tests/engine/test_ranks.py), equals the whole."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from minillm.errors import CheckpointError, ConfigError
from minillm.models.loader import load_model
from minillm.transformer.decoder import DecoderConfig, LayerConfig
from minillm.transformer.parallel import cut_of, shard_config
from tests.helpers import randomise, reference_logits
from tests.models.families import FAMILIES, SMALL

ROWS = [[3, 1, 4, 1, 5, 9, 2, 6, 53, 58, 97, 93, 23, 84, 62], [0, 159, 80, 79]]


class ThreadRanks:
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, given: list[torch.Tensor | None]) -> None:
        self.rank, self.size = rank, size
        self.calls: list[str] = []
        self._barrier, self._given = barrier, given

    def all_reduce(self, x):
        self.calls.append("all_reduce")
        return torch.stack(self._exchange(x)).sum(dim=0)

    def all_gather(self, x):
        self.calls.append("all_gather")
        return torch.cat(self._exchange(x), dim=-1)

    def _exchange(self, x):
        self._given[self.rank] = x.clone()
        self._barrier.wait(60)
        parts = list(self._given)
        self._barrier.wait(60)
        return parts


def together(size, work):
    """What each rank's work(ranks) returns."""
    barrier, given = threading.Barrier(size), [None] * size
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(ThreadRanks(rank, size, barrier, given)), range(size)))


@torch.inference_mode()
def logits_of(path, ranks):
    decoder = load_model(path, dtype="float32", device="cpu", ranks=ranks)
    return [decoder(torch.tensor([row]))[0] for row in ROWS], decoder, list(ranks.calls)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, reference_logits(FAMILIES[request.param](folder), ROWS)


def check(folder, size, expected):
    for logits, decoder, calls in together(size, lambda ranks: logits_of(folder, ranks)):
        for mine, right in zip(logits, expected, strict=True):
            torch.testing.assert_close(mine, right, atol=1e-4, rtol=1e-4)
        # The embedding's sum, and two a layer (Shoeybi et al. 2019, §3); the head's parts are gathered.
        assert calls == (["all_reduce"] * (1 + 2 * decoder.config.num_layers) + ["all_gather"]) * len(ROWS)


def test_two_ranks_compute_what_transformers_does(family):
    folder, expected = family
    check(folder, 2, expected)


@pytest.mark.parametrize(
    ("size", "change"),
    [
        (3, {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 81, "hidden_size": 72}),
        (4, {"num_attention_heads": 8, "hidden_size": 64, "attention_bias": True, "mlp_bias": True}),
        (2, {"vocab_size": 161, "tie_word_embeddings": True}),
        (5, {"num_attention_heads": 5, "num_key_value_heads": 1, "vocab_size": 163, "hidden_size": 40}),
    ],
    ids=["three heads", "more ranks than key/value heads", "odd vocabulary", "one key/value head"],
)
def test_other_divisions(tmp_path, size, change):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SMALL | change))).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    check(tmp_path, size, reference_logits(model, ROWS))


def test_a_rank_holds_its_share(family):
    folder, _ = family
    whole = load_model(folder, dtype="float32", device="cpu")
    vectors = sum(p.numel() for name, p in whole.named_parameters() if p.ndim == 1 or "position" in name)
    vectors += sum(p.numel() for name, p in whole.named_parameters() if "project" in name)
    matrices = sum(p.numel() for p in whole.parameters()) - vectors
    for _, decoder, _ in together(2, lambda ranks: logits_of(folder, ranks)):
        assert sum(p.numel() for p in decoder.parameters()) <= matrices / 2 + vectors
        assert decoder.config.num_kv_heads == max(1, whole.config.num_kv_heads // 2)
        assert decoder.config.kv_bytes_per_token(torch.float32) * 2 == whole.config.kv_bytes_per_token(torch.float32)


def test_sizes_that_cannot_be_are_refused_with_those_that_can(tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"6 heads, 2 key/value heads and 80 .* 4 ranks.* may be 1, 2$"):
        load_model(tmp_path, ranks=ThreadRanks(0, 4, threading.Barrier(4), []))


def test_a_tied_head_that_differs_is_found_by_the_rank_that_would_hold_it(tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    model.lm_head.weight.data[100] += 1
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    barrier = threading.Barrier(1)
    load_model(tmp_path, ranks=ThreadRanks(0, 2, barrier, []))
    with pytest.raises(CheckpointError, match="differs from it"):
        load_model(tmp_path, ranks=ThreadRanks(1, 2, barrier, []))


@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 200), st.sampled_from((1, 2, 3, 4, 6, 8))
)
def test_the_parts_of_all_ranks_are_the_whole(kv_heads, group, units, vocab, size):
    layer = LayerConfig()
    config = DecoderConfig(vocab, 8, kv_heads * group, kv_heads, 2, units * size, 8, (layer,))
    try:
        shard = shard_config(config, size)
    except ConfigError:
        return
    for module, part, total in (
        ("layers.0.attention.qkv", "q", kv_heads * group * 2),
        ("layers.0.feed_forward.gate_up", "gate", units * size),
        ("embedding", "", vocab),
    ):
        kept = [row for rank in range(size) for rows in cut_of(module, part, config, rank, size).rows for row in rows]
        assert kept == list(range(total))
    for rank in range(size):
        (q,), (k,) = (cut_of("layers.0.attention.qkv", part, config, rank, size).rows for part in "qk")
        assert len(q) == shard.num_heads * 2
        assert len(k) == shard.num_kv_heads * 2
        # Each query head finds its group's key head among the rank's own.
        for head in range(q.start // 2, q.stop // 2):
            assert head // group in range(k.start // 2, k.stop // 2)
            own = (head - q.start // 2) // (shard.num_heads // shard.num_kv_heads)
            assert k.start // 2 + own == head // group
