"""On a GPU: training resumes exactly, dropout included, and its first loss is the CPU's."""

from __future__ import annotations

import pytest
import torch

from minillm.training.batching import PairBatch
from minillm.training.schedules import cosine
from minillm.training.trainer import Trainer, TrainingConfig
from minillm.transformer.seq2seq import Seq2Seq, Seq2SeqConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

PAIRS = [([3, 4, 5], [6, 7]), ([8, 9], [10, 11, 12]), ([5, 5, 6, 7], [3])]


def make(device: str, dropout: float) -> Trainer[Seq2Seq]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 32}
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    model = Seq2Seq(Seq2SeqConfig(20, **sizes, **layers, dropout=dropout)).to(device)
    config = TrainingConfig(steps=12, learning_rate=1e-2, schedule=cosine(12, 2))
    return Trainer(model, lambda step: PairBatch.of([PAIRS[step % 3], PAIRS[(step + 1) % 3]], 1, 2), config)


def test_a_resumed_run_is_the_whole_run(tmp_path):
    expected = make("cuda", 0.2).train(progress=False)
    first, second = make("cuda", 0.2), make("cuda", 0.2)
    losses = first.train(until=5, progress=False)
    first.save(tmp_path / "run.safetensors")
    second.load(tmp_path / "run.safetensors")
    losses += second.train(progress=False)
    assert losses == pytest.approx(expected, rel=1e-5)


def test_the_losses_are_the_cpus():
    cpu, cuda = (make(device, 0.0).train(progress=False) for device in ("cpu", "cuda"))
    assert cuda == pytest.approx(cpu, rel=1e-3)
