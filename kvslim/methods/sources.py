"""Which layers can read the cache of which earlier one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvslim.caches import ClusteredCache
from kvslim.contract import ModelSpec
from kvslim.errors import UsageError
from kvslim.methods.base import check_layers
from kvslim.transform.edits import Array
from kvslim.types import LayerPlan, Plan

Sources = dict[int, int]  # of layers, and the layer that each of them reads


def check_pair(spec: ModelSpec, layer: int, source: int, sources: Sources, where: str) -> None:
    """Refuses a source that comes later, does not exist or reads another cache itself.

    Raises:
        UsageError: Naming `where` it stands.
    """
    check_layers((layer, source), spec, where)
    if source >= layer:
        raise UsageError(
            f"layer {layer} cannot read the cache of layer {source}, which comes no earlier",
            where=where,
            fix="name an earlier layer",
        )
    if source in sources:
        raise UsageError(
            f"layer {source}, which layer {layer} is to read, reads that of layer {sources[source]} itself",
            where=where,
            fix=f"let layer {layer} read layer {sources[source]}, or another",
        )


def check_sources(plan: Plan, spec: ModelSpec, where: Callable[[int], str]) -> None:
    """Refuses layers that read a cache which does not exist, lacks tokens or does not fit their heads.

    Raises:
        UsageError: Naming where the layer stands.
    """
    sources = {layer.layer: layer.source for layer in plan.layers if layer.source is not None}
    for layer, source in sources.items():
        check_pair(spec, layer, source, sources, where(layer))
        lack = lack_of(spec, plan, plan.layers[layer], plan.layers[source])
        if lack is not None:
            raise UsageError(
                f"layer {layer} cannot read layer {source}: {lack}", where=where(layer), fix="name another source"
            )


def lack_of(spec: ModelSpec, plan: Plan, layer: LayerPlan, source: LayerPlan) -> str | None:
    """What speaks against a layer reading the cache of an earlier one; None if nothing."""
    if layer.heads == () or source.heads == ():
        return f"layer {layer.layer if layer.heads == () else source.layer} has no attention"
    clustered = next((each.layer for each in (layer, source) if isinstance(each.cache, ClusteredCache)), None)
    if clustered is not None:
        return f"layer {clustered} has clusters of heads"
    windowed = plan.layout == "gqa" and plan.window_cache and spec.windows[source.layer] is not None
    if windowed or source.cache.kept is not None:
        return "it keeps a window of tokens alone"
    queries, kv_heads = len(query_heads(spec, layer)), len(source.kv_heads(spec))
    if queries % kv_heads:
        return f"{queries} query heads cannot read {kv_heads} kv heads alike"
    return None


def query_heads(spec: ModelSpec, layer: LayerPlan) -> Array:
    """The query heads that a layer keeps."""
    return np.array(range(spec.q_heads) if layer.heads is None else layer.heads)
