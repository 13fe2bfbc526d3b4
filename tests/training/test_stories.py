"""The generated world: its answers stand in its texts, its English agrees, its held-out combinations stay out."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.training import story_parts as parts
from minillm.training.stories import Story, conversation, documents, finishing_documents, is_held_out, tell

STORIES = [tell(random.Random(seed)) for seed in range(1500)]
NAMES = {*parts.GIRLS, *parts.BOYS}


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


def test_every_plot_is_told_and_no_template_is_left_open():
    assert {story.combination[2] for story in STORIES} == {plot.event for plot in parts.PLOTS}
    for story in STORIES:
        for text in (story.text, *story.requests, *(q.text + q.answer for q in story.questions)):
            assert not re.search(r"[{}]|  |\.\.|^\s|\s$| ,", text), text


def test_answers_stand_in_the_story():
    """Every word of an answer is the question's, the story's, or one of the words that answers are made of."""
    form = set(
        "the story is about kind was with happened at felt they ate went to it a lost sad because had found first "
        "looked got stuck helped used brought down mended broke wanted that took turns gave away has now packed in "
        "dropped let fell into back slipped dried left fetched forgot belonged picked there were heard afraid held "
        "made from worked for taught up new swap eat hungry ground".split()
    )
    for story in STORIES:
        told = {word.lower() for word in words(story.text)}
        for question in story.questions:
            unknown = {word.lower() for word in words(question.answer)} - told - form
            unknown -= {word.lower() for word in words(question.text)}
            assert not unknown, (story.text, question)


def test_names_in_answers_are_the_storys():
    for story in STORIES:
        cast = NAMES & set(words(story.text))
        assert len(cast) == 2
        for question in story.questions:
            assert NAMES & set(words(question.answer)) <= cast


def test_pronouns_and_verbs_agree():
    for story in STORIES:
        hero, thing, _ = story.combination
        wrong = ("a boy", "his birthday") if hero in parts.GIRLS else ("a girl", "her birthday")
        assert not any(phrase in story.text for phrase in wrong)
        child = "girl" if hero in parts.GIRLS else "boy"
        assert re.search(rf"\b{child}\b", story.text.split(".")[0])
        text = " ".join([story.text, *(q.text + " " + q.answer for q in story.questions)])
        one, many = rf"the {thing} (was|is)\b", rf"the {thing} (were|are)\b"
        assert not re.search(one if thing in parts.PLURAL else many, text)
        assert not re.search(rf"\ban? \w+ {thing}\b", text) or thing in parts.SINGLE
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text


def test_what_was_forgotten_had_not_been_taken_along():
    forgotten = [story.text for story in STORIES if story.combination[2] == "forgotten"]
    assert forgotten
    assert not [text for text in forgotten if " took the " in text or "never left home" in text]


def test_finishing_documents_ask_what_is_learned_last():
    plots = {q.partition(" {")[0] for plot in parts.PLOTS for q, _ in plot.questions}
    for document in list(finishing_documents(0, 60))[::2]:
        asked = [message["content"].rpartition("\n\n")[2] for message in document if message["role"] == "user"]
        assert sum(text.startswith("What kind of ") for text in asked) == 2
        assert len(asked) >= 5
        assert all(text.startswith(("What kind of ", *plots)) for text in asked)
        assert len(document) == 2 * len(asked)
    assert list(finishing_documents(3, 4)) == list(finishing_documents(3, 4))


WHO_DID_IT = {
    "Who found": r"Then (\w+) (?:looked (?!around)|called out)|At last (\w+) found",
    "Who had the .* first": r"So (\w+) had the|(\w+) went first",
    "Who had the .* after that": r"the turn of (\w+)\.|gave the \w+ to (\w+)\.",
    "Who was afraid": r"(?:I am afraid,|Let us run away!)\" said (\w+)",
    "Who went to look": r"(\w+) went closer|(\w+) opened both eyes",
    "Who gave food": r"So (\w+) held out|\. (\w+) had [^.]*? and put it on the ground",
    "Who fetched": r"(\w+) ran all the way back|So (\w+) went back",
}


@pytest.mark.parametrize("question", WHO_DID_IT)
def test_the_one_who_did_it_is_the_one_in_the_answer(question):
    checked = 0
    for story in STORIES:
        for asked in story.questions:
            if re.match(question, asked.text):
                (done_by,) = filter(None, re.search(WHO_DID_IT[question], story.text).groups())
                assert asked.answer.startswith(done_by + " "), (story.text, asked)
                checked += 1
    assert checked > 50


def test_one_question_has_one_answer():
    for story in STORIES:
        asked = Counter(question.text for question in story.questions)
        assert max(asked.values()) == 1, asked.most_common(1)


@given(st.integers(), st.booleans())
def test_the_split(seed, held_out):
    assert is_held_out(tell(random.Random(seed), held_out=held_out).combination) == held_out


def test_a_twentieth_is_held_out():
    things = parts.SINGLE + parts.PLURAL
    every = [(n, t, p.event) for n in NAMES for t in things for p in parts.PLOTS]
    share = sum(map(is_held_out, every)) / len(every)
    assert 0.045 < share < 0.055


def test_the_corpus_repeats_and_holds_nothing_held_out(monkeypatch):
    told: list[Story] = []
    real = tell

    def spy(*args, **options) -> Story:
        told.append(real(*args, **options))
        return told[-1]

    monkeypatch.setattr("minillm.training.stories.tell", spy)
    first = list(documents(7, 300))
    assert len(told) > 250
    assert not any(is_held_out(story.combination) for story in told)
    assert first == list(documents(7, 300)) != list(documents(8, 300))
    told.clear()
    list(documents(7, 300, held_out=True))
    assert all(is_held_out(story.combination) for story in told)


@pytest.mark.parametrize("seed", range(40))
def test_conversations_take_turns(seed):
    messages = conversation(random.Random(seed))
    roles = [message["role"] for message in messages if message["role"] != "system"]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert all(message["content"] for message in messages)
