"""Prompts of five kinds and of any length, for SmolLM2's chat template."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.subjects import ROOT

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
TURNS = (
    ("What should I pack for three days in the mountains?", "Warm layers, a rain jacket, good shoes, water and a map."),
    ("How long does it take to boil an egg?", "Six minutes for a soft yolk, ten minutes for a hard one."),
    ("My plant has yellow leaves. What is wrong?", "Most often it gets too much water. Let the soil dry first."),
    ("Can you explain what a mortgage is?", "It is a loan to buy a house, and the house is its security."),
    ("Is it better to run in the morning or in the evening?", "Both work. Choose the time that you can keep."),
    ("How do I say no to a friend?", "Be kind and clear, give one reason, and offer something else."),
)
NAMES = ("Anna", "Ben", "Clara", "David", "Ella", "Finn", "Greta", "Hugo")
THINGS = ("apples", "pencils", "stamps", "marbles", "cards", "shells")


def prompt(kind: str, story: Path, document: Path, encode: Callable[[str], list[int]], tokens: int) -> list[int]:
    """So many tokens of a kind of prompt, which end where an answer begins.

    Args:
        kind: One of `KINDS`.
        story: Prose to go on with.
        document: A text to ask about.
        encode: Gives the ids of a text.
        tokens: How long the prompt is to be.
    """
    before, pieces, after = KINDS[kind](story, document)
    first, last = encode(before), encode(after)
    middle = list[int]()
    for piece in pieces:
        middle += encode(piece)
        if len(first) + len(middle) + len(last) >= tokens:
            break
    room = max(0, tokens - len(first) - len(last))
    return (first + middle[len(middle) - min(room, len(middle)) :] + last)[-tokens:]


Parts = tuple[str, Iterator[str], str]  # what comes first, what fills the room, what comes last


def _chat(story: Path, document: Path) -> Parts:
    turns = (f"{USER}{asked}{END}{ASSISTANT}{answer}{END}" for asked, answer in itertools.cycle(TURNS))
    passages = (f"{USER}What do you think of this?\n{text}{END}{ASSISTANT}I like it.{END}" for text in _passages(story))
    mixed = (turn for pair in zip(passages, turns, strict=False) for turn in pair)
    return "", mixed, f"{USER}Please plan a birthday party for a child of seven, step by step.{END}{ASSISTANT}"


def _word_problems(story: Path, document: Path) -> Parts:
    generator = np.random.default_rng(0)
    solved = (_problem(generator, solved=True) for _ in itertools.count())
    return "", solved, _problem(generator, solved=False)


def _problem(generator: np.random.Generator, *, solved: bool) -> str:
    name, thing = generator.choice(NAMES), generator.choice(THINGS)
    boxes, each, given = (int(generator.integers(low, 12)) for low in (3, 4, 1))
    asked = (
        f"{USER}{name} has {boxes} boxes with {each} {thing} in each of them, and gives {given} {thing} to a friend. "
        f"How many {thing} are left?{END}{ASSISTANT}"
    )
    total = boxes * each
    answer = (
        f"First, {name} has {boxes} * {each} = {total} {thing}. After giving away {given} of them, {total} - {given} = "
        f"{total - given} {thing} are left. The answer is {total - given}.{END}"
    )
    return asked + answer if solved else asked


def _code(story: Path, document: Path) -> Parts:
    files = sorted((ROOT / "kvslim" / "methods").glob("*.py")) + sorted((ROOT / "kvslim" / "caches").glob("*.py"))
    sources = (f"# {path.name}\n{path.read_text(encoding='utf-8')}\n" for path in itertools.cycle(files))
    asked = 'def mean_and_variance(numbers):\n    """The mean and the variance of a list of numbers."""\n'
    return "", sources, f"# statistics.py\n{asked}"


def _document(story: Path, document: Path) -> Parts:
    asked = f"\n\nWhat is this text about? Answer with the most important facts.{END}{ASSISTANT}"
    return f"{USER}Read this text.\n\n", _passages(document), asked


def _story(story: Path, document: Path) -> Parts:
    return "", _passages(story), ""


def _passages(path: Path) -> Iterator[str]:
    paragraphs = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 80]
    return (f"{text}\n\n" for text in itertools.cycle(paragraphs))


KINDS: dict[str, Callable[[Path, Path], Parts]] = {
    "chat": _chat,
    "word problems": _word_problems,
    "code": _code,
    "document": _document,
    "story": _story,
}
