"""Least-squares maps from what the cache of one layer holds to the keys and values of a later layer.

Keys meet queries after RoPE, which turns the keys of both layers by the position of their token. A map that is least
squares at the positions of a short text need not be so further on. So keys are turned back, their joint moments taken
before RoPE, and these averaged in closed form over all positions of the target context (`rope.average_product`): the
map is the least-squares one of all those positions together. Tokens count by the attention that the reading layer pays
them. An error that all keys share moves no softmax, and one that all values share goes into the output's bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvslim.calibrate import rope
from kvslim.transform.edits import Array

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics

RIDGE = 1e-3  # of the source's mean power
TINY = np.finfo(np.float64).tiny


class Maps(NamedTuple):
    """Maps of each reading kv head j from each source head i; J and I heads, d head_dim, r rank.

    Attributes:
        key: [J, I, r, d]; a key is `y @ key[j, i]` but for what all keys share, y being what the source caches of it.
        value: [J, I, r, d]; a value is `y @ value[j, i] + offset[j, i]`.
        offset: [J, I, d].
        key_error: [J, I] mean squared error of the scores over their variance, 0 to 1.
        value_error: [J, I] the same of what attention adds to the hidden states.
    """

    key: Array
    value: Array
    offset: Array
    key_error: Array
    value_error: Array


@dataclass(frozen=True)
class _Vectors:
    """Keys or values of one head, or of several.

    Attributes:
        body: [..., n, d] of sampled tokens, before RoPE.
        sinks: [..., m, d] of first tokens, as attention sees them.
        frequencies: RoPE's; empty for values.
    """

    body: Array
    sinks: Array
    frequencies: Array

    def of(self, heads: int | list[int]) -> _Vectors:
        """Those of one head or of several."""
        return _Vectors(self.body[heads], self.sinks[heads], self.frequencies)


class _Weights(NamedTuple):
    """What sampled tokens, [n], and first tokens, [m], count; together 1."""

    body: Array
    sinks: Array


class _Fit(NamedTuple):
    """One head's maps from every source head: [I, r, d], [I, d] and [I]."""

    found: Array
    offset: Array
    error: Array


def fit_maps(
    statistics: CalibrationStatistics,
    layer: int,
    source: int,
    heads: tuple[int, ...],
    encoders: tuple[Array | None, Array | None] = (None, None),
) -> Maps:
    """The maps of a layer from a source.

    Args:
        statistics: What is known of both.
        layer: The layer that reads.
        source: The layer whose cache it reads.
        heads: The source's kv heads that have a cache.
        encoders: [kv_heads, d, r] codes of the source's keys and values; None where they are cached as they are.
    """
    picked, context, plain = list(heads), int(statistics.context), np.eye(statistics.key_samples.shape[-1])
    weights = [_weights(statistics, layer, head) for head in range(statistics.key_samples.shape[1])]
    fits = []
    for vectors, metric, encoder in (
        (_keys, statistics.query_moment[layer], encoders[0]),
        (_values, statistics.output_gram[layer], encoders[1]),
    ):
        own, given = vectors(statistics, layer), vectors(statistics, source).of(picked)
        code = np.broadcast_to(plain, metric.shape)[picked] if encoder is None else encoder[picked]
        each = [_fit(own.of(head), given, code, weights[head], metric[head], context) for head in range(len(weights))]
        fits.append(_Fit(*(np.stack(parts) for parts in zip(*each, strict=True))))
    key, value = fits
    return Maps(key.found, value.found, value.offset, key.error, value.error)


def _fit(own: _Vectors, given: _Vectors, code: Array, weights: _Weights, metric: Array, context: int) -> _Fit:
    """Ridge regression of one head's vectors on what each source head caches.

    Args:
        own: The head's.
        given: [I, ...], the source's.
        code: [I, d, r], how the source caches them.
        weights: What each token counts.
        metric: [d, d], what an error costs.
        context: Positions to average over.
    """
    power = _covariance(given, given, weights, context)
    level = RIDGE * np.trace(power, axis1=1, axis2=2)[:, None, None] / power.shape[-1]
    power = code.swapaxes(1, 2) @ (power + (level + TINY) * np.eye(power.shape[-1])) @ code
    products = code.swapaxes(1, 2) @ _covariance(given, own, weights, context)
    found = np.linalg.solve(power, products)
    total = _covariance(own, own, weights, context)
    missing = total - products.swapaxes(1, 2) @ found
    error = np.einsum("ide,ed->i", missing, metric) / max(float(np.einsum("de,ed->", total, metric)), TINY)
    mean = np.einsum("id,idr->ir", _mean(given, weights, context), code)
    return _Fit(found, _mean(own, weights, context) - np.einsum("ir,ird->id", mean, found), np.clip(error, 0, 1))


def _covariance(left: _Vectors, right: _Vectors, weights: _Weights, context: int) -> Array:
    """[..., d, d] of two vectors of a token, after RoPE at all positions of the context."""
    body = (left.body * weights.body[:, None]).swapaxes(-1, -2) @ right.body
    sinks = (left.sinks * weights.sinks[:, None]).swapaxes(-1, -2) @ right.sinks
    means = _mean(left, weights, context)[..., None] * _mean(right, weights, context)[..., None, :]
    return np.asarray(rope.average_product(body, (left.frequencies, right.frequencies), context) + sinks - means)


def _mean(vectors: _Vectors, weights: _Weights, context: int) -> Array:
    body = np.einsum("n,...nd->...d", weights.body, vectors.body)
    sinks = np.einsum("n,...nd->...d", weights.sinks, vectors.sinks)
    return np.asarray(rope.average_mean(body, vectors.frequencies, context) + sinks)


def _weights(statistics: CalibrationStatistics, layer: int, head: int) -> _Weights:
    received, mass = statistics.received[layer, head], statistics.sink_mass[layer, head]
    sinks = statistics.sink_keys.shape[2]
    return _Weights((1 - mass) * received / max(received.sum(), TINY), np.full(sinks, mass / sinks))


def _keys(statistics: CalibrationStatistics, layer: int) -> _Vectors:
    frequencies = statistics.frequencies[layer]
    bare = rope.rotate(statistics.key_samples[layer], -statistics.positions, frequencies)
    return _Vectors(bare, statistics.sink_keys[layer].astype(np.float64), frequencies)


def _values(statistics: CalibrationStatistics, layer: int) -> _Vectors:
    body, sinks = statistics.value_samples[layer], statistics.sink_values[layer]
    return _Vectors(body.astype(np.float64), sinks.astype(np.float64), np.zeros(0))
