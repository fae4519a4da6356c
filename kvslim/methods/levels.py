"""Levels of a packed cache: symmetric Lloyd-Max quantisation (Max, "Quantizing for minimum distortion", 1960)."""

from __future__ import annotations

import numpy as np

Array = np.ndarray
ROUNDS = 100
TOLERANCE = 1e-7  # of the largest level


def fit_levels(samples: Array, weights: Array, bits: int) -> Array:
    """The levels with the least weighted mean square error, symmetric about 0.

    Args:
        samples: [n] numbers, in the unit that the levels are to have.
        weights: [n] weight of each, not negative.
        bits: Bits of an index.

    Returns:
        [2 ** bits] ascending levels.
    """
    magnitudes, weights = np.abs(samples), np.maximum(weights, 0)
    order = np.argsort(magnitudes)
    magnitudes, weights = magnitudes[order], weights[order]
    mass, moment = _running(weights), _running(weights * magnitudes)
    count = 1 << (bits - 1)
    levels = _start(magnitudes, mass, count)
    for _ in range(ROUNDS):
        edges = np.searchsorted(magnitudes, (levels[1:] + levels[:-1]) / 2)
        bounds = np.concatenate([[0], edges, [len(magnitudes)]])
        share = np.diff(mass[bounds])
        means = np.divide(np.diff(moment[bounds]), share, out=levels.copy(), where=share > 0)
        moved, levels = np.abs(means - levels).max(), means
        if moved <= TOLERANCE * levels[-1]:
            break
    return np.concatenate([-levels[::-1], levels])


def _running(values: Array) -> Array:
    """Sums of the first 0 .. n values."""
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _start(magnitudes: Array, mass: Array, count: int) -> Array:
    """Quantiles of the magnitudes; where several fall together, they are set a little apart, so that none is lost."""
    middles = (np.arange(count) + 0.5) / count * mass[-1]
    places = np.clip(np.searchsorted(mass[1:], middles), 0, len(magnitudes) - 1)
    apart = max(float(magnitudes[-1]), np.finfo(np.float64).tiny) * 1e-6 * np.arange(count)
    start: Array = magnitudes[places].astype(np.float64) + apart
    return start
