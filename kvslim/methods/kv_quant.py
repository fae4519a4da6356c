"""`kv_quant`: the KV cache in 8-bit integers with static symmetric scales.

The kernel stores round(x / step) and computes with step * round(x / step). Steps come from calibration samples rotated
to random positions of the target context, so that they hold beyond the calibration length. The clip is the one with
the least mean fourth power of the error: one wild score does more harm to a softmax than many small errors, so a mean
square clips too much, and the largest value seen clips too little. The first tokens, on whose keys most softmaxes
lean, weigh by the attention that they get.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from kvslim.methods.base import Method
from kvslim.transform.codes import Array, LayerCodes
from kvslim.types import Granularity, ModelSpec, Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics

LEVELS = 127  # symmetric: -127 .. 127
CLIPS = np.linspace(1.0, 0.3, 29)


def fit_steps(samples: Array, weights: Array, granularity: Granularity) -> Array:
    """The quantisation step of each coordinate.

    Args:
        samples: [heads, n, dim] values that will be cached.
        weights: [heads, n] weight of each sample.
        granularity: One step per coordinate, or one for all.

    Returns:
        [heads, dim] steps.
    """
    heads, _, dim = samples.shape
    peaks = np.abs(samples).max(axis=1)
    peaks = np.maximum(peaks if granularity == "per_channel" else np.full_like(peaks, peaks.max()), 1e-8)
    errors = np.stack([_error(samples, weights, peaks * clip / LEVELS) for clip in CLIPS])
    if granularity == "per_tensor":
        errors = np.broadcast_to(errors.sum((1, 2), keepdims=True), (len(CLIPS), heads, dim))
    steps: Array = peaks * CLIPS[errors.argmin(0)] / LEVELS
    return steps


def _error(samples: Array, weights: Array, steps: Array) -> Array:
    """[heads, dim] weighted sum of the fourth power of the rounding and clipping error."""
    scaled = samples / steps[:, None]
    error = (np.clip(np.round(scaled), -LEVELS, LEVELS) - scaled) * steps[:, None]
    powered: Array = np.einsum("hnd,hn->hd", np.square(np.square(error)), weights)
    return powered


class KvQuant(Method):
    """Static symmetric int8, per channel or per tensor."""

    name: ClassVar[str] = "kv_quant"
    order: ClassVar[int] = 20
    summary: ClassVar[str] = "8-bit integer cache with static scales chosen by error"

    bits: Literal[8] = Field(8, description="bits per cached number")
    granularity: Granularity = Field("per_channel", description="one step per channel, or one for a layer's side")

    def decide(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan) -> Plan:
        """Makes every layer's cache int8."""
        reasons = ("int8" if layer.reason == "kept" else f"{layer.reason}; int8" for layer in plan.layers)
        layers = tuple(
            layer.model_copy(update={"cache": "int8", "granularity": self.granularity, "reason": reason})
            for layer, reason in zip(plan.layers, reasons, strict=True)
        )
        return plan.model_copy(update={"layers": layers})

    def apply(
        self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan, codes: tuple[LayerCodes, ...]
    ) -> tuple[LayerCodes, ...]:
        """Adds scales fitted to each layer's coded keys and values."""
        return tuple(
            code if layer.cache == "float32" else self._scaled(statistics, layer.layer, layer.granularity, code)
            for layer, code in zip(plan.layers, codes, strict=True)
        )

    def _scaled(
        self, statistics: CalibrationStatistics, layer: int, granularity: Granularity, code: LayerCodes
    ) -> LayerCodes:
        weights = _weights(statistics, layer)
        keys = np.concatenate([statistics.key_samples[layer], statistics.sink_keys[layer]], axis=1)
        values = np.concatenate([statistics.value_samples[layer], statistics.sink_values[layer]], axis=1)
        return replace(
            code,
            cache="int8",
            key_scale=fit_steps(_coded(keys, code.key_encoder), weights, granularity),
            value_scale=fit_steps(_coded(values, code.value_encoder), weights, granularity),
            per_tensor=granularity == "per_tensor",
        )


def _coded(samples: Array, encoder: Array | None) -> Array:
    return samples if encoder is None else samples @ encoder


def _weights(statistics: CalibrationStatistics, layer: int) -> Array:
    """[heads, samples] weights that sum to 1: sinks share the attention mass they get, the others the rest."""
    body, sinks = statistics.key_samples.shape[2], statistics.sink_keys.shape[2]
    mass = statistics.sink_mass[layer][:, None]
    return np.concatenate([np.repeat((1 - mass) / body, body, 1), np.repeat(mass / sinks, sinks, 1)], axis=1)
