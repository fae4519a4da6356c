"""`kv_quant`: the KV cache in 8- or 4-bit integers with static symmetric scales.

Steps come from calibration samples rotated to random positions of the target context, so that they hold beyond the
calibration length. The first tokens, on whose keys most softmaxes lean, weigh by the attention that they get. One
constant vector taken from all keys of a head changes no softmax; where it makes rounding cheaper, it is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from kvslim.methods.base import Method
from kvslim.methods.kv_pca import check_width
from kvslim.methods.rounding import (
    fit_steps,
    key_samples,
    peak_steps,
    rounded,
    sample_weights,
    score_error,
    value_samples,
)
from kvslim.transform.codes import Array, LayerCodes
from kvslim.types import BITS, Clip, Granularity, LayerPlan, ModelSpec, Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics

INTEGERS = ("int8", "int4")


class KvQuant(Method):
    """Static symmetric int8 or int4, per channel or per tensor."""

    name: ClassVar[str] = "kv_quant"
    order: ClassVar[int] = 20
    summary: ClassVar[str] = "8- or 4-bit integer cache with static scales chosen by error"

    bits: Literal[8, 4] = Field(8, description="bits per cached number")
    granularity: Granularity = Field("per_channel", description="one step per channel, or one for a layer's side")
    clip: Clip = Field("error", description="error takes the clip that costs least; minmax clips nothing")
    centre: bool = Field(True, description="whether keys may be centred where that makes rounding cheaper")

    def decide(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan) -> Plan:
        """Makes every layer's cache integer, and centres the keys of layers where that pays."""
        update = {"cache": f"int{self.bits}", "granularity": self.granularity, "clip": self.clip}
        return with_integers(spec, statistics, plan, update, self.centre)

    def apply(
        self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan, codes: tuple[LayerCodes, ...]
    ) -> tuple[LayerCodes, ...]:
        """Adds scales fitted to each layer's coded keys and values."""
        return tuple(
            scaled(statistics, layer, code) if layer.cache in INTEGERS else code
            for layer, code in zip(plan.layers, codes, strict=True)
        )


def with_integers(
    spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan, update: Mapping[str, object], centre: bool
) -> Plan:
    """The plan with integer caches, keys centred in the layers where that makes rounding cheaper.

    Raises:
        UsageError: The kernel cannot take a layer's cache.
    """
    from kvslim.methods.fitting import fit

    layers = tuple(layer.model_copy(update=update) for layer in plan.layers)
    for layer in layers:
        check_width(layer, spec, "recipe: methods")
    coded = fit(spec, statistics, plan.model_copy(update={"layers": layers}), before=KvQuant.order)
    chosen = []
    for layer, code in zip(layers, coded, strict=True):
        errors = {
            way: key_rounding_error(statistics, layer.model_copy(update={"centred": way}), code)
            for way in (False, True)
        }
        centred = centre and errors[True] < errors[False]
        words = [] if layer.reason == "kept" else [layer.reason]
        words += [layer.cache + (f", centring takes {1 - errors[True] / errors[False]:.0%} of the error" * centred)]
        chosen.append(layer.model_copy(update={"centred": centred, "reason": "; ".join(words)}))
    return plan.model_copy(update={"layers": tuple(chosen)})


def scaled(statistics: CalibrationStatistics, layer: LayerPlan, code: LayerCodes) -> LayerCodes:
    """A layer's codes with the offset of its keys and the steps of both sides.

    One step for a side costs coded coordinates nothing: each is scaled to it, and its reader back.
    """
    code = replace(
        _with_key_steps(statistics, layer, code),
        cache=layer.cache,
        value_scale=_steps(statistics, layer, code, _values(statistics, layer, code), code.value_refined),
        per_tensor=layer.granularity == "per_tensor",
    )
    return _evened(code) if code.per_tensor and code.key_encoder is not None else code


def key_rounding_error(statistics: CalibrationStatistics, layer: LayerPlan, code: LayerCodes) -> float:
    """What rounding a layer's keys does to its scores, but for what all keys share: mean square, summed over heads."""
    made = _with_key_steps(statistics, layer, code)
    keys, weights = _keys(statistics, layer, made), sample_weights(statistics, layer.layer)
    error = rounded(keys, np.asarray(made.key_scale), BITS[layer.cache], code.refined) - keys
    error -= np.einsum("hn,hnd->hd", weights, error)[:, None]
    metric = statistics.query_moment[layer.layer]
    if code.query_encoder is not None:
        decoder = code.query_encoder[:: len(code.query_encoder) // len(keys)]
        metric = decoder.swapaxes(1, 2) @ metric @ decoder
    return score_error(error, weights, metric)


def value_rounding_error(statistics: CalibrationStatistics, layer: LayerPlan, code: LayerCodes) -> float:
    """What rounding a layer's values does to its output: mean square, summed over heads."""
    values, weights = _values(statistics, layer, code), sample_weights(statistics, layer.layer)
    steps = _steps(statistics, layer, code, values, code.value_refined)
    error = rounded(values, steps, BITS[layer.cache], code.value_refined) - values
    metric = statistics.output_gram[layer.layer]
    if code.value_decoder is not None:
        decoder = code.value_decoder[:: len(code.value_decoder) // len(values)]
        metric = decoder @ metric @ decoder.swapaxes(1, 2)
    return score_error(error, weights, metric)


def _with_key_steps(statistics: CalibrationStatistics, layer: LayerPlan, code: LayerCodes) -> LayerCodes:
    offset = _middle(_keys(statistics, layer, code)) if layer.centred else None
    code = replace(code, key_offset=offset)
    return replace(code, key_scale=_steps(statistics, layer, code, _keys(statistics, layer, code), code.refined))


def _evened(code: LayerCodes) -> LayerCodes:
    """The code with its coordinates scaled so that all of a side have one step."""
    key_scale, value_scale = np.asarray(code.key_scale), np.asarray(code.value_scale)
    key_step, value_step = (np.exp(np.log(scale).mean()) for scale in (key_scale, value_scale))
    to_key, to_value = key_step / key_scale, value_step / value_scale
    by_query = len(np.asarray(code.query_encoder)) // len(key_scale)
    from_key, from_value = (np.repeat(1 / to, by_query, axis=0) for to in (to_key, to_value))
    return replace(
        code,
        key_encoder=code.key_encoder * to_key[:, None],
        query_encoder=code.query_encoder * from_key[:, None],
        value_encoder=code.value_encoder * to_value[:, None],
        value_decoder=code.value_decoder * from_value[..., None],
        key_offset=None if code.key_offset is None else code.key_offset * to_key,
        key_scale=np.full_like(key_scale, key_step),
        value_scale=np.full_like(value_scale, value_step),
        per_tensor=True,
    )


def _keys(statistics: CalibrationStatistics, layer: LayerPlan, code: LayerCodes) -> Array:
    """[heads, samples, rank] of keys as they are rounded."""
    keys = _coded(key_samples(statistics, layer.layer), code.key_encoder)
    return keys if code.key_offset is None else keys - code.key_offset[:, None]


def _values(statistics: CalibrationStatistics, layer: LayerPlan, code: LayerCodes) -> Array:
    """[heads, samples, rank] of values as they are rounded."""
    return _coded(value_samples(statistics, layer.layer), code.value_encoder)


def _steps(
    statistics: CalibrationStatistics, layer: LayerPlan, code: LayerCodes, samples: Array, refined: int
) -> Array:
    """[heads, rank] steps of samples; those of coded coordinates are evened later."""
    bits, weights = BITS[layer.cache], sample_weights(statistics, layer.layer)
    granularity = layer.granularity if code.key_encoder is None else "per_channel"
    if layer.clip == "minmax":
        return peak_steps(samples, granularity, bits)
    if not refined:
        return fit_steps(samples, weights, granularity, bits)
    # What is held twice must not be clipped: as fine as it becomes, clipping would be all its error.
    top = fit_steps(samples[..., :refined], weights, granularity, 2 * bits) * (1 << bits)
    return np.concatenate([top, fit_steps(samples[..., refined:], weights, granularity, bits)], axis=1)


def _middle(samples: Array) -> Array:
    """[heads, dim] middle between the least and the largest sample."""
    return np.asarray((samples.max(axis=1) + samples.min(axis=1)) / 2)


def _coded(samples: Array, encoder: Array | None) -> Array:
    return samples if encoder is None else samples @ encoder
