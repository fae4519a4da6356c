"""Rank correlation of retrieval: against a hand count, and what it does and does not see."""

from __future__ import annotations

import numpy as np
import pytest

from kvslim.validation.retrieval import retrieval_rank_correlation

RNG = np.random.default_rng(0)
EMBEDDINGS = RNG.standard_normal((30, 8)).astype(np.float32)


def circle(*degrees: float) -> np.ndarray:
    """Unit vectors in the plane, whose cosines order as their angles."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_correlation_is_one_when_embeddings_are_turned_and_scaled() -> None:
    turn, _ = np.linalg.qr(RNG.standard_normal((8, 8)))
    assert retrieval_rank_correlation(EMBEDDINGS, 3 * EMBEDDINGS @ turn) == pytest.approx(1)


def test_correlation_is_near_zero_when_embeddings_are_others() -> None:
    found = retrieval_rank_correlation(EMBEDDINGS, RNG.standard_normal((30, 8)))
    assert found is not None
    assert abs(found) < 0.15


def test_correlation_is_the_mean_over_queries_when_a_sentence_moves() -> None:
    # Neighbours by nearness, before and after: 1 2 3, 3 1 2; 0 2 3, 3 0 2; 1 0 3, 1 3 0; 2 1 0, 0 1 2.
    spearman = [-0.5, -0.5, 0.5, -1.0]
    found = retrieval_rank_correlation(circle(0, 10, 30, 70), circle(0, 10, 30, 4))
    assert found == pytest.approx(np.mean(spearman))


def test_ties_share_their_rank() -> None:
    reference, found = circle(0, 20, -20, 90), circle(0, 20, -25, 90)
    # Of the first query two neighbours tie before: ranks 2.5 2.5 1 against 3 2 1, whose correlation is 0.866.
    others = [1.0, 1.0, 1.0]
    assert retrieval_rank_correlation(reference, found) == pytest.approx(np.mean([np.sqrt(0.75), *others]), abs=1e-6)


def test_correlation_is_zero_when_all_embeddings_are_one() -> None:
    assert retrieval_rank_correlation(EMBEDDINGS, np.ones((30, 4))) == 0


def test_correlation_is_unknown_when_there_is_no_order() -> None:
    assert retrieval_rank_correlation(EMBEDDINGS[:2], EMBEDDINGS[:2]) is None
