"""A seeded generator of short stories that state facts and ask for them later.

A story has a cast. Scene by scene it tells facts about one of them ("Mira's lamp
is red."), repeats facts told before, and asks for facts at all distances
("Question: what colour is Mira's lamp? Answer: Mira's lamp is red."). A quarter of all
(person, kind, value) facts occurs only in held-out text.

Free choices are few and follow Zipf's law, because near-ties would make the top-1
agreement of two models depend on rounding.
"""

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from kvslim.demo.lexicon import EVENTS, KINDS, NAMES, Kind

Split = Literal["train", "heldout"]
T = TypeVar("T")

_HELDOUT_ONE_IN = 4
_REST = 12
_DISTANCE_TOLERANCE = 0.05
_MAX_TRIES = 200
_PLAIN = "{name}'s {noun} is {value}."
_TELLINGS = (_PLAIN, "People know that " + _PLAIN, "It is said that " + _PLAIN)
_REMINDERS = ("Everyone sees that " + _PLAIN, "Nobody forgets that " + _PLAIN)
# The answer repeats the words of the fact, so that a small model learns one pattern.
_QUESTION = "Question: what {category} is {name}'s {noun}? Answer: {name}'s {noun} is"


@dataclass(frozen=True)
class RecallQuestion:
    """A story that ends right before the answer to a question about it.

    Attributes:
        prompt: The story and the question, up to and with "Answer: Mira's lamp is".
        answer: The one word that follows, with its leading space.
        distance: Tokens from the value in the fact to the answer.
    """

    prompt: str
    answer: str
    distance: int


@dataclass
class _Fact:
    """A stated fact; it is not mentioned again before word ``due`` of the story."""

    name: str
    kind: Kind
    value: str
    due: float = 0.0
    last_mention: int = 0

    def fill(self, form: str) -> str:
        return form.format(name=self.name, noun=self.kind.noun, category=self.kind.category, value=self.value)


def values_of(split: Split, name: str, kind: Kind) -> tuple[str, ...]:
    """Returns the values that ``name``'s fact of this kind may have in ``split``."""
    offset = zlib.crc32(f"{name}/{kind.noun}".encode())
    held = split == "heldout"
    return tuple(value for rank, value in enumerate(kind.values) if ((rank + offset) % _HELDOUT_ONE_IN == 0) == held)


def _zipf(rng: random.Random, items: Sequence[T], exponent: float = 1.0) -> T:
    return rng.choices(items, [(rank + 1) ** -exponent for rank in range(len(items))])[0]


class _Story:
    """The sentences so far, and the state needed to continue."""

    def __init__(self, rng: random.Random, split: Split, words: int) -> None:
        self.rng = rng
        self.split: Split = split
        self.length = words
        self.sentences: list[str] = []
        self.words = 0
        self.facts: dict[tuple[str, str], _Fact] = {}
        self.cast = rng.sample(NAMES, rng.randint(2, max(2, min(12, words // 40))))
        first = rng.randrange(len(KINDS))
        self.kinds = KINDS[first:] + KINDS[:first]
        self.turn = 0
        self.event_index = rng.randrange(len(EVENTS))
        self.say(f"Here is a story of {', '.join(self.cast[:-1])} and {self.cast[-1]}.")
        self._roll_call()

    def _roll_call(self) -> None:
        """States one fact of the same kind about everybody, so that names matter early."""
        for name in self.cast:
            self._tell_next(name)

    def say(self, sentence: str) -> None:
        self.sentences.append(sentence)
        self.words += sentence.count(" ") + 1

    def scene(self) -> None:
        """Writes one scene: an event, new facts, an event, a reminder, questions."""
        leader = self._next_leader()
        self._event(leader)
        for _ in range(_zipf(self.rng, (2, 1, 3))):
            self._tell_next(leader)
        self._event(leader)
        self._remind(leader)
        name = leader
        for _ in range(_zipf(self.rng, (3, 2, 4, 1))):
            name = self._ask(name)

    def tell(self, name: str, kind: Kind, value: str, form: str) -> _Fact:
        fact = self.facts[name, kind.noun] = _Fact(name, kind, value)
        self._mention(fact, form)
        return fact

    def _mention(self, fact: _Fact, form: str) -> None:
        """Mentions a fact, then leaves it alone, half of the time long enough for a far question."""
        self.say(fact.fill(form))
        fact.last_mention = self.words
        longest = max(1.0, self.length / _REST) if self.rng.random() < 0.5 else 1.0
        fact.due = self.words + _REST * longest ** self.rng.random()

    def _next_leader(self) -> str:
        if self.rng.random() < 0.1:
            self.turn = self.rng.randrange(len(self.cast))
        leader = self.cast[self.turn % len(self.cast)]
        self.turn += 1
        return leader

    def _event(self, name: str) -> None:
        if self.rng.random() < 0.1:
            self.event_index = self.rng.randrange(len(EVENTS))
        self.say(EVENTS[self.event_index % len(EVENTS)].format(name=name))
        self.event_index += 1

    def _tell_next(self, name: str) -> None:
        untold = [kind for kind in self.kinds if (name, kind.noun) not in self.facts]
        if not untold:
            self._remind(name)
            return
        kind = untold[0] if self.rng.random() < 0.8 else self.rng.choice(untold)
        value = _zipf(self.rng, values_of(self.split, name, kind), exponent=0.5)
        self.tell(name, kind, value, self.rng.choices(_TELLINGS, (8, 1, 1))[0])

    def _open_facts(self, name: str | None = None) -> list[_Fact]:
        due = (fact for fact in self.facts.values() if fact.due <= self.words)
        return [fact for fact in due if name is None or fact.name == name]

    def _remind(self, name: str) -> None:
        known = self._open_facts(name)
        if known:
            self._mention(_zipf(self.rng, known), self.rng.choices(_REMINDERS, (3, 1))[0])

    def _ask(self, name: str) -> str:
        """Asks for a fact, mostly one not mentioned for long; returns whose fact it was."""
        known = self._open_facts(name if self.rng.random() < 0.3 else None)
        if not known:
            return name
        oldest = min(known, key=lambda fact: fact.last_mention)
        fact = oldest if self.rng.random() < 0.6 else _zipf(self.rng, known)
        self._mention(fact, _QUESTION + " {value}.")
        return fact.name


def document(seed: int, split: Split, words: int) -> str:
    """Returns one story of at least ``words`` words, ended after a sentence.

    Raises:
        ValueError: If ``words`` is not positive.
    """
    if words < 1:
        raise ValueError(f"words must be positive, got {words}")
    story = _Story(random.Random(f"{split}/{seed}"), split, words)
    while story.words < words:
        story.scene()
    while story.words - story.sentences[-1].count(" ") - 1 >= words:
        story.words -= story.sentences.pop().count(" ") + 1
    return " ".join(story.sentences)


def heldout_text(documents: int, words: int, seed: int = 0) -> list[str]:
    """Returns stories with no fact that occurs in a training story."""
    return [document(1_000_000 * seed + i, "heldout", words) for i in range(documents)]


def calibration_text(documents: int, words: int, seed: int = 0) -> list[str]:
    """Returns stories of the train split, with no fact of a held-out story."""
    return [document(1_000_000 * seed + i, "train", words) for i in range(documents)]


def recall_questions(
    count: int, distance: int, count_tokens: Callable[[str], int], seed: int = 0
) -> list[RecallQuestion]:
    """Returns held-out questions about a fact stated once, ``distance`` tokens before.

    Between fact and question the story continues. It states other values for other
    people's facts of the same kind, and never mentions the fact itself.

    Args:
        count: How many questions.
        distance: Tokens from the value in the fact to the answer; met to within 5 %.
        count_tokens: Length of a text in tokens.
        seed: Other seeds give other questions.

    Raises:
        ValueError: If no story meets ``distance``, for example one below about 60 tokens.
    """
    return [
        _recall_question(random.Random(f"recall/{seed}/{distance}/{i}"), distance, count_tokens) for i in range(count)
    ]


def _recall_question(rng: random.Random, distance: int, count_tokens: Callable[[str], int]) -> RecallQuestion:
    for _ in range(_MAX_TRIES):
        question = _try_question(rng, distance, count_tokens)
        if question is not None:
            return question
    raise ValueError(f"no story puts a fact {distance} tokens before its question")


def _try_question(rng: random.Random, distance: int, count_tokens: Callable[[str], int]) -> RecallQuestion | None:
    story = _Story(rng, "heldout", max(distance, 150))
    story.scene()
    name = story.cast[story.turn % len(story.cast)]
    kind = next((k for k in story.kinds if (name, k.noun) not in story.facts), None)
    if kind is None:
        return None
    value = rng.choice(values_of("heldout", name, kind))
    fact = story.tell(name, kind, value, _PLAIN)
    fact.due = float("inf")
    start = len(story.sentences)
    told = " ".join(story.sentences).removesuffix(".")
    while story.words - told.count(" ") < distance:
        story.scene()
    question = fact.fill(_QUESTION)
    middle = _cut(story.sentences[start:], distance - count_tokens(question), count_tokens)
    prompt = " ".join([told + ".", *middle, question])
    reached = count_tokens(prompt) - count_tokens(told) + 1
    if abs(reached - distance) > _DISTANCE_TOLERANCE * distance or not _competes(fact, middle):
        return None
    return RecallQuestion(prompt, " " + value, reached)


def _cut(sentences: list[str], budget: int, count_tokens: Callable[[str], int]) -> list[str]:
    """Returns the leading sentences whose token count comes closest to ``budget``."""
    empty = count_tokens("")
    totals = [0]
    for sentence in sentences:
        totals.append(totals[-1] + count_tokens(" " + sentence) - empty)
    return sentences[: min(range(len(totals)), key=lambda i: abs(totals[i] - budget))]


def _competes(fact: _Fact, middle: list[str]) -> bool:
    """Whether the text states another value for somebody else's fact of this kind."""
    words = " ".join(middle).replace(".", "").split(" ")
    others = set(fact.kind.values) - {fact.value}
    return bool(others.intersection(words))
