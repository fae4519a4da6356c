"""Recall through the KV cache, which perplexity does not show when a cache is compressed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvslim.errors import UsageError
from kvslim.runtime.session import DecodeSession

CHUNK = 16
SPAN = 16
CUE = 4


@dataclass(frozen=True)
class RecallItem:
    """A question whose answer is in its prompt.

    Attributes:
        prompt: Token ids up to the answer.
        answer: Token ids that must follow.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def measure_recall(session: DecodeSession, items: Sequence[RecallItem]) -> float:
    """Share of answer tokens that are the model's most likely token, given the true tokens before them.

    Args:
        session: Model to ask; its cache must hold a prompt with its answer.
        items: Questions, at least one.

    Raises:
        UsageError: There are no items, one has an empty prompt or answer, or one does not fit the cache.
    """
    if not items or not all(item.prompt and item.answer for item in items):
        raise UsageError("recall needs prompts with answers", where="recall items", fix="pass at least one full item")
    hits = sum(_hits(session, item) for item in items)
    return hits / sum(len(item.answer) for item in items)


def _hits(session: DecodeSession, item: RecallItem) -> int:
    session.reset()
    guesses = [session.prefill(item.prompt, chunk=CHUNK).argmax()]
    if len(item.answer) > 1:
        guesses.extend(session.step(item.answer[:-1]).argmax(axis=-1))
    return int(np.equal(guesses, item.answer).sum())


def repeated_spans(
    windows: npt.NDArray[np.int64], *, count: int, distance: int, seed: int = 0
) -> tuple[RecallItem, ...]:
    """Recall items for any model: random tokens, ordinary text, then the same random tokens again.

    The first `CUE` tokens of the second copy belong to the prompt and show where to look; the other `SPAN - CUE` are
    the answer. A span is drawn evenly from the distinct tokens of the text, so that word frequencies do not help. A
    token that starts every window (a BOS) starts every item and is never drawn.

    Args:
        windows: Ordinary text, token ids [n, length], from which spans and filler are taken.
        count: Items to make.
        distance: Tokens of text between the two copies.
        seed: Seed of the draws; the same arguments give the same items.

    Returns:
        Items with prompts of at most `1 + SPAN + distance + CUE` tokens and answers of `SPAN - CUE`.

    Raises:
        UsageError: The windows contain no text.
    """
    if windows.ndim != 2 or windows.size < 2:
        raise UsageError("recall needs text to hide spans in", where="recall items", fix="pass [n, length] tokens")
    has_bos = len(windows) > 1 and bool((windows[:, 0] == windows[0, 0]).all())
    start = (int(windows[0, 0]),) if has_bos else ()
    text = windows[:, len(start) :].reshape(-1)
    generator = np.random.default_rng(seed)
    return tuple(_repeated_span(text, start, distance, generator) for _ in range(count))


def _repeated_span(
    text: npt.NDArray[np.int64], start: tuple[int, ...], distance: int, generator: np.random.Generator
) -> RecallItem:
    tokens = np.unique(text)
    span = tuple(generator.choice(tokens, size=SPAN, replace=len(tokens) < SPAN).tolist())
    filler = np.resize(np.roll(text, -int(generator.integers(len(text)))), distance)
    return RecallItem(prompt=(*start, *span, *filler.tolist(), *span[:CUE]), answer=span[CUE:])
