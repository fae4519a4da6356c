"""Sample answers side by side, with the words marked in which the artifact differs from the plain export."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import NamedTuple

from kvslim.measures import SampleAnswer

WORDS = re.compile(r"\S+\s*|^\s+")


class Piece(NamedTuple):
    """Words of an answer, and whether the other answer lacks them at this place."""

    text: str
    differs: bool


@dataclass(frozen=True)
class Answer:
    """A prompt with both continuations in pieces."""

    prompt: str
    plain: tuple[Piece, ...]
    artifact: tuple[Piece, ...]

    @property
    def same(self) -> bool:
        """Whether both are equal."""
        return not any(piece.differs for piece in (*self.plain, *self.artifact))


def compared_answer(sample: SampleAnswer) -> Answer:
    """Both answers, compared word by word; space behind a word belongs to it, but is not marked."""
    plain, artifact = (WORDS.findall(answer.lstrip(" ")) for answer in (sample.plain, sample.artifact))
    bare = [[word.rstrip() for word in side] for side in (plain, artifact)]
    steps = SequenceMatcher(None, bare[0], bare[1], autojunk=False)
    left, right = list[Piece](), list[Piece]()
    for kind, *ends in steps.get_opcodes():
        left += _pieces("".join(plain[ends[0] : ends[1]]), kind != "equal")
        right += _pieces("".join(artifact[ends[2] : ends[3]]), kind != "equal")
    return Answer(sample.prompt, tuple(left), tuple(right))


def _pieces(text: str, differs: bool) -> Iterator[Piece]:
    words = text.rstrip() if differs else text
    yield from (piece for piece in (Piece(words, differs), Piece(text[len(words) :], False)) if piece.text)


def differing(answers: tuple[Answer, ...]) -> str:
    """How many answers are the same, in words."""
    same = sum(answer.same for answer in answers)
    return f"{same} of {len(answers)} answers {'is' if same == 1 else 'are'} the same to the word." if answers else ""
