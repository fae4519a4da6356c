"""`kv_quant`: the KV cache in 8- or 4-bit integers with static symmetric scales.

Steps come from calibration samples rotated to random positions of the target context, so that they hold beyond the
calibration length. The first tokens, on whose keys most softmaxes lean, weigh by the attention that they get. One
constant vector taken from all keys of a head changes no softmax; where it makes rounding cheaper, it is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from kvslim.caches import IntegerCache
from kvslim.caches.coded import bits_of
from kvslim.contract import Clip, Granularity, ModelSpec
from kvslim.methods.base import Method
from kvslim.methods.rounding import (
    first_value,
    fit_steps,
    key_metric,
    key_samples,
    peak_steps,
    rounded,
    sample_weights,
    score_error,
    value_metric,
    value_samples,
    with_feedback,
)
from kvslim.transform.edits import Array, Codes, LayerEdit
from kvslim.types import LayerPlan, Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics


class KvQuant(Method):
    """Static symmetric int8 or int4, per channel or per tensor."""

    name: ClassVar[str] = "kv_quant"
    order: ClassVar[int] = 20
    summary: ClassVar[str] = "8- or 4-bit integer cache with static scales chosen by error"
    needs_gqa: ClassVar[str] = "integer cache"
    stores_cache: ClassVar[bool] = True

    bits: Literal[8, 4] = Field(8, description="bits per cached number")
    granularity: Granularity = Field("per_channel", description="one step per channel, or one for a layer's side")
    clip: Clip = Field("error", description="error takes the clip that costs least; minmax clips nothing")
    centre: bool = Field(True, description="whether keys and values may be centred where that makes rounding cheaper")

    def keeps_weights(self, *, refits: bool) -> bool:
        """Steps fold into nothing, and eight bits are never refitted."""
        return self.bits == 8 or not refits

    def decide(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan) -> Plan:
        """Makes every layer's cache integer, and centres the keys of layers where that pays."""
        update = {"stored": f"int{self.bits}", "granularity": self.granularity, "clip": self.clip}
        return with_integers(spec, statistics, plan, update, self.centre)

    def apply(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan, edits: Codes) -> Codes:
        """Adds scales fitted to each layer's coded keys and values."""
        return tuple(
            scaled(statistics, layer.layer, layer.cache, edit)
            if isinstance(layer.cache, IntegerCache) and layer.cache.is_integer
            else edit
            for layer, edit in zip(plan.layers, edits, strict=True)
        )


def with_integers(
    spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan, update: Mapping[str, object], centre: bool
) -> Plan:
    """The plan with integer caches, keys centred in the layers where that makes rounding cheaper.

    Raises:
        UsageError: The kernel cannot take a layer's cache.
    """
    from kvslim.methods.fitting import fit

    layers = tuple(
        layer.with_cache(**update) if isinstance(layer.cache, IntegerCache) else layer for layer in plan.layers
    )
    for layer in layers:
        layer.cache.check_storage(spec, layer.layer, "recipe: methods")
    coded = fit(spec, statistics, plan.model_copy(update={"layers": layers}), before=KvQuant.order)
    pairs = zip(layers, coded, strict=True)
    chosen = tuple(_centred(statistics, layer, edit, centre) for layer, edit in pairs)
    return plan.model_copy(update={"layers": chosen})


def _centred(statistics: CalibrationStatistics, layer: LayerPlan, edit: LayerEdit, centre: bool) -> LayerPlan:
    """A layer with its keys, and its values, centred where that makes rounding cheaper."""
    cache = layer.cache
    if not isinstance(cache, IntegerCache):
        return layer
    words = [cache.stored] if layer.reason == "kept" else [layer.reason, cache.stored]
    chosen: dict[str, object] = {}
    for field, side, error in (
        ("centred", "keys", key_rounding_error),
        ("value_centred", "values", value_rounding_error),
    ):
        before, after = (error(statistics, layer.layer, cache.with_(**{field: each}), edit) for each in (False, True))
        chosen[field] = centre and after < before
        words += [f"centring takes {1 - after / before:.0%} of the {side}' error"] if chosen[field] else []
    return layer.with_cache(**chosen).model_copy(update={"reason": "; ".join(words)})


def scaled(statistics: CalibrationStatistics, layer: int, cache: IntegerCache, edit: LayerEdit) -> LayerEdit:
    """A layer's edit with the offset of its keys, the centre of its values, and the steps of both.

    One step for a side costs coded coordinates nothing: each is scaled to it, and its reader back.
    """
    edit = _with_value_steps(statistics, layer, cache, _with_key_steps(statistics, layer, cache, edit))
    return _evened(edit) if cache.granularity == "per_tensor" and edit.code.key_encoder is not None else edit


def key_rounding_error(statistics: CalibrationStatistics, layer: int, cache: IntegerCache, edit: LayerEdit) -> float:
    """What rounding a layer's keys does to its scores, but for what all keys share: mean square, summed over heads."""
    made = _with_key_steps(statistics, layer, cache, edit)
    keys, weights = _keys(statistics, layer, made), sample_weights(statistics, layer)
    steps, feedback = np.asarray(made.rounding.key_scale), edit.rounding.key_feedback
    error = rounded(keys, steps, bits_of(cache), cache.residuals[0], feedback) - keys
    error -= np.einsum("hn,hnd->hd", weights, error)[:, None]
    return score_error(error, weights, key_metric(statistics, layer, edit))


def value_rounding_error(statistics: CalibrationStatistics, layer: int, cache: IntegerCache, edit: LayerEdit) -> float:
    """What rounding a layer's values does to its output: mean square, summed over heads."""
    made = _with_value_steps(statistics, layer, cache, edit)
    values, weights = _values(statistics, layer, made), sample_weights(statistics, layer)
    steps, feedback = np.asarray(made.rounding.value_scale), edit.rounding.value_feedback
    error = rounded(values, steps, bits_of(cache), cache.residuals[1], feedback) - values
    return score_error(error, weights, value_metric(statistics, layer, edit))


def _with_key_steps(statistics: CalibrationStatistics, layer: int, cache: IntegerCache, edit: LayerEdit) -> LayerEdit:
    body = statistics.key_samples.shape[2]
    offset = _keys(statistics, layer, edit)[:, :body].mean(1) if cache.centred else None
    edit = edit.coded(key_offset=offset)
    keys, feedback = _keys(statistics, layer, edit), edit.rounding.key_feedback
    return edit.rounded(key_scale=_steps(statistics, layer, cache, edit, keys, cache.residuals[0], feedback))


def _with_value_steps(statistics: CalibrationStatistics, layer: int, cache: IntegerCache, edit: LayerEdit) -> LayerEdit:
    centre = _encoded(first_value(statistics, layer)[:, None], edit.code.value_encoder)[:, 0]
    edit = edit.coded(value_centre=centre if cache.value_centred else None)
    values, feedback = _values(statistics, layer, edit), edit.rounding.value_feedback
    return edit.rounded(value_scale=_steps(statistics, layer, cache, edit, values, cache.residuals[1], feedback))


def _evened(edit: LayerEdit) -> LayerEdit:
    """The edit with its coordinates scaled so that all of a side have one step."""
    code = edit.code
    key_scale, value_scale = np.asarray(edit.rounding.key_scale), np.asarray(edit.rounding.value_scale)
    key_step, value_step = (np.exp(np.log(scale).mean()) for scale in (key_scale, value_scale))
    to_key, to_value = key_step / key_scale, value_step / value_scale
    by_query = len(np.asarray(code.query_encoder)) // len(key_scale)
    from_key, from_value = (np.repeat(1 / to, by_query, axis=0) for to in (to_key, to_value))
    even = edit.coded(
        key_encoder=code.key_encoder * to_key[:, None],
        query_encoder=code.query_encoder * from_key[:, None],
        value_encoder=code.value_encoder * to_value[:, None],
        value_decoder=code.value_decoder * from_value[..., None],
        key_offset=None if code.key_offset is None else code.key_offset * to_key,
        value_centre=None if code.value_centre is None else code.value_centre * to_value,
    )
    return even.rounded(
        key_scale=np.full_like(key_scale, key_step),
        value_scale=np.full_like(value_scale, value_step),
        key_feedback=_rescaled(edit.rounding.key_feedback, to_key),
        value_feedback=_rescaled(edit.rounding.value_feedback, to_value),
    )


def _rescaled(feedback: Array | None, factors: Array) -> Array | None:
    """The feedback of coordinates that are scaled by factors [heads, rank]."""
    if feedback is None:
        return None
    half = feedback.shape[-1]
    return np.asarray(feedback * factors[:, :half, None] / factors[:, None, half:])


def _keys(statistics: CalibrationStatistics, layer: int, edit: LayerEdit) -> Array:
    """[heads, samples, rank] of keys as they are rounded."""
    keys = _encoded(key_samples(statistics, layer), edit.code.key_encoder)
    return keys if edit.code.key_offset is None else keys - edit.code.key_offset[:, None]


def _values(statistics: CalibrationStatistics, layer: int, edit: LayerEdit) -> Array:
    """[heads, samples, rank] of values as they are rounded."""
    values = _encoded(value_samples(statistics, layer), edit.code.value_encoder)
    return values if edit.code.value_centre is None else values - edit.code.value_centre[:, None]


def _steps(
    statistics: CalibrationStatistics,
    layer: int,
    cache: IntegerCache,
    edit: LayerEdit,
    samples: Array,
    residual: int,
    feedback: Array | None,
) -> Array:
    """[heads, rank] steps of samples; those of coded coordinates are evened later."""
    bits, weights = bits_of(cache), sample_weights(statistics, layer)
    granularity = cache.granularity if edit.code.key_encoder is None else "per_channel"
    if feedback is not None:
        half = feedback.shape[-1]
        steps = fit_steps(samples[..., half:], weights, granularity, bits)
        first = with_feedback(samples, rounded(samples[..., half:], steps, bits), feedback)
        return np.concatenate([fit_steps(first, weights, granularity, bits), steps], axis=1)
    if cache.clip == "minmax":
        return peak_steps(samples, granularity, bits)
    if not residual:
        return fit_steps(samples, weights, granularity, bits)
    # What is held twice must not be clipped: as fine as it becomes, clipping would be all its error.
    top = fit_steps(samples[..., :residual], weights, granularity, 2 * bits) * (1 << bits)
    return np.concatenate([top, fit_steps(samples[..., residual:], weights, granularity, bits)], axis=1)


def _encoded(samples: Array, encoder: Array | None) -> Array:
    return samples if encoder is None else samples @ encoder
