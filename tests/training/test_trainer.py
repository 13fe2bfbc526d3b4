"""The trainer: schedules against their formulas, steps against plain PyTorch, resuming without a difference."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import get_cosine_schedule_with_warmup, get_inverse_sqrt_schedule

from minillm.errors import CheckpointError, ConfigError
from minillm.training.batching import IGNORED, PairBatch, TextBatch
from minillm.training.schedules import cosine, cosines, inverse_sqrt
from minillm.training.trainer import Trainer, TrainingConfig
from minillm.transformer.decoder import Decoder, DecoderConfig, LayerConfig
from minillm.transformer.positions import RotaryConfig
from minillm.transformer.seq2seq import Seq2Seq, Seq2SeqConfig

STEPS = 12


def small_decoder(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    layer = LayerConfig(rotary=RotaryConfig(8))
    return Decoder(DecoderConfig(40, 16, 2, 1, 8, 32, 32, (layer, layer)))


def small_seq2seq(dropout: float = 0.1) -> Seq2Seq:
    torch.manual_seed(0)
    return Seq2Seq(Seq2SeqConfig(40, 16, 2, 32, 1, 1, 64, dropout=dropout))


def text_at(step: int) -> TextBatch:
    rng = random.Random(step)
    rows = [[rng.randrange(40) for _ in range(rng.randint(3, 9))] for _ in range(4)]
    return TextBatch.of([(row, row) for row in rows])


def pairs_at(step: int) -> PairBatch:
    rng = random.Random(step)
    rows = [[rng.randrange(2, 40) for _ in range(rng.randint(2, 7))] for _ in range(4)]
    return PairBatch.of([(row, row[::-1]) for row in rows], 0, 1)


def config(**options) -> TrainingConfig:
    return TrainingConfig(**({"steps": STEPS, "learning_rate": 1e-2, "schedule": cosine(STEPS, 3)} | options))


@pytest.mark.parametrize("warmup", [0, 1, 7, 50])
def test_schedules_equal_those_of_transformers(warmup):
    steps = 60
    pairs = [(cosine(steps, warmup), lambda o: get_cosine_schedule_with_warmup(o, warmup, steps))]
    if warmup:
        pairs.append((inverse_sqrt(warmup), lambda o: get_inverse_sqrt_schedule(o, warmup)))
    for ours, make in pairs:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        theirs = make(optimizer)
        for step in range(steps - 1):
            optimizer.step()
            theirs.step()  # they count from step 1 where we count from 0
            assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)


def test_the_papers_schedule_is_inverse_sqrt_at_its_own_peak():
    """Vaswani et al. 2017, eq. 3, with d = 512 and 4,000 steps of warm-up."""
    factor, peak = inverse_sqrt(4000), 512**-0.5 * 4000**-0.5
    for step in (1, 100, 3999, 4000, 4001, 50_000):
        assert peak * factor(step - 1) == pytest.approx(512**-0.5 * min(step**-0.5, step * 4000**-1.5))


def test_cosine_ends_at_the_lowest():
    factor = cosine(100, 10, lowest=0.1)
    assert [factor(9), factor(99), factor(200)] == pytest.approx([1.0, 0.1, 0.1])
    for warmup, steps in ((-1, 10), (10, 10), (0, 0)):
        with pytest.raises(ConfigError):
            cosine(steps, warmup)
    with pytest.raises(ConfigError):
        inverse_sqrt(0)


def test_a_restart_begins_again():
    first, second = cosine(30, 3, 0.05), cosine(15, 1, 0.05)
    factor = cosines((30, 1.0, 99), (0, 0.7, 5), (15, 0.5, 1))
    assert [factor(step) for step in range(45)] == [first(s) for s in range(30)] + [0.5 * second(s) for s in range(15)]


def test_steps_equal_plain_pytorch():
    """The same losses and weights as a loop written out with torch's own AdamW, clipping and cross-entropy."""
    ours, theirs = small_decoder(), small_decoder()
    options = config(weight_decay=0.1, label_smoothing=0.1, clip_norm=0.5)
    trainer = Trainer(ours, text_at, options)
    losses = trainer.train(progress=False)

    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), eps=1e-9, foreach=False, fused=False)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * options.schedule(step)
        batch = text_at(step)
        real = batch.targets != IGNORED
        loss = F.cross_entropy(theirs(batch.tokens)[real], batch.targets[real], label_smoothing=0.1)
        assert losses[step] == pytest.approx(loss.item(), abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["decoder", "seq2seq with dropout"])
def test_a_resumed_run_takes_the_same_steps(tmp_path, kind, autocast):
    def make() -> Trainer:
        if kind == "decoder":
            return Trainer(small_decoder(), text_at, config(autocast=autocast))
        return Trainer(small_seq2seq(), pairs_at, config(autocast=autocast))

    whole = make()
    expected = whole.train(progress=False)
    first = make()
    losses = first.train(until=5, progress=False)
    first.save(tmp_path / "run.safetensors")
    second = make()
    torch.randn(17)  # the caller's own random numbers change nothing
    for parameter in second.model.parameters():
        parameter.data.add_(1)
    second.load(tmp_path / "run.safetensors")
    assert second.step == 5
    losses += second.train(progress=False)
    assert losses == expected
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_checkpoint_file_is_gone_on_from(tmp_path):
    path = tmp_path / "folder" / "run.safetensors"
    expected = Trainer(small_decoder(), text_at, config()).train(progress=False)
    losses = Trainer(small_decoder(), text_at, config()).train(until=7, progress=False, checkpoint=path)
    losses += Trainer(small_decoder(), text_at, config()).train(progress=False, checkpoint=path)
    assert losses == expected
    assert [file.name for file in path.parent.iterdir()] == ["run.safetensors"]


def test_training_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.randn(4)
    trainer = Trainer(model := small_seq2seq(), pairs_at, config())
    torch.manual_seed(3)
    trainer.train(until=2, progress=False)
    assert torch.equal(torch.randn(4), expected)
    assert not model.training


def test_the_loss_falls():
    trainer = Trainer(small_seq2seq(dropout=0.0), pairs_at, config(steps=150, schedule=cosine(150, 10)))
    losses = trainer.train(progress=False)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert all(map(math.isfinite, losses))


def test_progress_bar_shows_loss_and_speed(capsys, monkeypatch):
    monkeypatch.setattr("minillm.progress.SECONDS", 0.0)
    Trainer(small_decoder(), text_at, config()).train()
    shown = capsys.readouterr().err
    assert "loss" in shown
    assert "tokens/s" in shown
    assert f"{STEPS}/{STEPS}" in shown


@pytest.mark.parametrize(
    "damage", ["missing", "garbage", "other model", "weights only", "a moment missing", "other data", "other options"]
)
def test_a_wrong_checkpoint_is_refused(tmp_path, damage):
    path = tmp_path / "run.safetensors"
    trainer = Trainer(small_decoder(), text_at, config())
    if damage == "garbage":
        path.write_bytes(b"no safetensors")
    elif damage == "other model":
        Trainer(small_seq2seq(), pairs_at, config()).save(path)
    elif damage == "weights only":
        save_file({f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}, path)
    elif damage == "a moment missing":
        Trainer(small_decoder(), text_at, config()).train(until=1, progress=False, checkpoint=path)
        with safe_open(path, "pt") as file:
            kept = {name: file.get_tensor(name) for name in list(file.keys())[1:]}
            save_file(kept, path, file.metadata())
    elif damage == "other data":
        Trainer(small_decoder(), lambda step: text_at(step + 1), config()).train(1, progress=False, checkpoint=path)
    elif damage == "other options":
        Trainer(small_decoder(), text_at, config(seed=1)).train(1, progress=False, checkpoint=str(path))
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(CheckpointError, match=r"run\.safetensors"):
        trainer.load(path)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"steps": 0}, {"learning_rate": -1.0}, {"learning_rate": math.nan}, {"clip_norm": 0.0}, {"eps": 0.0}),
        *({"label_smoothing": 1.5}, {"weight_decay": -1.0}, {"betas": (0.9, 1.0)}),
    ],
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be"):
        config(**wrong)
