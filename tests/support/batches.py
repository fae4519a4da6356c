"""Sequences of different lengths in one session, against each alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvslim.runtime.session import DecodeSession

LENGTHS, STEPS = (40, 3, 1, 21), 30
ENDS = (10, 29, 25, 17)  # steps after which each sequence has ended
SMALL_VOCABULARY = 24  # of the tiniest graphs


def check_batch(graph: Path) -> None:
    """Sequences that start with different lengths, and end one after another, get the logits that each gets alone."""
    session = DecodeSession(graph, capacity=max(LENGTHS) + STEPS, batch=len(LENGTHS))
    generator = np.random.default_rng(1)
    texts = [generator.integers(0, SMALL_VOCABULARY, length + STEPS) for length in LENGTHS]
    together = _together(session, texts)
    for text, length, end, found in zip(texts, LENGTHS, ENDS, together, strict=True):
        session.allocate(1)
        alone = [session.prefill(text[:length])]
        alone += [session.step(text[place : place + 1])[-1] for place in range(length, length + end)]
        np.testing.assert_allclose(found, alone, atol=1e-4)
        assert np.ptp(alone, axis=0).max() > 1e-2


def _together(session: DecodeSession, texts: list[np.ndarray]) -> list[list[np.ndarray]]:
    """The logits that follow each prompt, and then each of its tokens until it ends."""
    found: list[list[np.ndarray]] = [[] for _ in texts]
    logits = session.prefill_each([text[:length] for text, length in zip(texts, LENGTHS, strict=True)])
    live = list(range(len(texts)))
    for step in range(max(ENDS) + 1):
        for row in reversed(range(len(live))):
            place = live[row]
            found[place].append(logits[row])
            if ENDS[place] == step:
                session.drop(row)
                live[row] = live[-1]
                live.pop()
        if live:
            logits = session.step([[texts[place][LENGTHS[place] + step]] for place in live])[:, -1]
    return found
