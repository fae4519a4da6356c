"""Which heads share attention: clusters, their number, and what sharing costs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kvslim.caches.clustering import Formed, clusters_of, curve, elbow, prompt_loss
from kvslim.calibrate.attended import sharing_loss, value_power


def distances(*points: float) -> np.ndarray:
    """Squared distances of heads that lie on a line."""
    places = np.array(points)
    return np.square(places[:, None] - places[None])


def attention_of(heads: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Causal attention weights [heads, tokens, tokens] of random scores."""
    scores = np.random.default_rng(seed).standard_normal((heads, tokens, tokens)) * 3
    scores[:, np.triu(np.ones((tokens, tokens), bool), 1)] = -np.inf
    weights: np.ndarray = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    return weights


def test_clusters_are_found_around_the_head_in_their_middle() -> None:
    loss = distances(0.0, 9.1, 0.2, 9.0, 0.1, 9.2)
    assert clusters_of(loss, 2, pools=1) == (4, 1, 4, 1, 4, 1)
    assert clusters_of(loss, 6, pools=1) == (0, 1, 2, 3, 4, 5)


def test_swaps_mend_a_greedy_choice() -> None:
    """The best single head lies between two clusters, and is in neither of the best two."""
    places = -1.1, -1.0, -0.9, 0.0, 0.9, 1.0, 1.1
    loss = distances(*places)
    assert set(clusters_of(loss, 1, pools=1)) == {3}
    best = min(itertools.combinations(range(7), 2), key=lambda pair: loss[:, list(pair)].min(1).sum())
    assert 3 not in best
    found = clusters_of(loss, 2, pools=1)
    assert loss[range(7), found].sum() == pytest.approx(loss[:, list(best)].min(1).sum())


def test_heads_share_within_their_pool_alone() -> None:
    loss = distances(0.0, 5.0, 5.1, 0.1)
    assert clusters_of(loss, 2, pools=1) == (0, 1, 1, 0)
    found = clusters_of(loss, 2, pools=2)
    assert set(found[:2]) <= {0, 1}
    assert set(found[2:]) <= {2, 3}


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ((0.0, 0.01, 0.02, 5.0, 5.01, 9.0, 9.01, 9.02), 3),
        ((1.0, 1.0, 1.0, 1.0), 1),
        ((0.0, 0.01, 3.0, 7.0), 3),
    ],
)
def test_elbow_is_where_further_clusters_gain_little(points: tuple[float, ...], expected: int) -> None:
    loss = distances(*points)
    assert elbow(loss, pools=1) == expected
    assert (np.diff(curve(loss, pools=1)) <= 1e-12).all()


def test_elbow_leaves_every_head_its_own_when_all_are_equally_far() -> None:
    assert elbow(1 - np.eye(8), pools=1) == 8
    assert elbow(1 - np.eye(8), pools=4) == 8
    assert elbow(np.zeros((2, 2)), pools=2) == 2


def test_sharing_loss_is_the_error_of_each_head_by_the_weights_of_each_other() -> None:
    rng = np.random.default_rng(1)
    weights, power = attention_of(3, 7), rng.uniform(0.1, 2, (3, 7))
    found = sharing_loss(torch.from_numpy(weights[None]), torch.from_numpy(power[None]))[0].numpy()
    expected = [[(np.square(weights[i] - weights[j]) * power[i]).sum() for j in range(3)] for i in range(3)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_value_power_is_the_squared_norm_of_what_a_value_adds() -> None:
    rng = np.random.default_rng(2)
    value, output = rng.standard_normal((1, 2, 5, 4)), rng.standard_normal((2, 3, 6, 4))
    gram = np.einsum("hgod,hgoe->hgde", output, output)
    found = value_power(torch.from_numpy(value), torch.from_numpy(gram))[0].numpy()
    centred = value[0] - value[0].mean(1, keepdims=True)
    added = np.einsum("hgod,htd->hgto", output, centred)
    np.testing.assert_allclose(found, np.square(added).sum(-1).reshape(6, 5))


def test_prompt_decides_when_calibration_knows_nothing() -> None:
    """Heads 0 and 2 attend alike in this prompt, and so do 1 and 3."""
    weights = attention_of(2, 5)[[0, 1, 0, 1]]
    values = np.random.default_rng(3).standard_normal((4, 5, 8))
    seen = prompt_loss(weights, values, np.zeros((4, 4)))
    assert seen[0, 2] == seen[1, 3] == 0
    assert seen.sum() == pytest.approx(1)
    found = Formed(2, np.zeros((4, 4))).clusters(weights, values)
    assert found[0] == found[2] != found[1] == found[3]


def test_calibration_decides_when_the_prompt_shows_nothing() -> None:
    calibrated = distances(0.0, 4.0, 4.1, 0.1)
    uniform = np.tril(np.ones((4, 5, 5))) / np.arange(1, 6)[:, None]
    values = np.random.default_rng(3).standard_normal((4, 5, 8))
    found = Formed(2, calibrated).clusters(uniform, values)
    assert found[0] == found[3] != found[1] == found[2]
