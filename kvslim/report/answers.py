"""Sample answers side by side, with the words marked in which the artifact differs from the plain export."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import NamedTuple

from kvslim.types import SampleAnswer

WORDS = re.compile(r"\s*\S+|\s+$")


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
    """Both answers, compared word by word."""
    plain, artifact = (WORDS.findall(answer.lstrip(" ")) for answer in (sample.plain, sample.artifact))
    steps = SequenceMatcher(None, plain, artifact, autojunk=False).get_opcodes()
    left = [Piece("".join(plain[start:end]), kind != "equal") for kind, start, end, _, _ in steps if end > start]
    right = [Piece("".join(artifact[start:end]), kind != "equal") for kind, _, _, start, end in steps if end > start]
    return Answer(sample.prompt, tuple(left), tuple(right))


def differing(answers: tuple[Answer, ...]) -> str:
    """How many answers are the same, in words."""
    same = sum(answer.same for answer in answers)
    return f"{same} of {len(answers)} answers {'is' if same == 1 else 'are'} the same to the word." if answers else ""
