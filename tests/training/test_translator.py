"""The translators: what ships keeps its promise, and both commands run from data to score."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch

from minillm.errors import CheckpointError, ConfigError, InvalidRequestError
from minillm.models.loader import num_parameters
from minillm.training import translator as command
from minillm.training.numbers import chinese, from_chinese, is_held_out
from minillm.training.parallel import read_pairs
from minillm.training.translator import (
    CORPUS,
    NUMBER_TRANSLATOR,
    NUMBERS,
    Translator,
    exact_match,
    make_trainer,
    number_pairs,
)

EVALUATION = json.loads((NUMBER_TRANSLATOR / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def shipped() -> Translator:
    return Translator.load()


def test_the_shipped_translator_translates_held_out_numbers(shipped, report):
    found = exact_match(shipped, 600, seed=5)
    report("number translator", f"600 held-out numbers: {found}; evaluation.json: {EVALUATION}")
    assert found.all >= 0.97
    assert EVALUATION["all"] >= 0.98
    assert EVALUATION["parameters"] == num_parameters(shipped.model)
    assert 1e6 <= num_parameters(shipped.model) <= 3e6


def test_the_example_of_its_task(shipped):
    assert shipped.translate(["eleven thousand and forty-two"]) == ["一万一千零四十二"]
    assert shipped.translate(["eleven thousand and forty-two", "seven"], num_beams=4) == ["一万一千零四十二", "七"]


def test_batches_give_what_texts_alone_give(shipped):
    texts = [source for source, _ in number_pairs(30, seed=9, held_out=True)]
    assert shipped.translate_all(texts, batch_size=7) == [shipped.translate([text])[0] for text in texts]


def test_training_pairs_are_training_numbers():
    training = {target for _, target in number_pairs(3000)}
    assert not any(is_held_out(from_chinese(text)) for text in training)
    assert all(is_held_out(from_chinese(text)) for _, text in number_pairs(300, held_out=True))


def test_tokens_cross_no_character():
    _, translator = make_trainer(number_pairs(500), NUMBERS)
    for number in (42, 1_0042, 987_654_321):
        alone = [translator.tokenizer.encode(character) for character in chinese(number)]
        assert translator.tokenizer.encode(chinese(number)) == [token for tokens in alone for token in tokens]


def test_a_saved_translator_is_the_same(tmp_path):
    recipe = dataclasses.replace(NUMBERS, hidden_size=16, num_heads=2, intermediate_size=32, layers=1, steps=3)
    trainer, translator = make_trainer(number_pairs(300), recipe)
    losses = trainer.train(progress=False)
    assert make_trainer(number_pairs(300), recipe)[0].train(progress=False) == losses
    translator.save(tmp_path)
    loaded = Translator.load(tmp_path)
    assert loaded.model.config == translator.model.config
    for name, tensor in translator.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name
    texts = ["nine", "one hundred and twelve"]
    assert loaded.translate(texts, max_tokens=8) == translator.translate(texts, max_tokens=8)


@pytest.mark.parametrize("damage", ["no folder", "no weights", "other sizes", "no such size"])
def test_a_damaged_folder_is_refused(tmp_path, shipped, damage):
    if damage != "no folder":
        shipped.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) if damage != "no folder" else {}
    if damage == "no weights":
        (tmp_path / "model.safetensors").unlink()
    elif damage == "other sizes":
        (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    elif damage == "no such size":
        (tmp_path / "config.json").write_text(json.dumps(config | {"depth": 3}))
    with pytest.raises(CheckpointError):
        Translator.load(tmp_path)


def test_the_numbers_command_trains_measures_and_writes(tmp_path, monkeypatch):
    tried = dataclasses.replace(NUMBERS, hidden_size=16, num_heads=2, intermediate_size=32, layers=1, steps=2)
    monkeypatch.setattr(command, "NUMBERS", tried)
    monkeypatch.setattr(command, "NUMBER_PAIRS", 300)
    command.numbers(out=tmp_path)
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result.keys() == EVALUATION.keys()
    assert 0 <= result["all"] < 0.5
    assert result["parameters"] == num_parameters(Translator.load(tmp_path).model)


def test_what_cannot_be_translated_is_refused(shipped):
    for texts, options in (
        ([], {}),
        ([""], {}),
        (["seven " * 100], {}),
        (["seven"], {"max_tokens": 0}),
        (["seven"], {"num_beams": 0}),
    ):
        with pytest.raises(InvalidRequestError):
            shipped.translate(texts, **options)
    with pytest.raises(InvalidRequestError, match="batch_size"):
        shipped.translate_all(["seven"], batch_size=0)
    with pytest.raises(InvalidRequestError, match="count"):
        exact_match(shipped, 0)


def test_a_folder_that_cannot_be_written_to_is_known_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to"):
        command.numbers(out=tmp_path / "file" / "folder")


def test_the_corpus_command_reports_bleu(tmp_path):
    file = tmp_path / "pairs.tsv"
    pairs = number_pairs(1500)
    file.write_text("".join(f"{source}\t{target}\tsomebody\n" for source, target in pairs), encoding="utf-8")
    assert len(read_pairs(file)) == len(set(pairs))
    command = [
        sys.executable,
        "-m",
        "minillm.training.translator",
        "corpus",
        file,
        "--steps",
        "2",
        "--out",
        tmp_path / "t",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"BLEU \d+\.\d\d", done.stderr)) == 2
    assert Translator.load(tmp_path / "t").model.config.hidden_size == CORPUS.hidden_size


def test_a_missing_corpus_is_one_sentence(tmp_path):
    command = [sys.executable, "-m", "minillm.training.translator", "corpus", str(tmp_path / "none.tsv")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "none.tsv" in done.stderr
