"""`cluster_heads`: heads of a layer that attend alike share one head's attention.

Agarwal et al., "CHAI: Clustered Head Attention for Efficient LLM Inference", 2024: one representative of each cluster
has queries and keys, and all heads of it weigh their own values by its weights. Where every query head has a kv head of
its own, keys of the others are not cached; where query heads share kv heads, those of one kv head share among
themselves, which saves time alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field, model_validator

from kvslim.caches import ClusteredCache
from kvslim.caches.clustered import check_number, pools
from kvslim.caches.clustering import Formed, clusters_of, elbow
from kvslim.contract import Clusters, ModelSpec
from kvslim.errors import UsageError
from kvslim.methods.base import Method, check_layers
from kvslim.transform.edits import Codes, LayerEdit
from kvslim.types import LayerPlan, Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics
    from kvslim.prepared.trials import Trials

WHERE = "recipe: methods.cluster_heads"


class ClusterHeads(Method):
    """Clusters of query heads in given layers, in those that lose least, or in all; as many as asked for, or enough."""

    name: ClassVar[str] = "cluster_heads"
    order: ClassVar[int] = 6
    summary: ClassVar[str] = "heads that attend alike share one head's attention, and its keys"
    needs_gqa: ClassVar[str] = "clusters of heads"
    either: ClassVar[tuple[str, ...]] = ("clusters", "layers", "count")

    mode: Clusters = Field(
        "static", description="whether clusters are fixed, or formed from each prompt's first tokens"
    )
    clusters: dict[int, int] | None = Field(None, description="number of clusters by layer")
    fraction: float | None = Field(None, gt=0, lt=1, description="clusters over heads; by default the elbow decides")
    layers: tuple[int, ...] | None = Field(None, description="indices of the layers; by default all")
    count: int | None = Field(None, ge=1, description="number of layers, those that lose least by measured KL")

    @model_validator(mode="after")
    def _one_number(self) -> ClusterHeads:
        if self.clusters is not None and self.fraction is not None:
            raise ValueError("give clusters or fraction, not both")
        return self

    def check(self, spec: ModelSpec) -> None:
        """Refuses layers that the model does not have, clusters that its heads cannot form, and dynamic GQA."""
        check_layers(self.layers or (), spec, f"{WHERE}.layers")
        check_layers(self.clusters or (), spec, f"{WHERE}.clusters")
        if (self.count or 0) > spec.layers:
            raise UsageError(
                f"the model has {spec.layers} layers, the recipe asks for {self.count}",
                where=f"{WHERE}.count",
                fix=f"use at most {spec.layers}",
            )
        if pools(spec) == spec.q_heads:
            raise UsageError("the model has one head, which has none to share with", where=WHERE, fix="drop the method")
        if self.mode == "dynamic" and spec.group_size > 1:
            raise UsageError(
                f"{spec.group_size} query heads share each kv head of this model, so dynamic clusters save no cache",
                where=f"{WHERE}.mode",
                fix="use mode static",
            )
        for layer, number in (self.clusters or {}).items():
            check_number(number, spec, f"{WHERE}.clusters: layer {layer}")

    def resolve(self, trials: Trials) -> ClusterHeads:
        """The method with the `count` layers that lose least, each measured alone."""
        if not self.count:
            return self
        named = {"count": None, "fraction": None}
        numbers = self.numbers(trials.spec, trials.statistics)
        alone = (self.model_copy(update={**named, "clusters": {layer: numbers[layer]}}) for layer in numbers)
        tried = trials.progress.track(trials.divergences(alone), "layers to cluster heads in", len(numbers))
        losses = dict(zip(numbers, tried, strict=True))
        cheapest = sorted(sorted(losses, key=losses.__getitem__)[: self.count])
        return self.model_copy(update={**named, "clusters": {layer: numbers[layer] for layer in cheapest}})

    def numbers(self, spec: ModelSpec, statistics: CalibrationStatistics) -> dict[int, int]:
        """Clusters of each layer that may have fewer than heads."""
        if self.clusters is not None:
            return self.clusters
        layers = range(spec.layers) if self.layers is None else self.layers
        found = {layer: self._number(spec, statistics, layer) for layer in sorted(set(layers))}
        return {layer: number for layer, number in found.items() if number < spec.q_heads}

    def decide(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan) -> Plan:
        """Sets the clusters of each layer whose heads are all there."""
        numbers = self.numbers(spec, statistics)
        layers = (
            self._decided(layer, numbers[layer.layer], spec, statistics)
            if layer.layer in numbers and layer.heads is None
            else layer
            for layer in plan.layers
        )
        return plan.model_copy(update={"layers": tuple(layers)})

    def apply(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan, edits: Codes) -> Codes:
        """Adds what the runtime forms clusters by; fixed ones stand in the cache."""
        return tuple(_formed(edit, layer, statistics) for layer, edit in zip(plan.layers, edits, strict=True))

    def _number(self, spec: ModelSpec, statistics: CalibrationStatistics, layer: int) -> int:
        if self.fraction is None:
            return elbow(statistics.sharing_loss[layer], pools(spec))
        return pools(spec) * max(1, round(self.fraction * spec.q_heads / pools(spec)))

    def _decided(self, layer: LayerPlan, number: int, spec: ModelSpec, statistics: CalibrationStatistics) -> LayerPlan:
        if self.mode == "dynamic":
            reason = f"{number} of {spec.q_heads} heads attend, which ones each prompt decides"
            return layer.model_copy(update={"cache": ClusteredCache(count=number), "reason": reason})
        loss, heads = statistics.sharing_loss[layer.layer], np.arange(spec.q_heads)
        clusters = clusters_of(loss, number, pools(spec))
        share = float(loss[heads, list(clusters)].sum() / statistics.fluctuation[layer.layer].sum())
        reason = f"{number} of {spec.q_heads} heads attend, at an error of {share:.1%} of the layer's fluctuation"
        update = {"cache": ClusteredCache(clusters=clusters), "score": max(0.0, 1 - share), "reason": reason}
        return layer.model_copy(update=update)


def _formed(edit: LayerEdit, layer: LayerPlan, statistics: CalibrationStatistics) -> LayerEdit:
    """The edit with how clusters are formed, where the runtime does it."""
    if not isinstance(layer.cache, ClusteredCache) or layer.cache.count is None:
        return edit
    return replace(edit, formed=Formed(layer.cache.count, statistics.sharing_loss[layer.layer]))
