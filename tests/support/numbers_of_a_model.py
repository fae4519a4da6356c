"""Made-up statistics of a small model, for tests of the mathematics alone."""

from __future__ import annotations

import numpy as np

from kvslim.calibrate.statistics import CalibrationStatistics
from kvslim.contract import ModelSpec
from support.tiny_artifact import SPEC

__all__ = ["SPEC", "statistics_of"]


def statistics_of(spec: ModelSpec, seed: int = 0) -> CalibrationStatistics:
    """Statistics of random vectors with spectra that decay."""
    rng = np.random.default_rng(seed)
    shape = (spec.layers, spec.kv_heads)
    dim = spec.head_dim

    def vectors(count: int) -> np.ndarray:
        mixing = rng.standard_normal((*shape, dim, dim)) * 0.8 ** np.arange(dim)[:, None]
        return rng.standard_normal((*shape, count, dim)) @ mixing

    def moment(states: np.ndarray) -> np.ndarray:
        return np.einsum("lhnd,lhne->lhde", states, states) / states.shape[2]

    keys, values, queries, weights = vectors(300), vectors(300), vectors(300), vectors(300)
    return CalibrationStatistics(
        key_moment=moment(keys),
        query_moment=moment(queries),
        output_moment=moment(values),
        output_mean=rng.standard_normal((spec.layers, spec.q_heads, dim)) + 0.5,
        fluctuation=rng.uniform(0.1, 1, (spec.layers, spec.q_heads)),
        sharing_loss=rng.uniform(0.1, 1, (spec.layers, spec.q_heads, spec.q_heads)) * (1 - np.eye(spec.q_heads)),
        output_gram=moment(weights),
        key_samples=keys,
        value_samples=values,
        received=rng.uniform(0, 1e-2, (*shape, 300)),
        positions=rng.integers(0, 1000, 300),
        frequencies=np.zeros((spec.layers, 0)),
        context=np.array(1000),
        sink_keys=vectors(40) + 3,
        sink_values=vectors(40),
        sink_mass=np.full(shape, 0.4),
        attention_mean=np.full((spec.layers, spec.hidden_size), 0.1),
        mlp_mean=np.full((spec.layers, spec.hidden_size), 0.2),
        inner_mean=rng.standard_normal((spec.layers, 128)),
        inner_square=rng.uniform(1, 2, (spec.layers, 128)) + 9,
        inner_added=rng.uniform(0, 1, (spec.layers, 128)),
        influence=np.tile(np.arange(1.0, 4.0), (spec.layers, 1)),
        age_mass=rng.dirichlet(np.ones(6), shape) * 0.6,
        windows=rng.integers(0, spec.vocab_size, (4, 32)),
        loss_mask=np.ones((4, 32), bool),
    )
