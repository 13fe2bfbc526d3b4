"""The stores: padding, windows and chunks change nothing; bad calls are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.cache.contiguous import ContiguousCache
from minillm.errors import CacheFullError, ConfigError, InvalidRequestError
from minillm.transformer.decoder import Decoder, DecoderConfig, LayerConfig
from minillm.transformer.kv import AttentionSpec, KVStore, NoCache, PaddedBatch
from minillm.transformer.positions import RotaryConfig


def small_decoder(soft_cap: float | None = None) -> Decoder:
    torch.manual_seed(0)
    rotary = RotaryConfig(8)
    layers = tuple(LayerConfig(window, rotary) for window in (None, 3, 5))
    decoder = Decoder(DecoderConfig(50, 24, 3, 1, 8, 32, 64, layers, attention_soft_cap=soft_cap)).eval()
    decoder.reset_parameters(std=0.3)
    return decoder


def test_padded_batch():
    batch = PaddedBatch((4, 0), (1, 3))
    assert (batch.seq_len, batch.end, batch.is_ragged) == (3, 5, True)
    assert batch.positions().tolist() == [[4, 4, 4], [0, 1, 2]]
    assert batch.is_real().tolist() == [[True, False, False], [True, True, True]]
    assert not PaddedBatch.full(2, 3, start=7).is_ragged


def test_both_are_stores():
    decoder = small_decoder()
    assert isinstance(NoCache(decoder.config.attention_specs), KVStore)
    assert isinstance(ContiguousCache.for_decoder(decoder, 1, 8), KVStore)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    soft_cap=st.sampled_from([None, 3.0]),
)
@torch.inference_mode()
def test_any_chunks_of_ragged_rows_equal_whole_rows(lengths, cuts, soft_cap):
    decoder = small_decoder(soft_cap)
    rows = [torch.randint(0, 50, (length,)).tolist() for length in lengths]
    whole = [decoder(torch.tensor([row]))[0] for row in rows]
    cache = ContiguousCache.for_decoder(decoder, len(rows), 16)
    done = [0] * len(rows)
    while any(at < len(row) for at, row in zip(done, rows, strict=True)):
        cut = cuts[sum(done) % len(cuts)]
        # A finished row repeats its last token: it is written where it already stands.
        starts = [min(at, len(row) - 1) for at, row in zip(done, rows, strict=True)]
        fed = [row[start : start + cut] for start, row in zip(starts, rows, strict=True)]
        batch = PaddedBatch(tuple(starts), tuple(map(len, fed)))
        cache.begin(batch)
        tokens = torch.tensor([part + [0] * (batch.seq_len - len(part)) for part in fed])
        logits = decoder(tokens, batch.positions(), cache)
        for row, (start, part) in enumerate(zip(starts, fed, strict=True)):
            expected = whole[row][start : start + len(part)]
            torch.testing.assert_close(logits[row, : len(part)], expected, atol=1e-4, rtol=1e-4)
        done = [start + len(part) for start, part in zip(starts, fed, strict=True)]


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_hidden_as_in_torch(causal):
    torch.manual_seed(0)
    lengths = (5, 2, 3)
    q, k, v = torch.randn(3, 3, 5, 2, 4)
    store = NoCache([AttentionSpec(0.5, causal=causal)])
    batch = PaddedBatch((0, 0, 0), lengths)
    store.begin(batch)
    ours = store.attend(0, q, k, v)
    mask = batch.is_real()[:, None, None, :]
    if causal:
        mask = mask & torch.ones(5, 5, dtype=torch.bool).tril()
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=0.5).transpose(1, 2)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(ours[row, :length], expected[row, :length])
    assert torch.isfinite(ours).all()


def test_the_contiguous_store_counts_its_bytes():
    decoder = small_decoder()
    cache = ContiguousCache.for_decoder(decoder, 3, 10)
    assert cache.num_bytes == 3 * 10 * decoder.config.kv_bytes_per_token(torch.float32)
    assert ContiguousCache.for_decoder(decoder).max_len == 64


def test_bad_calls_are_refused():
    decoder = small_decoder()
    cache = ContiguousCache.for_decoder(decoder, 2, 8)
    with pytest.raises(CacheFullError, match="max_len=9"):
        cache.begin(PaddedBatch.full(2, 1, start=8))
    with pytest.raises(InvalidRequestError, match="2 rows, not 1"):
        cache.begin(PaddedBatch.full(1, 1))
    with pytest.raises(InvalidRequestError, match="starts at 0"):
        NoCache(decoder.config.attention_specs).begin(PaddedBatch.full(1, 1, start=3))
    with pytest.raises(ConfigError, match="at least one"):
        ContiguousCache.for_decoder(decoder, 0, 8)
