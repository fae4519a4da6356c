"""`kv_hdc`: hyperdimensional codes of keys and values.

An item memory of r bipolar role hypervectors (the rows of a seeded signed Hadamard matrix) bundles the r balanced
coefficients of `kv_pca`: y = sum of coefficient times role. Every component of the code then holds an equal share of
what the coefficients know, so one level codebook serves a whole layer and side. The query keeps full precision
(asymmetric similarity), and cleanup of the values folds into the output projection (Kanerva, "Hyperdimensional
computing", Cognitive Computation 1(2), 2009). With 8 or 4 bits the levels are even steps, read by onnxruntime's fused
kernels; with 3, 2 or 1 bits they are fitted (Lloyd-Max), and all but the first and the most recent tokens are packed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from kvslim.errors import UsageError
from kvslim.methods.base import Method
from kvslim.methods.kv_quant import with_integers
from kvslim.methods.levels import fit_levels
from kvslim.methods.roles import has_item_memory, item_memory
from kvslim.methods.rounding import TINY, sample_weights
from kvslim.transform.codes import Array, LayerCodes
from kvslim.types import CODES, CacheType, Granularity, LayerPlan, ModelSpec, Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics

STORED: dict[int, CacheType] = {8: "int8", 4: "int4", 3: "codes3", 2: "codes2", 1: "codes1"}


class KvHdc(Method):
    """Balanced coefficients bundled over bipolar roles, with one level codebook per layer and side."""

    name: ClassVar[str] = "kv_hdc"
    order: ClassVar[int] = 17
    summary: ClassVar[str] = "hyperdimensional codes: coefficients spread evenly, so that few bits hold them"

    bits: Literal[8, 4, 3, 2, 1] = Field(8, description="bits per component; 3, 2 and 1 are packed, and slow to read")
    granularity: Granularity = Field("per_tensor", description="one step for a layer's side, or one per component")
    centre: bool = Field(True, description="whether keys may be centred where that makes rounding cheaper")
    seed: int = Field(0, ge=0, description="of the item memory")
    window: int = Field(128, ge=1, description="with 3, 2 or 1 bits: recent tokens kept exact")
    sinks: int = Field(4, ge=0, description="with 3, 2 or 1 bits: first tokens kept exact")

    def decide(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan) -> Plan:
        """Bundles every layer's coefficients, all of them where no rank is chosen yet.

        Raises:
            UsageError: A layer's rank has no item memory.
        """
        layers = tuple(self._bundled(spec, layer) for layer in plan.layers)
        plan, stored = plan.model_copy(update={"layers": layers}), STORED[self.bits]
        if stored not in CODES:
            update = {"cache": stored, "granularity": self.granularity}
            return with_integers(spec, statistics, plan, update, self.centre)
        packed: dict[str, object] = {"cache": stored, "centred": True, "window": self.window, "sinks": self.sinks}
        packed |= {"granularity": self.granularity}
        return plan.model_copy(update={"layers": tuple(layer.model_copy(update=packed) for layer in plan.layers)})

    def apply(
        self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan, codes: tuple[LayerCodes, ...]
    ) -> tuple[LayerCodes, ...]:
        """Turns each layer's codes by its roles, and fits the levels of packed ones."""
        bundled = (
            code if layer.roles is None else _bundle(code, layer.roles)
            for layer, code in zip(plan.layers, codes, strict=True)
        )
        return tuple(
            _with_levels(statistics, layer, code) if layer.cache in CODES else code
            for layer, code in zip(plan.layers, bundled, strict=True)
        )

    def _bundled(self, spec: ModelSpec, layer: LayerPlan) -> LayerPlan:
        words = [] if layer.reason == "kept" else [layer.reason]
        words += ["bundled over roles" + ("" if self.bits > 3 else f"; {self.bits}-bit levels")]
        rank = layer.rank or spec.head_dim
        if not has_item_memory(rank):
            raise UsageError(
                f"no item memory of order {rank}, the rank of layer {layer.layer}",
                where="recipe: methods.kv_hdc",
                fix="use another rank, or kv_quant",
            )
        return layer.model_copy(update={"roles": self.seed, "rank": rank, "reason": "; ".join(words)})


def _bundle(code: LayerCodes, seed: int) -> LayerCodes:
    """A code over roles: those coefficients that are held twice among themselves, the others among themselves."""
    parts = (code.key_encoder, code.query_encoder, code.value_encoder, code.value_decoder)
    if any(part is None for part in parts):
        raise ValueError("roles bundle the coefficients of a code")
    key, query, value, decoder = (np.asarray(part) for part in parts)
    key_roles = _roles(key.shape[-1], code.refined, seed)
    value_roles = _roles(value.shape[-1], code.value_refined, seed)
    return replace(
        code,
        key_encoder=key @ key_roles,
        query_encoder=query @ key_roles,
        value_encoder=value @ value_roles,
        value_decoder=value_roles.T @ decoder,
    )


def _roles(rank: int, refined: int, seed: int) -> Array:
    """[rank, rank]: row c is the role hypervector of coefficient c, over its group's components."""
    roles = np.zeros((rank, rank))
    for start, stop in ((0, refined), (refined, rank)):
        if stop > start:
            roles[start:stop, start:stop] = item_memory(stop - start, seed)
    return roles


def _with_levels(statistics: CalibrationStatistics, layer: LayerPlan, code: LayerCodes) -> LayerCodes:
    """Offset, scale and fitted levels of packed codes; the sinks stay exact, so their samples do not count."""
    body = statistics.key_samples.shape[2]
    weights = sample_weights(statistics, layer.layer)[:, :body]
    keys = statistics.key_samples[layer.layer] @ np.asarray(code.key_encoder)
    values = statistics.value_samples[layer.layer] @ np.asarray(code.value_encoder)
    offset = np.einsum("hn,hnd->hd", weights, keys) / weights.sum(1)[:, None]
    key_scale, key_levels = _fitted(keys - offset[:, None], weights, layer)
    value_scale, value_levels = _fitted(values, weights, layer)
    return replace(
        code,
        cache=layer.cache,
        window=layer.window,
        sinks=layer.sinks,
        key_offset=offset if layer.centred else None,
        key_scale=key_scale,
        value_scale=value_scale,
        key_levels=key_levels,
        value_levels=value_levels,
        per_tensor=layer.granularity == "per_tensor",
    )


def _fitted(samples: Array, weights: Array, layer: LayerPlan) -> tuple[Array, Array]:
    """Scale [heads, rank] and levels [2 ** bits] of samples [heads, n, rank]."""
    power = np.einsum("hn,hnd->hd", weights, np.square(samples)) / weights.sum(1)[:, None]
    power = np.full_like(power, power.mean()) if layer.granularity == "per_tensor" else power
    scale = np.sqrt(np.maximum(power, TINY**2))
    cost = np.broadcast_to(weights[..., None], samples.shape) * np.square(scale)[:, None]
    bits = {cache: count for count, cache in STORED.items()}[layer.cache]
    return scale, fit_levels((samples / scale[:, None]).ravel(), cost.ravel(), bits)
