"""`kv_hdc`: hyperdimensional codes of keys and values: a randomised Hadamard rotation of balanced coordinates.

Multiplying the r balanced coefficients of `kv_pca` by a seeded, signed Hadamard matrix bundles them over r bipolar role
hypervectors (Kanerva, "Hyperdimensional computing", Cognitive Computation 1(2), 2009): every component of the code then
holds an equal share of what the coefficients know, so one step or one codebook serves a whole layer and side. QuaRot
(Ashkboos et al., 2024) rotates activations and QuIP# (Tseng et al., 2024) weights for the same reason. Here the
rotation comes after the balanced basis, and folds into the encoders. The query keeps full precision, and the values'
inverse rotation folds into the output projection. With 8 or 4 bits the levels are even steps, read by onnxruntime's
fused kernels. With 3, 2 or 1 bits they are fitted (Lloyd-Max), and all but the first and the most recent tokens are
packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from kvslim.caches import CodedCache, FullCache, IntegerCache, PackedCache
from kvslim.caches.rotation import has_rotation, rotation
from kvslim.contract import Granularity, ModelSpec
from kvslim.errors import UsageError
from kvslim.methods.base import Conflict, Method
from kvslim.methods.feedback import Mixing, feedback, has_feedback, mixing
from kvslim.methods.kv_pca import KvPca
from kvslim.methods.kv_quant import with_integers
from kvslim.methods.levels import fit_levels
from kvslim.methods.rounding import TINY, key_metric, sample_weights, value_metric
from kvslim.transform.edits import Array, Codes, LayerEdit
from kvslim.types import LayerPlan, Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics
    from kvslim.recipe import Recipe


class KvHdc(Method):
    """Balanced coefficients in a randomised Hadamard rotation, with one level codebook per layer and side."""

    name: ClassVar[str] = "kv_hdc"
    order: ClassVar[int] = 17
    summary: ClassVar[str] = "hyperdimensional codes: coordinates in a Hadamard rotation, so that few bits hold them"
    needs_gqa: ClassVar[str] = "integer cache"
    stores_cache: ClassVar[bool] = True

    bits: Literal[8, 4, 3, 2, 1] = Field(8, description="bits per component; 3, 2 and 1 are packed, and slow to read")
    granularity: Granularity = Field("per_tensor", description="one step for a layer's side, or one per component")
    centre: bool = Field(True, description="whether keys and values may be centred where that makes rounding cheaper")
    seed: int = Field(0, ge=0, description="of the rotation's signs")
    window: int = Field(128, ge=1, description="with 3, 2 or 1 bits: recent tokens kept exact")
    sinks: int = Field(4, ge=0, description="with 3, 2 or 1 bits: first tokens kept exact")

    @property
    def packs_cache(self) -> bool:
        """Whether codes are packed."""
        return self.bits <= 3

    def conflicts(self, others: Sequence[Method], recipe: Recipe) -> Iterator[Conflict]:
        """Another way to store the cache, and with packed codes a window that forgets."""
        yield from super().conflicts(others, recipe)
        for other in others:
            if other.stores_cache and other.name != self.name:
                message = f"{self.name} and {other.name} both choose how the cache is stored"
                yield Conflict(message, "recipe: methods", "drop one of them")
            if self.packs_cache and other.windowed_layers != ():
                message = f"packed codes keep what leaves their window, {other.name} drops it"
                fix = f"drop {other.name}, or use {self.name} with 8 or 4 bits"
                yield Conflict(message, "recipe: methods", fix)

    def decide(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan) -> Plan:
        """Rotates every layer's coefficients, all of them where no rank is chosen yet.

        Raises:
            UsageError: There is no Hadamard matrix of a layer's rank.
        """
        layers = tuple(
            self._rotated(spec, layer, layer.cache) if isinstance(layer.cache, CodedCache) else layer
            for layer in plan.layers
        )
        plan = plan.model_copy(update={"layers": layers})
        if self.bits <= 3:
            return plan.model_copy(update={"layers": tuple(map(self._packed, layers))})
        update = {"stored": f"int{self.bits}", "granularity": self.granularity, "feedback": self.bits == 4}
        return with_integers(spec, statistics, plan, update, self.centre)

    def apply(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan, edits: Codes) -> Codes:
        """Rotates each layer's codes, and fits the levels of packed ones."""
        pairs = zip(plan.layers, edits, strict=True)
        return tuple(_applied(statistics, layer, edit) for layer, edit in pairs)

    def _rotated(self, spec: ModelSpec, layer: LayerPlan, cache: CodedCache) -> LayerPlan:
        words = [] if layer.reason == "kept" else [layer.reason]
        words += ["rotated by a Hadamard matrix" + ("" if self.bits > 3 else f"; {self.bits}-bit levels")]
        rank = cache.rank or spec.head_dim
        if not has_rotation(rank):
            raise UsageError(
                f"there is no Hadamard matrix of order {rank}, the rank of layer {layer.layer}",
                where="recipe: methods.kv_hdc",
                fix="use another rank, or kv_quant",
            )
        rotated = layer.with_cache(rotation=self.seed, rank=rank)
        return rotated.model_copy(update={"reason": "; ".join(words)})

    def _packed(self, layer: LayerPlan) -> LayerPlan:
        if not isinstance(layer.cache, FullCache):
            return layer
        codes = layer.cache.model_dump(include={"rank", "value_rank", "objective", "rotation"})
        kept = {"window": self.window, "sinks": self.sinks, "granularity": self.granularity}
        cache = PackedCache.model_validate({**codes, **kept, "bits": self.bits, "centred": True})
        return layer.model_copy(update={"cache": cache})


def _applied(statistics: CalibrationStatistics, layer: LayerPlan, edit: LayerEdit) -> LayerEdit:
    """One layer's edit, rotated and with levels, as its cache asks for."""
    cache = layer.cache
    if isinstance(cache, CodedCache) and cache.rotation is not None:
        edit = _rotate(statistics, layer.layer, cache, cache.rotation, edit)
    return _with_levels(statistics, layer.layer, cache, edit) if isinstance(cache, PackedCache) else edit


def _rotate(statistics: CalibrationStatistics, layer: int, cache: CodedCache, seed: int, edit: LayerEdit) -> LayerEdit:
    """A rotated code, with what the first half of its coordinates takes up of the last half's error."""
    code = edit.code
    parts = (code.key_encoder, code.query_encoder, code.value_encoder, code.value_decoder)
    if any(part is None for part in parts):
        raise ValueError("a rotation turns the coordinates of a code")
    key, query, value, decoder = (np.asarray(part) for part in parts)
    group = len(query) // len(key)
    halves = [_in_halves(cache, side, part.shape[-1]) for side, part in enumerate((key, value))]
    bases = KvPca().bases(statistics, layer, cache.objective) if any(halves) else ()
    for_key, for_value = (
        mixing(bases[side].values[:, : part.shape[-1]], seed)
        if halves[side]
        else _turned(len(part), _turn(part.shape[-1], cache.residuals[side], seed))
        for side, part in enumerate((key, value))
    )
    edit = edit.coded(
        key_encoder=key @ for_key.encoder,
        query_encoder=query @ np.repeat(for_key.decoder, group, axis=0),
        value_encoder=value @ for_value.encoder,
        value_decoder=np.repeat(for_value.decoder, group, axis=0).swapaxes(1, 2) @ decoder,
    )
    return edit.rounded(
        key_feedback=feedback(key_metric(statistics, layer, edit)) if halves[0] else None,
        value_feedback=feedback(value_metric(statistics, layer, edit)) if halves[1] else None,
    )


def _in_halves(cache: CodedCache, side: int, rank: int) -> bool:
    """Whether one side is rounded in two halves: not where coordinates have a residual, or a half no rotation."""
    wanted = isinstance(cache, IntegerCache) and cache.feedback
    return wanted and not cache.residuals[side] and has_feedback(rank)


def _turned(heads: int, turn: Array) -> Mixing:
    """The same rotation for all heads, which needs no other decoder."""
    same = np.broadcast_to(turn, (heads, *turn.shape))
    return Mixing(same, same)


def _turn(rank: int, residual: int, seed: int) -> Array:
    """[rank, rank]: a rotation of the first `residual` coordinates beside one of the others."""
    turn = np.zeros((rank, rank))
    for start, stop in ((0, residual), (residual, rank)):
        if stop > start:
            turn[start:stop, start:stop] = rotation(stop - start, seed)
    return turn


def _with_levels(statistics: CalibrationStatistics, layer: int, cache: PackedCache, edit: LayerEdit) -> LayerEdit:
    """Offset, scale and fitted levels of packed codes; the sinks stay exact, so their samples do not count."""
    body = statistics.key_samples.shape[2]
    weights = sample_weights(statistics, layer)[:, :body]
    keys = statistics.key_samples[layer] @ np.asarray(edit.code.key_encoder)
    values = statistics.value_samples[layer] @ np.asarray(edit.code.value_encoder)
    offset = np.einsum("hn,hnd->hd", weights, keys) / weights.sum(1)[:, None]
    key_scale, key_levels = _fitted(keys - offset[:, None], weights, cache)
    value_scale, value_levels = _fitted(values, weights, cache)
    edit = edit.coded(key_offset=offset if cache.centred else None)
    return edit.rounded(key_scale=key_scale, value_scale=value_scale, key_levels=key_levels, value_levels=value_levels)


def _fitted(samples: Array, weights: Array, cache: PackedCache) -> tuple[Array, Array]:
    """Scale [heads, rank] and levels [2 ** bits] of samples [heads, n, rank]."""
    power = np.einsum("hn,hnd->hd", weights, np.square(samples)) / weights.sum(1)[:, None]
    power = np.full_like(power, power.mean()) if cache.granularity == "per_tensor" else power
    scale = np.sqrt(np.maximum(power, TINY**2))
    cost = np.broadcast_to(weights[..., None], samples.shape) * np.square(scale)[:, None]
    return scale, fit_levels((samples / scale[:, None]).ravel(), cost.ravel(), cache.bits)
