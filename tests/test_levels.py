"""Symmetric Lloyd-Max levels against the published ones of a Gaussian, and against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from kvslim.methods.levels import fit_levels

# Max, "Quantizing for minimum distortion", 1960, table I: positive output levels for a unit normal.
GAUSSIAN = {1: [0.7980], 2: [0.4528, 1.510], 3: [0.2451, 0.7560, 1.344, 2.152]}


@pytest.mark.parametrize("bits", GAUSSIAN)
def test_levels_equal_the_published_ones_when_samples_are_normal(bits: int) -> None:
    samples = np.random.default_rng(0).standard_normal(400_000)
    levels = fit_levels(samples, np.ones_like(samples), bits)
    np.testing.assert_allclose(levels[len(levels) // 2 :], GAUSSIAN[bits], rtol=0.02)
    np.testing.assert_array_equal(levels, -levels[::-1])


def test_levels_are_the_best_pair_when_weights_differ() -> None:
    rng = np.random.default_rng(1)
    samples, weights = rng.standard_t(4, 2000), rng.random(2000)

    def error(levels: np.ndarray) -> float:
        distance = np.abs(samples[:, None] - levels).min(1)
        return float((weights * distance**2).sum())

    fitted = fit_levels(samples, weights, 2)
    grid = np.linspace(0.05, 6, 60)
    best = min(error(np.array([-b, -a, a, b])) for a in grid for b in grid if a < b)
    assert error(fitted) <= best + 1e-9


@pytest.mark.parametrize("samples", [np.zeros(10), np.full(10, 3.0)], ids=["silent", "constant"])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_levels_are_finite_and_ascending_when_samples_are_degenerate(samples: np.ndarray, bits: int) -> None:
    levels = fit_levels(samples, np.ones_like(samples), bits)
    assert np.isfinite(levels).all()
    assert (np.diff(levels) >= 0).all()
