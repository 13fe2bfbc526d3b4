"""A generated world to learn language in: short stories, questions about them, and conversations.

A story is simulated, not only written: its facts (who, what, where, why) are drawn first, then told by a plot's
sentences, so that every question about it has one right answer that stands in the text. The idea that very small models
learn coherent English from a world this small is Eldan & Li 2023, "TinyStories", §2; theirs was written by GPT-4, ours
by the grammar in `story_parts.py`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from minillm.training import story_parts as parts
from minillm.training.split import hash_fraction

Message = dict[str, str]
"""One turn of a conversation: its role and its content."""

HELD_OUT_SHARE = 0.05
QUESTIONS = (7, 9)
"""Fewest and most questions about one story. Many: a question's answer is what teaches a model to look back."""
SECOND_STORY_SHARE = 0.15
KINDS = ("story", "told", "asked", "small talk")
KIND_WEIGHTS = (10, 20, 65, 5)

GREETINGS = ("Hello!", "Hi!", "Hi there.", "Good morning!", "Hey!", "Good evening.")
GREETING = "Hello! Shall I tell you a story?"
WHO = ("Who are you?", "What are you?", "What is your name?", "What can you do?", "Tell me about yourself.")
ABOUT_ME = "I am tiny, a very small language model. I tell short stories and answer questions about them."
THANKS = ("Thank you!", "Thanks!", "That was nice.", "I liked that.", "Great!")
THANKED = "You are welcome! Shall I tell you another story?"
STRANGE = (
    "What is gravity?",
    "What is the capital of France?",
    "How do computers work?",
    "What is two plus two?",
    "Who wrote Hamlet?",
    "Can you write code?",
    "What is the meaning of life?",
    "How far away is the moon?",
    "What is attention?",
    "Explain paged memory.",
    "Write a poem.",
    "What is the weather today?",
    "Translate this into Chinese.",
    "Why is the sky blue?",
)
ONLY_STORIES = "I do not know. I only know the stories that are told here."
NO_STORY = "I do not know. Please tell me the story first."
SYSTEM_PROMPTS = (
    "You tell short stories.",
    "You are a helpful assistant.",
    "Answer in one sentence.",
    "You are tiny, a model that tells stories.",
)
REQUESTS = (
    "Tell me a story.",
    "Tell me a story about {hero}.",
    "Tell me a story about {hero} and {friend}.",
    "Tell me a story about {a_thing}.",
    "Tell me a story about {hero} and {a_thing}.",
    "Tell me a story about a {trait} {child} called {hero}.",
    "Write a story in which {request}.",
    "Please tell me a story in which {request}.",
    "Can you tell me a story that happens at {place}?",
)


@dataclass(frozen=True)
class Question:
    """A question about a story and its one right answer, a whole sentence."""

    text: str
    answer: str


@dataclass(frozen=True)
class Story:
    """A story, what may be asked about it, and how it may have been asked for.

    Attributes:
        own_questions: those among them that its plot decides.
        combination: the hero's name, the thing and the event; some combinations are held out of training.
    """

    text: str
    questions: tuple[Question, ...]
    own_questions: frozenset[Question]
    requests: tuple[str, ...]
    combination: tuple[str, str, str]


def is_held_out(combination: Sequence[str]) -> bool:
    """Whether this hero, thing and event never stand together in a training story: by hash, 5 % of all."""
    return hash_fraction("|".join(combination)) < HELD_OUT_SHARE


def tell(rng: random.Random, *, held_out: bool = False) -> Story:
    """One story, from the training combinations or from the held-out ones."""
    while True:
        plot, hero = rng.choice(parts.PLOTS), rng.choice(parts.GIRLS + parts.BOYS)
        thing = rng.choice(parts.SINGLE + parts.PLURAL)
        combination = (hero, thing, plot.event)
        if is_held_out(combination) == held_out:
            break
    facts = draw_facts(rng, plot, hero, thing)
    beats: list[tuple[str, ...] | None] = [
        parts.OPENINGS,
        parts.THINGS,
        parts.SETTINGS,
        None,
        *plot.beats,
        parts.ENDINGS,
    ]
    told = ["\n\n" if beat is None else _fill(_choose(rng, beat, plot), facts) for beat in beats]
    text = " ".join(told).replace(" \n\n ", "\n\n")
    asked = [*parts.COMMON_QUESTIONS, *plot.questions, *plot.questions]  # what only this plot decides, more often
    questions = dict.fromkeys(Question(_fill(q, facts), _fill(a, facts)) for q, a in rng.sample(asked, len(asked)))
    requests = tuple(_fill(request, facts) for request in REQUESTS)
    own = frozenset(Question(_fill(q, facts), _fill(a, facts)) for q, a in plot.questions)
    return Story(text, tuple(questions), own, requests, combination)


def _choose(rng: random.Random, beat: Sequence[str], plot: parts.Plot) -> str:
    return rng.choice([sentence for sentence in beat if sentence not in plot.belies])


def draw_facts(rng: random.Random, plot: parts.Plot, hero: str, thing: str) -> dict[str, str]:
    """Everything that is so in one story, by name."""
    friend = rng.choice([name for name in parts.GIRLS + parts.BOYS if name != hero])
    place, other_place, home = rng.sample(sorted(parts.PLACES), 3)
    spot, wrong_spot = rng.sample(parts.PLACES[place], 2)
    colour, other_colour = rng.sample(parts.COLOURS, 2)
    is_girl, plural = hero in parts.GIRLS, thing in parts.PLURAL
    facts = {
        "hero": hero,
        "friend": friend,
        "friend_full": rng.choice([friend, f"{{his}} friend {friend}", f"{{his}} cousin {friend}"]),
        "thing": thing,
        "colour": colour,
        "either_colour": " or ".join(rng.sample([colour, other_colour], 2)),
        "a_thing": f"{colour} {thing}" if plural else with_article(f"{colour} {thing}"),
        "a_new_thing": f"new {thing}" if plural else f"a new {thing}",
        "place": place,
        "either_place": " or to ".join(rng.sample([place, other_place], 2)),
        "home": home,
        "spot": spot,
        "wrong_spot": wrong_spot,
        "weather": rng.choice(parts.WEATHER),
        "time": rng.choice(parts.TIMES),
        "trait": rng.choice(parts.TRAITS),
        "feeling": rng.choice(parts.FEELINGS),
        "food": rng.choice(parts.FOODS),
        "child": "girl" if is_girl else "boy",
        "fhim": "her" if friend in parts.GIRLS else "him",
    }
    facts |= dict(zip(("he", "him", "his"), ("she", "her", "her") if is_girl else ("he", "him", "his"), strict=True))
    forms = ("they", "them", "were", "are") if plural else ("it", "it", "was", "is")
    facts |= dict(zip(("it", "them", "was", "is_"), forms, strict=True))
    facts |= {f"{verb}s": verb if plural else f"{verb}s" for verb in ("get", "break", "fall")}
    for entries in plot.draws:
        facts |= rng.choice(entries)
    facts["request"] = plot.request
    facts["a_animal"] = with_article(facts.get("animal", ""))
    facts = {name: fact.format(**facts) for name, fact in facts.items()}
    return facts | {_capital(name): _capital(fact) for name, fact in facts.items()}


def with_article(noun: str) -> str:
    """The noun with a or an."""
    return f"an {noun}" if noun[:1] in "aeiou" else f"a {noun}"


def conversation(rng: random.Random, *, held_out: bool = False) -> list[Message]:
    """A chat: a story asked for and told, or brought by the user, then questions about it; or small talk."""
    kind = rng.choices(KINDS[1:], KIND_WEIGHTS[1:])[0]
    messages = [_message("system", rng.choice(SYSTEM_PROMPTS))] if rng.random() < 0.1 else []
    if kind == "small talk":
        return messages + _small_talk(rng, held_out)
    if rng.random() < SECOND_STORY_SHARE:
        messages += _about(tell(rng, held_out=held_out), kind, rng.randint(2, 3), rng)
        return messages + _about(tell(rng, held_out=held_out), rng.choice(("told", "asked")), rng.randint(2, 3), rng)
    messages += _about(tell(rng, held_out=held_out), kind, rng.randint(*QUESTIONS), rng)
    if rng.random() < 0.1:
        messages += _turns(rng.choice(THANKS), THANKED)
    return messages


def finishing_documents(seed: int, count: int) -> Iterator[list[Message]]:
    """Conversations, every other one a story and the questions about it that are learned last.

    Those are what kind of day and of child it was, which decides nothing else in a story, and what only its own plot
    decides. The others are answered after a pass and a third over the corpus; these, asked often, in minutes.
    """
    rng = random.Random(f"finishing/{seed}")
    for number in range(count):
        if number % 2:
            yield conversation(rng)
        else:
            story = tell(rng)
            last = [q for q in story.questions if q.text.startswith("What kind of ") or q in story.own_questions]
            yield _about(replace(story, questions=tuple(last)), "asked", len(last), rng)


def _about(story: Story, kind: str, count: int, rng: random.Random) -> list[Message]:
    """The turns about one story: who brings it, and `count` questions."""
    first, *others = story.questions[:count]
    if kind == "told":
        turns = _turns(rng.choice(story.requests), story.text)
        others = [first, *others]
    else:
        turns = _turns(f"{story.text}\n\n{first.text}", first.answer)
    for question in others:
        turns += _turns(question.text, question.answer)
    return turns


def documents(seed: int, count: int, *, held_out: bool = False) -> Iterator[str | list[Message]]:
    """A corpus: stories as plain text, and conversations; without or with nothing but held-out combinations."""
    rng = random.Random(f"documents/{seed}/{held_out}")
    for _ in range(count):
        plain = rng.choices((True, False), (KIND_WEIGHTS[0], sum(KIND_WEIGHTS[1:])))[0]
        yield tell(rng, held_out=held_out).text if plain else conversation(rng, held_out=held_out)


def _small_talk(rng: random.Random, held_out: bool) -> list[Message]:
    talks = ((GREETINGS, GREETING), (WHO, ABOUT_ME), (STRANGE, ONLY_STORIES), (THANKS, THANKED))
    chosen = rng.sample(talks, rng.randint(1, 2))
    messages = [message for asked, answer in chosen for message in _turns(rng.choice(asked), answer)]
    if rng.random() < 0.5:  # a question without its story
        messages = _turns(tell(rng, held_out=held_out).questions[0].text, NO_STORY) + messages
    return messages


def _turns(user: str, assistant: str) -> list[Message]:
    return [_message("user", user), _message("assistant", assistant)]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _fill(template: str, facts: dict[str, str]) -> str:
    text = template.format(**facts)
    return text[0].upper() + text[1:]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
