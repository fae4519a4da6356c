"""Plans and codes that no recipe writes, made and changed by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.models import STEP, Codes
from benchmarks.planners import Kind
from kvslim.caches import ClusteredCache, CodedCache, FullCache, IntegerCache, SharedCache
from kvslim.caches.rotation import has_rotation
from kvslim.contract import ModelSpec, Stored
from kvslim.methods.kv_window import windowed
from kvslim.types import LayerPlan, Plan

STORED: dict[int, Stored] = {32: "float32", 8: "int8", 4: "int4"}


def plan_of(
    spec: ModelSpec,
    *,
    every: int = 1,
    rank: int | None = None,
    bits: int = 32,
    per_tensor: bool = False,
    window: int | None = None,
    sinks: int = 0,
    **layer: Any,
) -> Plan:
    """All layers alike, or each first of so many; `layer` sets heads and mlp."""
    full = FullCache(rank=rank, stored=STORED[bits], granularity="per_tensor" if per_tensor else "per_channel")
    layer["cache"] = full if window is None else windowed(full, window, sinks)
    plain = (LayerPlan(layer=index) for index in range(spec.layers))
    return Plan(layers=tuple(one if one.layer % every else one.model_copy(update=layer) for one in plain))


def sharing_plan(spec: ModelSpec, *, every: int) -> Plan:
    """Each last of so many layers reads the cache of the one before it."""
    layers = [LayerPlan(layer=index) for index in range(spec.layers)]
    for index in range(every - 1, spec.layers, every):
        layers[index] = LayerPlan(layer=index, cache=SharedCache(source=index - 1))
    return Plan(layers=tuple(layers))


def refit(plan: Plan, refit: bool) -> Plan:
    """The plan with projections of all layers fitted again, or of none."""
    return _changed(plan, lambda layer: layer.model_copy(update={"refit": refit}))


def recoded(plan: Plan, **cache: Any) -> Plan:
    """The plan with the same thing changed in the codes of all layers that have any: objective, centred, rotation."""
    return _changed(plan, lambda layer: layer.with_cache(**cache) if isinstance(layer.cache, CodedCache) else layer)


def without_residual(plan: Plan, spec: ModelSpec) -> Plan:
    """The plan with nothing stored twice: the bytes of residuals go to more rank, as far as there is more."""

    def widened(layer: LayerPlan) -> LayerPlan:
        if not isinstance(layer.cache, IntegerCache) or not any(layer.cache.residuals):
            return layer
        key, value = (_rank_within(width, spec.head_dim) for width in layer.cache.widths(spec.head_dim))
        return layer.with_cache(rank=key, value_rank=None if value == key else value, residual=0, value_residual=None)

    return _changed(plan, widened)


def has_windows(kind: Kind) -> bool:
    """Whether any of a kind's candidates keeps a window."""
    return any(candidate.layer.cache.kept is not None for candidates in kind for candidate in candidates)


def made_of(plan: Plan) -> str:
    """What a plan uses, in words."""
    windows = {layer.cache.kept[0] for layer in plan.layers if layer.cache.kept is not None}
    gone = sum(layer.heads is not None for layer in plan.layers)
    shared = sum(layer.source is not None for layer in plan.layers)
    parts = ["ranks and bits"]
    parts += [f"windows of {windows.pop()}"] if windows else []
    parts += [f"heads removed in {gone} layers"] if gone else []
    parts += [f"{shared} shared caches"] if shared else []
    return ", ".join(parts)


def attending(layer: LayerPlan, spec: ModelSpec) -> int:
    """Query heads of a layer with attention of their own."""
    return layer.cache.attending if isinstance(layer.cache, ClusteredCache) else spec.q_heads


def without_means(codes: Codes) -> Codes:
    """The codes with nothing in the place of heads that went."""
    return tuple(
        code
        if code.heads is None or code.heads.mean_output is None
        else replace(code, heads=replace(code.heads, mean_output=0.0 * code.heads.mean_output))
        for code in codes
    )


def _changed(plan: Plan, change: Callable[[LayerPlan], LayerPlan]) -> Plan:
    return plan.model_copy(update={"layers": tuple(map(change, plan.layers))})


def _rank_within(width: int, head_dim: int) -> int:
    return next(rank for rank in range(min(width, head_dim), 0, -STEP) if has_rotation(rank))
