"""`kv_pca`: the algebra of its bases, and the ranks it decides on."""

from __future__ import annotations

import numpy as np
import pytest
from support.numbers_of_a_model import SPEC, statistics_of

from kvslim.caches import FullCache
from kvslim.errors import UsageError
from kvslim.methods.kv_pca import Basis, KvPca, balanced_basis
from kvslim.transform.edits import LayerEdit
from kvslim.types import LayerPlan, Plan

DIM = 16


def moment(seed: int, decay: float = 0.6) -> np.ndarray:
    """[2, DIM, DIM] second moments with a decaying spectrum in random directions."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((2, DIM, DIM)))[0]
    return turn @ (decay ** np.arange(DIM)[:, None] * turn.swapaxes(-1, -2))


def score_error(basis: Basis, rank: int, keys: np.ndarray, queries: np.ndarray) -> float:
    """E[(q . k - q~ . y)^2] for independent q and k of the given moments."""
    dropped = np.eye(DIM) - basis.encoder[..., :rank] @ basis.decoder[..., :rank].swapaxes(-1, -2)
    return float(np.einsum("hij,hjk,hkl,hil->", dropped.swapaxes(-1, -2) @ keys, dropped, queries, np.eye(DIM)[None]))


def test_full_rank_code_loses_nothing() -> None:
    basis = balanced_basis(moment(0), moment(1), 1e-2)
    product = basis.encoder @ basis.decoder.swapaxes(-1, -2)
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(DIM), product.shape), atol=1e-10)


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_balanced_code_beats_every_other_when_rank_is_equal(rank: int) -> None:
    keys, queries = moment(0), moment(1)
    best = score_error(balanced_basis(keys, queries, 1e-9), rank, keys, queries)
    plain_pca = balanced_basis(keys, np.broadcast_to(np.eye(DIM), keys.shape), 1e-9)
    assert best < score_error(plain_pca, rank, keys, queries)
    rng = np.random.default_rng(2)
    for _ in range(50):
        shaken = rng.standard_normal((2, DIM, DIM)) * 0.3 + np.eye(DIM)
        other = balanced_basis(shaken @ keys @ shaken.swapaxes(-1, -2), queries, 1e-9)
        assert best <= score_error(other, rank, keys, queries) + 1e-12


@pytest.mark.parametrize("dead", ["keys", "queries", "both"])
def test_code_of_a_head_that_is_always_zero_is_finite_and_spares_the_others(dead: str) -> None:
    keys, queries = moment(1), moment(2)
    whole = balanced_basis(keys, queries, 1e-6)
    for side, name in ((keys, "keys"), (queries, "queries")):
        if dead in (name, "both"):
            side[0] = 0
    found = balanced_basis(keys, queries, 1e-6)
    for array in (found.encoder, found.decoder):
        assert np.isfinite(array.astype(np.float32)).all()
    np.testing.assert_array_equal(found.encoder[1], whole.encoder[1])


def test_energy_is_the_share_of_the_score_energy_that_is_kept() -> None:
    keys, queries = moment(0), moment(1)
    basis = balanced_basis(keys, queries, 1e-12)
    whole = float(np.einsum("hij,hji->", keys, queries))
    kept = 1 - score_error(basis, 6, keys, queries) / whole
    weights = np.einsum("hij,hji->h", keys, queries) / whole
    assert kept == pytest.approx(float(basis.energy[:, 5] @ weights), abs=1e-6)


def cache_of(layer: LayerPlan) -> FullCache:
    assert isinstance(layer.cache, FullCache)
    return layer.cache


def test_mean_output_passes_exactly_when_rank_is_small() -> None:
    statistics = statistics_of(SPEC)
    method = KvPca(rank=8)
    plan = method.decide(SPEC, statistics, Plan.identity(SPEC))
    (edit, *_) = method.apply(SPEC, statistics, plan, (LayerEdit(),) * SPEC.layers)
    code = edit.code
    assert code.value_encoder is not None
    assert code.value_decoder is not None
    assert code.value_offset is not None
    mean = statistics.output_mean[0]
    encoder = np.repeat(code.value_encoder, SPEC.group_size, axis=0)
    decoded = np.einsum("hd,hdr,hre->he", mean, encoder, code.value_decoder) + code.value_offset
    np.testing.assert_allclose(decoded, mean, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "rank"),
    [({"rank": 8}, 8), ({"rank_ratio": 0.8}, 8), ({"rank_ratio": 0.01}, 8), ({"rank_ratio": 1}, 16)],
)
def test_rank_is_as_given_in_steps_of_8(options: dict[str, float], rank: int) -> None:
    plan = KvPca.model_validate(options).decide(SPEC, statistics_of(SPEC), Plan.identity(SPEC))
    assert {cache_of(layer).rank for layer in plan.layers} == {rank}


def test_rank_is_the_least_that_keeps_the_energy_when_energy_is_given() -> None:
    statistics = statistics_of(SPEC)
    score = KvPca(rank=8).decide(SPEC, statistics, Plan.identity(SPEC)).layers[0].score
    assert score is not None
    for energy, rank in ((score - 1e-6, 8), (score + 1e-6, 16)):
        plan = KvPca(energy=energy).decide(SPEC, statistics, Plan.identity(SPEC))
        assert cache_of(plan.layers[0]).rank == rank


def test_all_coordinates_stay_when_no_size_is_given() -> None:
    plan = KvPca().decide(SPEC, statistics_of(SPEC), Plan.identity(SPEC))
    given = [(cache_of(layer).rank, layer.score) for layer in plan.layers]
    assert given == [(SPEC.head_dim, pytest.approx(1.0))] * SPEC.layers


@pytest.mark.parametrize("options", [{"rank": 8, "energy": 0.9}, {"energy": 0.9, "rank_ratio": 0.5}])
def test_options_are_refused_when_more_than_one_size_is_given(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"give rank(_ratio)? or energy, not both"):
        KvPca.model_validate(options)


@pytest.mark.parametrize("rank", [12, 24])
def test_rank_is_refused_when_it_does_not_fit(rank: int) -> None:
    with pytest.raises(UsageError, match=f"rank {rank}"):
        KvPca(rank=rank).check(SPEC)
