"""Recall through the KV cache, which perplexity does not show when a cache is compressed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvslim.errors import UsageError
from kvslim.progress import Progress, Silent
from kvslim.runtime.session import DecodeSession
from kvslim.validation.spans import SPAN, SPANS, spans_of

CUE = 4
QUESTIONS = "recall questions"  # for the progress
LEAST_ITEMS = 40  # questions before the verdict may be called clear
LEAST_OF_REACH = 12  # of each distance
ERROR = 0.01  # without a limit: the standard error that is small enough
LEVEL = 0.05  # chance that a verdict that was called clear is wrong
_SPREAD = 12.5  # makes the confidence sequence narrowest at some 100 questions


@dataclass(frozen=True)
class RecallItem:
    """A question whose answer is in its prompt.

    Attributes:
        prompt: Token ids up to the answer.
        answer: Token ids that must follow.
        reach: How many tokens back the answer stands at most.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    reach: int = 0


@dataclass(frozen=True)
class Recall:
    """Recall of a model and of its teacher on the same questions.

    Attributes:
        teacher: Share of answer tokens that are the teacher's most likely token, given the true tokens before them.
        student: The student's.
        questions: Number asked.
        drop_se: Standard error of `teacher - student` over the questions.
        by_reach: Recall of both by how many tokens back the answers stand at most.
    """

    teacher: float
    student: float
    questions: int
    drop_se: float
    by_reach: dict[int, tuple[float, float]]

    @property
    def drop(self) -> float:
        """Share of recall that the student has lost."""
        return self.teacher - self.student


def measure_recall(session: DecodeSession, items: Sequence[RecallItem]) -> float:
    """Share of answer tokens that are the model's most likely token, given the true tokens before them.

    Args:
        session: Model to ask; its cache must hold a prompt with its answer.
        items: Questions, at least one.

    Raises:
        UsageError: There are no items, one has an empty prompt or answer, or one does not fit the cache.
    """
    _check(items)
    return sum(_hits(session, items)) / sum(len(item.answer) for item in items)


@dataclass(frozen=True)
class Questions:
    """The graphs of a report, which are asked the same questions.

    Attributes:
        folders: The plain export and the artifact.
        capacity: Tokens that a cache must hold.
        label: What an item is, for the progress.
    """

    folders: tuple[Path, Path]
    capacity: int
    label: str = QUESTIONS

    def open(
        self, progress: Progress, threads: int | None
    ) -> Callable[[Sequence[Sequence[RecallItem]]], Iterator[tuple[int, int]]]:
        """What asks the questions of texts: of each, how many tokens of the answer teacher and student find."""
        teacher, student = (
            DecodeSession(folder, capacity=self.capacity, threads=threads, all_positions=True)
            for folder in self.folders
        )
        return lambda texts: both_hits(teacher, student, [item for text in texts for item in text], progress)


def both_hits(
    teacher: DecodeSession, student: DecodeSession, items: Sequence[RecallItem], progress: Progress | None = None
) -> Iterator[tuple[int, int]]:
    """Of each question, how many tokens of the answer a model and its teacher find.

    Args:
        teacher: Session of the plain export.
        student: Session of the model to measure; its cache must hold a prompt with its answer, as the teacher's.
        items: Questions.
        progress: Receives the progress.
    """
    asked = (progress or Silent()).track(items, QUESTIONS)
    for _, *hits in zip(asked, _hits(teacher, items), _hits(student, items), strict=False):
        yield hits[0], hits[1]


def compare_recall(
    hits: Iterable[tuple[int, int]], items: Sequence[RecallItem], max_drop: float | None = None
) -> Recall:
    """Recall of a student and its teacher, on so many of the questions as the verdict needs.

    After each question a confidence interval of the recall lost is taken, which holds at all times at once, so that
    looking often does not make a wrong verdict likelier: Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas, "Time-uniform
    central limit theory and asymptotic confidence sequences", 2024, theorem 2.2. Questions end when it lies on one
    side of the limit; without a limit, when the standard error is at most `ERROR`.

    Args:
        hits: Of each question, tokens of the answer that teacher and student find; no more are taken than needed.
        items: Questions, at least one.
        max_drop: Recall that the student may lose, or None.

    Raises:
        UsageError: As for `measure_recall`.
    """
    _check(items)
    tally = _Tally()
    wanted = Counter(
        {reach: min(LEAST_OF_REACH, count) for reach, count in Counter(each.reach for each in items).items()}
    )
    for (teacher, student), item in zip(hits, items, strict=False):
        tally.add(item, teacher, student)
        if tally.count >= LEAST_ITEMS and wanted <= Counter(tally.reaches) and tally.is_clear(max_drop):
            break
    return tally.recall()


class _Tally:
    """Answer tokens and hits of the questions so far."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int]] = []
        self.reaches: list[int] = []

    @property
    def count(self) -> int:
        return len(self.rows)

    def add(self, item: RecallItem, teacher: int, student: int) -> None:
        self.rows.append((len(item.answer), teacher, student))
        self.reaches.append(item.reach)

    def recall(self) -> Recall:
        rows, reaches = np.array(self.rows, dtype=np.float64), np.array(self.reaches)
        tokens, teacher, student = rows.T
        drop = (teacher - student).sum() / tokens.sum()
        # Answers may differ in length, so this is a ratio of sums; for equal lengths it is the error of a mean.
        rest = teacher - student - drop * tokens
        error = math.sqrt((rest**2).sum() / max(1, self.count - 1) / self.count) / float(tokens.mean())
        shares = [float(hits.sum() / tokens.sum()) for hits in (teacher, student)]
        by_reach: dict[int, tuple[float, float]] = {}
        for reach in sorted(set(self.reaches)):
            of, *hits = rows[reaches == reach].sum(0)
            by_reach[reach] = float(hits[0] / of), float(hits[1] / of)
        return Recall(shares[0], shares[1], self.count, error, by_reach)

    def is_clear(self, max_drop: float | None) -> bool:
        recall = self.recall()
        if max_drop is None:
            return recall.drop_se <= ERROR
        return abs(recall.drop - max_drop) > recall.drop_se * confidence_factor(self.count)


def confidence_factor(count: int, level: float = LEVEL) -> float:
    """Half the width of a confidence sequence after `count` observations, in standard errors of their mean.

    The mean is at any time beyond the upper end with a chance of `level`, and so it is beyond the lower end.
    """
    spread = _SPREAD / count
    return math.sqrt((1 + spread) * math.log((1 + 1 / spread) / (2 * level) ** 2))


def capacity_for(items: Sequence[RecallItem]) -> int:
    """Tokens that a cache must hold for the questions to be asked."""
    longest = held = 0
    for item, is_new in _by_text(items):
        held = len(item.prompt) if is_new else held + min(len(item.prompt), CUE)
        held += len(item.answer)
        longest = max(longest, held)
    return longest


def texts_of(items: Sequence[RecallItem]) -> list[list[RecallItem]]:
    """The questions of each text."""
    texts: list[list[RecallItem]] = []
    for item, is_new in _by_text(items):
        if is_new:
            texts.append([])
        texts[-1].append(item)
    return texts


def _by_text(items: Sequence[RecallItem]) -> Iterator[tuple[RecallItem, bool]]:
    """The questions, and whether each begins a text of its own."""
    text: tuple[int, ...] = ()
    for item in items:
        own = item.prompt[:-CUE]
        yield item, not own or own != text
        text = own


def _hits(session: DecodeSession, items: Sequence[RecallItem]) -> Iterator[int]:
    """Answer tokens found, item by item.

    Questions of one text follow each other behind it, so that it is read once, also by a cache that cannot go back.
    """
    last: tuple[int, ...] = ()
    for item, is_new in _by_text(items):
        if is_new:
            session.reset()
            last = ()
            if len(item.prompt) > CUE:
                session.prefill(item.prompt[:-CUE])
        tokens = (*last, *item.prompt[-CUE:], *item.answer)
        guesses = session.step(tokens[:-1], last=len(item.answer)).argmax(axis=-1)
        last = tokens[-1:]
        yield int(np.equal(guesses, item.answer).sum())


def _check(items: Sequence[RecallItem]) -> None:
    if not items or not all(item.prompt and item.answer for item in items):
        raise UsageError("recall needs prompts with answers", where="recall items", fix="pass at least one full item")


def repeated_spans(
    windows: npt.NDArray[np.int64],
    *,
    count: int,
    distance: int,
    seed: int = 0,
    spans: int = SPANS,
    spread: float = 0.5,
    starts: Collection[int] = (),
) -> tuple[RecallItem, ...]:
    """Recall items for any model: random tokens hidden in ordinary text, and at its end the same random tokens again.

    A text hides a number of spans, spread over its first part, and each of them makes an item. So the items of a
    text share all of the prompt but its end, and the text is read only once. The first `CUE` tokens of the second copy
    belong to the prompt and show where to look; the other `SPAN - CUE` are the answer. A span is drawn evenly from the
    distinct tokens of the text, so that word frequencies do not help. A token that starts every window (a BOS) starts
    every item and is never drawn.

    Args:
        windows: Ordinary text, token ids [n, length], from which spans and filler are taken.
        count: Items to make.
        distance: Tokens between the two copies of the first span of a text.
        seed: Seed of the draws; the same arguments give the same items.
        spans: In one text at most; a short one has room for fewer.
        spread: Share of a text that they are spread over: the last lies about this share of the distance behind the
            first.
        starts: Tokens that a text may start with; a single window does not tell by itself.

    Returns:
        Items with prompts of at most `1 + SPAN + distance + CUE` tokens and answers of `SPAN - CUE`.

    Raises:
        UsageError: The windows contain no text.
    """
    if windows.ndim != 2 or windows.size < 2:
        raise UsageError("recall needs text to hide spans in", where="recall items", fix="pass [n, length] tokens")
    is_known = len(windows) > 1 or int(windows[0, 0]) in starts
    has_bos = is_known and bool((windows[:, 0] == windows[0, 0]).all())
    start = (int(windows[0, 0]),) if has_bos else ()
    text = windows[:, len(start) :].reshape(-1)
    generator = np.random.default_rng(seed)
    items: list[RecallItem] = []
    while len(items) < count:
        items.extend(_items_of_a_text(text, start, distance, generator, spans, spread))
    return tuple(items[:count])


def _items_of_a_text(
    text: npt.NDArray[np.int64],
    start: tuple[int, ...],
    distance: int,
    generator: np.random.Generator,
    most: int,
    spread: float,
) -> list[RecallItem]:
    tokens = np.unique(text)
    count = spans_of(distance, most)
    spans = [generator.choice(tokens, size=SPAN, replace=len(tokens) < SPAN) for _ in range(count)]
    filler = np.resize(np.roll(text, -int(generator.integers(len(text)))), distance - (count - 1) * SPAN)
    places = np.linspace(0, max(0, int(distance * spread) - (count - 1) * SPAN), count).astype(int)
    pieces = np.split(filler, places[1:])
    hidden = np.concatenate([part for pair in zip(spans, pieces, strict=True) for part in pair])
    prompt = (*start, *hidden.tolist())
    return [RecallItem((*prompt, *span[:CUE].tolist()), tuple(span[CUE:].tolist()), distance) for span in spans]
