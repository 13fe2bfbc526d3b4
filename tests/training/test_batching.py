"""Batches: what is learned, what is padding, and which examples meet."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minillm.errors import InvalidRequestError
from minillm.training.batching import IGNORED, LengthBatches, PairBatch, TextBatch, cross_entropy
from minillm.transformer.seq2seq import Seq2Seq, Seq2SeqConfig


def test_text_is_shifted_by_one_and_padding_is_no_target():
    batch = TextBatch.of([([5, 6, 7, 8], [5, IGNORED, 7, 8]), ([1, 2], [1, 2])])
    assert batch.tokens.tolist() == [[5, 6, 7], [1, 2, 0]]
    assert batch.targets.tolist() == [[IGNORED, 7, 8], [2, IGNORED, IGNORED]]
    assert batch.num_tokens == 3


def test_pairs_are_shifted_right():
    batch = PairBatch.of([([5, 6, 7], [8, 9]), ([4], [3])], start_id=1, stop_id=2)
    assert batch.source.tolist() == [[5, 6, 7], [4, 0, 0]]
    assert batch.source_lengths == (3, 1)
    assert batch.inputs.tolist() == [[1, 8, 9], [1, 3, 0]]
    assert batch.targets.tolist() == [[8, 9, 2], [3, 2, IGNORED]]
    assert batch.num_tokens == 5


def test_the_loss_of_a_batch_is_that_of_its_pairs():
    torch.manual_seed(0)
    model = Seq2Seq(Seq2SeqConfig(30, 16, 2, 32, 1, 1, dropout=0.0)).eval()
    pairs = [([5, 6, 7], [8, 9]), ([4], [3]), ([9, 9, 9, 9, 2], [7])]
    together = PairBatch.of(pairs, 0, 1)
    alone = [PairBatch.of([pair], 0, 1) for pair in pairs]
    expected = sum(batch.loss(model) * batch.num_tokens for batch in alone) / together.num_tokens
    torch.testing.assert_close(together.loss(model), expected)


def test_label_smoothing_is_the_papers():
    """(1 − ε) of the target's −log p, and ε of the mean over all tokens."""
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 7), torch.tensor([[1, 2, IGNORED], [0, IGNORED, IGNORED]])
    log_p = F.log_softmax(logits.double(), dim=-1)[targets != IGNORED]
    right = log_p.gather(1, targets[targets != IGNORED][:, None])
    expected = -(0.9 * right.mean() + 0.1 * log_p.mean())
    torch.testing.assert_close(cross_entropy(logits, targets, 0.1).double(), expected, atol=1e-6, rtol=1e-6)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=120), st.integers(50, 200), st.integers(0, 3))
def test_every_example_once_an_epoch_within_the_budget(lengths, max_tokens, seed):
    batches = LengthBatches(lengths, max_tokens, seed)
    for epoch in range(2):
        steps = [batches(epoch * len(batches) + place) for place in range(len(batches))]
        assert sorted(index for step in steps for index in step) == list(range(len(lengths)))
        assert all(len(step) * max(lengths[index] for index in step) <= max_tokens for step in steps)
    again = LengthBatches(lengths, max_tokens, seed)
    assert [again(step) for step in (len(again), 0)] == [batches(step) for step in (len(batches), 0)]


def test_little_is_padding_and_epochs_differ():
    lengths = [1 + (index * 7) % 40 for index in range(2000)]
    batches = LengthBatches(lengths, 400, 0)
    steps = [batches(step) for step in range(len(batches))]
    padded = sum(len(step) * max(lengths[index] for index in step) for step in steps)
    assert sum(lengths) / padded > 0.97
    assert [batches(len(batches) + step) for step in range(3)] != steps[:3]
    assert [max(lengths[index] for index in step) for step in steps[:9]] != sorted(lengths)[:9]


@pytest.mark.parametrize("lengths", [[], [3, 101]])
def test_what_does_not_fit_is_refused(lengths):
    with pytest.raises(InvalidRequestError, match="at most 100"):
        LengthBatches(lengths, 100, 0)
