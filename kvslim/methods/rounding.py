"""Static symmetric steps for integer caches, and what rounding with them costs the attention that reads them.

The kernel stores round(x / step) and computes with step * round(x / step). Of a grid of clips the one with the least
mean fourth power of the error is taken: one wild score does more harm to a softmax than many small errors, so a mean
square clips too much, and the largest value seen clips too little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvslim.calibrate.recording import SINKS
from kvslim.contract import Granularity
from kvslim.transform.edits import RESIDUAL_STEPS, Array, LayerEdit

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics

CLIPS = np.linspace(1.0, 0.3, 22, dtype=np.float32)
HEADROOM = 1.25  # an 8-bit step is small enough to leave room for larger values than the samples hold
TINY = 1e-8


def fit_steps(samples: Array, weights: Array, granularity: Granularity, bits: int) -> Array:
    """The quantisation step of each coordinate.

    Args:
        samples: [heads, n, dim] values that will be cached.
        weights: [heads, n] weight of each sample.
        granularity: One step per coordinate, or one for all.
        bits: 8 or 4.

    Returns:
        [heads, dim] steps.
    """
    samples, most = samples.astype(np.float32), (1 << (bits - 1)) - 1
    peaks = np.abs(samples).max(axis=1)
    peaks = np.maximum(peaks if granularity == "per_channel" else np.full_like(peaks, peaks.max(initial=0)), TINY)
    errors = np.stack([_fourth_power(samples, weights, peaks * clip / most, bits) for clip in CLIPS])
    if granularity == "per_tensor":
        errors = np.broadcast_to(errors.sum((1, 2), keepdims=True), errors.shape)
    steps: Array = peaks.astype(np.float64) * CLIPS[errors.argmin(0)] / most
    return steps * HEADROOM if bits == 8 else steps


def peak_steps(samples: Array, granularity: Granularity, bits: int) -> Array:
    """Steps that clip no sample: min-max calibration, kept for comparison; arguments as for `fit_steps`."""
    peaks = np.maximum(np.abs(samples).max(axis=1), TINY)
    peaks = peaks if granularity == "per_channel" else np.full_like(peaks, peaks.max())
    return np.asarray(peaks / ((1 << (bits - 1)) - 1), dtype=np.float64)


def rounded(values: Array, steps: Array, bits: int, residual: int = 0, feedback: Array | None = None) -> Array:
    """What an integer cache gives back of values [heads, n, dim].

    Args:
        values: What is cached.
        steps: [heads, dim].
        bits: 8 or 4.
        residual: The leading coordinates that are held twice.
        feedback: [heads, dim / 2, dim / 2], see `transform.edits.Rounding`; not beside a residual.
    """
    if feedback is not None:
        half = feedback.shape[-1]
        last = rounded(values[..., half:], steps[:, half:], bits)
        first = with_feedback(values, last, feedback)
        return np.concatenate([rounded(first, steps[:, :half], bits), last], axis=-1)
    most = 1 << (bits - 1)
    coarse = np.clip(np.round(values / steps[:, None]), -most, most - 1) * steps[:, None]
    if residual:
        top = slice(0, residual)
        coarse[..., top] += rounded(values[..., top] - coarse[..., top], steps[:, top] / RESIDUAL_STEPS, bits)
    return coarse


def with_feedback(values: Array, last: Array, feedback: Array) -> Array:
    """The first half of values [heads, n, dim], with what it takes up where the last half becomes `last`."""
    half = feedback.shape[-1]
    return np.asarray(values[..., :half] + (values[..., half:] - last) @ feedback.swapaxes(-1, -2))


def sample_weights(statistics: CalibrationStatistics, layer: int) -> Array:
    """[heads, samples] weights that sum to 1: the attention that each gets; sinks share theirs."""
    received, sinks = statistics.received[layer].astype(np.float64) + TINY, statistics.sink_keys.shape[2]
    mass = statistics.sink_mass[layer][:, None]
    body = (1 - mass) * received / received.sum(1, keepdims=True)
    return np.concatenate([body, np.repeat(mass / sinks, sinks, 1)], axis=1)


def key_samples(statistics: CalibrationStatistics, layer: int) -> Array:
    """[heads, samples, head_dim]: keys at random positions of the target context, then those of the sinks."""
    return np.concatenate([statistics.key_samples[layer], statistics.sink_keys[layer]], axis=1)


def value_samples(statistics: CalibrationStatistics, layer: int) -> Array:
    """[heads, samples, head_dim]: the values of the same tokens."""
    return np.concatenate([statistics.value_samples[layer], statistics.sink_values[layer]], axis=1)


def first_value(statistics: CalibrationStatistics, layer: int) -> Array:
    """[heads, head_dim]: the mean value of the first token, which most attention sinks are."""
    return np.asarray(statistics.sink_values[layer][:, ::SINKS].mean(1, dtype=np.float64))


def key_metric(statistics: CalibrationStatistics, layer: int, edit: LayerEdit) -> Array:
    """[heads, rank, rank]: second moment of queries as they meet a layer's coded keys."""
    metric = statistics.query_moment[layer]
    if (query := edit.code.query_encoder) is None:
        return metric
    decoder = query[:: len(query) // len(metric)]
    return np.asarray(decoder.swapaxes(1, 2) @ metric @ decoder)


def value_metric(statistics: CalibrationStatistics, layer: int, edit: LayerEdit) -> Array:
    """[heads, rank, rank]: what an error in a layer's coded values costs downstream."""
    metric = statistics.output_gram[layer]
    if (given := edit.code.value_decoder) is None:
        return metric
    decoder = given[:: len(given) // len(metric)]
    return np.asarray(decoder @ metric @ decoder.swapaxes(1, 2))


def score_error(error: Array, weights: Array, metric: Array) -> float:
    """Mean square of what an error does to products with its readers, summed over heads.

    Args:
        error: [heads, n, dim] of each sample.
        weights: [heads, n].
        metric: [heads, dim, dim] second moment of the readers.
    """
    return float(np.einsum("hn,hnd,hnd->", weights, error @ metric, error))


def _fourth_power(samples: Array, weights: Array, steps: Array, bits: int) -> Array:
    """[heads, dim] weighted sum of the fourth power of the rounding and clipping error."""
    most = 1 << (bits - 1)
    error = samples / steps[:, None]
    error -= np.clip(np.rint(error), -most, most - 1)
    error *= steps[:, None]
    np.square(error, out=error)
    np.square(error, out=error)
    powered: Array = (weights[:, None].astype(np.float32) @ error)[:, 0]
    return powered
