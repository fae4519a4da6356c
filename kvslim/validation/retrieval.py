"""Measures whether compressed embeddings find the same neighbours: the rank correlation of their similarities."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]


def retrieval_rank_correlation(reference: Floats, found: Floats) -> float | None:
    """Spearman's rank correlation of each sentence's cosines to all others, averaged over the sentences.

    Each sentence is the query once, and the others are what is retrieved. A shift that all embeddings share costs
    nothing; a changed order of neighbours does.

    Args:
        reference: [n, hidden] embeddings.
        found: [n, hidden] embeddings of the same sentences.

    Returns:
        -1 to 1; 0 for a query that is equally near to all others; None with fewer than three sentences, because two
        have no order.
    """
    if len(reference) < 3:
        return None
    left, right = _similarities(reference), _similarities(found)
    return float(np.mean([_spearman(*rows) for rows in zip(left, right, strict=True)]))


def _similarities(embeddings: Floats) -> Floats:
    """[n, n - 1] cosines of each embedding to the others."""
    units = embeddings / np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True)
    others = ~np.eye(len(units), dtype=bool)
    return (units @ units.T)[others].reshape(len(units), -1)


def _spearman(left: Floats, right: Floats) -> float:
    a, b = (ranks - ranks.mean() for ranks in (_ranks(left), _ranks(right)))
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / spread if spread else 0.0


def _ranks(values: Floats) -> Floats:
    """Ranks from 1; equal values share their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[places]
    return ranks
