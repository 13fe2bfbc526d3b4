"""The bundled model: transformers reads it, it does what its card says, and its command makes such a folder."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import minillm
from minillm.cache.contiguous import ContiguousCache
from minillm.errors import ConfigError
from minillm.models.loader import num_parameters
from minillm.models.source import ASSETS, BUNDLED, is_on_disk, resolve
from minillm.tokenizers.bpe import BytePairTokenizer
from minillm.training import tiny
from minillm.training.batching import IGNORED
from minillm.training.stories import conversation, documents, is_held_out, tell
from minillm.training.trainer import Trainer
from minillm.transformer.generation import generate
from tests.helpers import TokenComparison, reference_greedy, reference_logits

EVALUATION = json.loads((BUNDLED["tiny"] / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def model():
    return minillm.load_model("tiny", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def tokenizer() -> BytePairTokenizer:
    return BytePairTokenizer.load(BUNDLED["tiny"] / "tokenizer.json")


def test_transformers_runs_it_unchanged(model, report):
    reference = AutoModelForCausalLM.from_pretrained(BUNDLED["tiny"], dtype=torch.float32).eval()
    auto = AutoTokenizer.from_pretrained(BUNDLED["tiny"])
    compared = TokenComparison()
    prompts = [auto("Once upon a time").input_ids, auto(tell(random.Random(1)).text[:120]).input_ids]
    prompts += [auto.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
                for text in ("Tell me a story about Mia.", "What is gravity?")]  # fmt: skip
    for prompt in prompts:
        expected, gaps = reference_greedy(reference, prompt, 64)
        store = ContiguousCache.for_decoder(model, 1, len(prompt) + 64)
        compared.add([step[0] for step in generate(model, [prompt], store, max_tokens=64)], expected, gaps)
        logits = model(torch.tensor([prompt]))[0]
        torch.testing.assert_close(logits, reference_logits(reference, [prompt])[0], atol=1e-4, rtol=0)
    report("bundled model against transformers", f"tiny, 4 prompts x 64: {compared}")


def test_its_tokenizer_is_one_in_all_three_libraries(tokenizer):
    auto, plain = minillm.get_tokenizer("tiny"), Tokenizer.from_file(str(BUNDLED["tiny"] / "tokenizer.json"))
    for document in documents(3, 30, held_out=True):
        text = tiny.render(document)
        ours = tokenizer.encode(text)
        assert ours == plain.encode(text).ids == auto(text).input_ids
        assert tokenizer.decode(ours) == text
        if not isinstance(document, str):
            assert auto.apply_chat_template(document, tokenize=False) == text
            asked = auto.apply_chat_template(document[:-1], tokenize=False, add_generation_prompt=True)
            assert asked == tiny.render(document[:-1], answer_next=True)
            assert tiny.encode(tokenizer, document)[0] == [*ours, tokenizer.token_to_id(tiny.END_OF_TEXT)]


def test_users_turns_are_not_learned(tokenizer):
    document = next(d for d in documents(0, 99) if not isinstance(d, str))
    tokens, targets = tiny.encode(tokenizer, document)
    assert all(target in (token, IGNORED) for token, target in zip(tokens, targets, strict=True))
    learned = tokenizer.decode([target for target in targets if target != IGNORED])
    answers = [message["content"] for message in document if message["role"] == "assistant"]
    assert learned == tiny.END_OF_TURN.join([*answers, ""]) + tiny.END_OF_TEXT


def test_it_answers_questions_about_stories_it_never_saw(model, tokenizer, report):
    """100 questions here; the whole evaluation, by the training command, is in the folder."""
    rng = random.Random("test")
    told = [tell(rng, held_out=True) for _ in range(50)]
    assert all(is_held_out(story.combination) for story in told)
    asked = [(story.text, question) for story in told for question in story.questions[:2]]
    found = tiny.answers(model, tokenizer, [f"{text}\n\n{question.text}" for text, question in asked])
    right = sum(ours == question.answer for ours, (_, question) in zip(found, asked, strict=True))
    report("bundled model", f"tiny: {right} of {len(asked)} held-out questions; evaluation.json: {EVALUATION}")
    assert right >= 90
    without = tiny.answers(model, tokenizer, [question.text for _, question in asked])
    assert sum(ours == question.answer for ours, (_, question) in zip(without, asked, strict=True)) <= 10


def test_the_shipped_evaluation_meets_the_cards_bars(model):
    assert EVALUATION["accuracy"] >= 0.95
    assert EVALUATION["accuracy_without_story"] < 0.05
    assert EVALUATION["accuracy_of_commonest"] < 0.3
    assert EVALUATION["perplexity"] < EVALUATION["ngram_perplexity"]
    assert EVALUATION["parameters"] == num_parameters(model)
    assert 1e6 < num_parameters(model) < 4e6


def test_perplexity_of_held_out_stories(model, tokenizer):
    told = [tiny.encode(tokenizer, tell(random.Random(seed), held_out=True).text)[0] for seed in range(40)]
    assert tiny.perplexity(model, told) == pytest.approx(EVALUATION["perplexity"], rel=0.1)


def test_what_ships_is_small():
    size = sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file())
    assert size <= 16 * 2**20


def test_its_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert resolve("tiny") == BUNDLED["tiny"]
    assert resolve("./tiny").resolve() == tmp_path / "tiny"
    assert is_on_disk("tiny")


def test_pull_copies_it(tmp_path):
    folder = resolve("tiny", local_dir=tmp_path / "copy")
    assert (folder / "model.safetensors").read_bytes() == (BUNDLED["tiny"] / "model.safetensors").read_bytes()


def test_the_command_trains_and_writes_a_model(tmp_path):
    """Two steps of it: the folder that it writes loads in both libraries, and a second run writes the same bytes."""
    small = tiny.Recipe(documents=40, tokenizer_documents=40)
    for name in ("a", "b"):
        tokenizer = tiny.train_tokenizer(small)
        trainer = tiny.make_trainer(small, tokenizer, torch.device("cpu"))
        trainer.train(until=2, progress=False)
        tiny.export(trainer.model, tokenizer, tmp_path / name)
    for file in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    decoder = minillm.load_model(tmp_path / "a", dtype="float32")
    result = tiny.evaluate(decoder, tokenizer, small, stories=2)
    assert result.num_questions == 8
    assert result.accuracy == 0


def test_the_command_from_end_to_end(tmp_path, monkeypatch):
    """A hundred documents: a checkpoint, a folder that loads, an evaluation; a second run goes on from its end."""
    monkeypatch.setattr(tiny, "EVALUATED_STORIES", 1)
    taken = []
    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, **options: taken.append(len(train(self, **options))))
    for _ in range(2):
        tiny.main(out=tmp_path / "out", device="cpu", checkpoint=tmp_path / "run.safetensors", count=100)
    assert taken[0] > taken[1] == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["num_questions"] == 4
    assert result["perplexity"] > result["ngram_perplexity"] > 1
    assert num_parameters(minillm.load_model(tmp_path / "out")) == result["parameters"]
    with pytest.raises(ConfigError, match="cannot be used here"):
        tiny.main(out=tmp_path / "out", device="nonsense", checkpoint=None, count=100)


def test_what_is_known_without_a_story():
    guess = tiny.CommonestAnswers(tiny.Recipe(documents=300))
    assert guess.answer("Who is the story about?").startswith("The story is about ")
    unseen = guess.answer("What colour was the zither kite?")
    assert unseen == ""  # no such kind of question
    assert guess.answer("Where did Zoe go?").startswith("Zoe went to the ")
    assert guess.answer("Why did Zoe slip?") == "Zoe slipped because the ground was wet."


def test_questions_that_need_no_story_are_not_counted():
    asked = [q.text for seed in range(300) for q in tiny._open_questions(tell(random.Random(seed)))]
    assert not [text for text in asked if "solve" in text or text.endswith(("slip?",)) or " drop " in text]
    assert [text for text in asked if text.startswith("Why did")]


def test_the_command_tells_its_options():
    command = [sys.executable, "-m", "minillm.training.tiny", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--checkpoint" in done.stdout


def test_conversations_fit_its_context(tokenizer):
    rng = random.Random(0)
    longest = max(len(tokenizer.encode(tiny.render(conversation(rng)))) for _ in range(400))
    assert longest < tiny.CONFIG["max_position_embeddings"]
