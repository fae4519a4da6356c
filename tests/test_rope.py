"""The closed forms of `calibrate.rope` against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from kvslim.calibrate.rope import average_mean, average_moment, mean_phase, rotate

FREQUENCIES = 10000.0 ** -(np.arange(4) / 4)  # rotary_dim 8


@pytest.fixture
def vectors() -> np.ndarray:
    mixing = np.random.default_rng(1).standard_normal((3, 12, 12))
    return np.random.default_rng(0).standard_normal((3, 50, 12)) @ mixing + 1.0


def test_rotation_matches_transformers_when_given_its_positions() -> None:
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = torch.randn(1, 1, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angle = torch.arange(6)[:, None] * torch.from_numpy(FREQUENCIES)
    angle = torch.cat([angle, angle], dim=-1)[None]
    expected, _ = apply_rotary_pos_emb(x, x, angle.cos(), angle.sin())
    np.testing.assert_allclose(rotate(x.numpy(), np.arange(6), FREQUENCIES), expected.numpy(), atol=1e-12)


def test_rotation_is_undone_when_positions_are_negated(vectors: np.ndarray) -> None:
    positions = np.arange(50) * 7
    turned = rotate(vectors, positions, FREQUENCIES)
    assert not np.allclose(turned, vectors)
    np.testing.assert_allclose(rotate(turned, -positions, FREQUENCIES), vectors, atol=1e-9)


@pytest.mark.parametrize("frequency", [0.0, 1e-13, 0.01, 1.0, 2 * np.pi, -0.3])
def test_mean_phase_equals_the_sum_when_averaged_by_hand(frequency: float) -> None:
    expected = np.exp(1j * frequency * np.arange(37)).mean()
    np.testing.assert_allclose(mean_phase(np.array(frequency), 37), expected, atol=1e-9)


@pytest.mark.parametrize("frequencies", [FREQUENCIES, np.zeros(0), FREQUENCIES[:2]])
def test_averages_equal_brute_force_when_every_position_is_visited(
    vectors: np.ndarray, frequencies: np.ndarray
) -> None:
    context = 97
    moment = np.einsum("hnd,hne->hde", vectors, vectors) / vectors.shape[1]
    turned = [rotate(vectors, np.full(50, t), frequencies) for t in range(context)]
    brute = np.mean([np.einsum("hnd,hne->hde", x, x) / vectors.shape[1] for x in turned], axis=0)
    np.testing.assert_allclose(average_moment(moment, frequencies, context), brute, atol=1e-9)
    mean = np.mean([x.mean(axis=1) for x in turned], axis=0)
    np.testing.assert_allclose(average_mean(vectors.mean(axis=1), frequencies, context), mean, atol=1e-9)
