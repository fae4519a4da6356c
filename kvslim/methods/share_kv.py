"""`share_kv`: layers that read an earlier layer's cache, and so have none.

Sharing a cache between layers saves it whole (Brandon et al., "Reducing Transformer Key-Value Cache Size with
Cross-Layer Attention", 2024, section 2), but a trained model's layers do not hold the same. So nothing is copied: the
least-squares map from what the source caches to the layer's own keys and values folds into its queries and its output
projection (see `sharing`), at no cost per past token. Pairs are proposed by the error that remains, and chosen by
measured KL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from kvslim.caches import SharedCache
from kvslim.contract import ModelSpec
from kvslim.errors import UsageError
from kvslim.methods.base import Conflict, Method
from kvslim.methods.sharing import Maps, fit_maps
from kvslim.methods.sources import Sources, check_pair, check_sources, lack_of, query_heads
from kvslim.progress import Progress, Silent
from kvslim.transform.edits import Array, Codes, KeptHeads, LayerEdit
from kvslim.types import LayerPlan, Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics
    from kvslim.prepared.trials import Trials
    from kvslim.recipe import Recipe

REACH = 4  # how many layers back a source is looked for
THINNED = 4  # every so many samples are enough to say which pairs are near
PROPOSED = 8  # pairs whose KL is measured before each choice


class Distance(NamedTuple):
    """What the best maps of a pair leave: mean squared error over variance, of scores and of outputs, 0 to 1 each."""

    key: float
    value: float


class ShareKv(Method):
    """Layers named with their sources, or chosen among the nearest pairs by measured KL."""

    name: ClassVar[str] = "share_kv"
    order: ClassVar[int] = 30  # after all that decides what a source caches, since that is what is mapped
    summary: ClassVar[str] = "layers that read an earlier layer's cache through a fitted map, and have none"
    either: ClassVar[tuple[str, ...]] = ("layers", "sources")

    layers: int | None = Field(None, ge=1, description="number of layers to lose their cache, by measured KL")
    sources: dict[int, int] | None = Field(None, description="the layers themselves, each with the one it reads")

    def check(self, spec: ModelSpec) -> None:
        """Refuses sources that come later, read another cache themselves or do not exist, and to share nothing."""
        where = "recipe: methods.share_kv"
        if self.layers is None and not self.sources:
            raise UsageError("it says not what to share", where=where, fix="give layers or sources")
        for layer, source in (self.sources or {}).items():
            check_pair(spec, layer, source, self.sources or {}, f"{where}.sources")
        if (self.layers or 0) > spec.layers // 2:
            raise UsageError(
                f"{self.layers} of {spec.layers} layers are too many",
                where=f"{where}.layers",
                fix=f"use at most {spec.layers // 2}" if spec.layers > 1 else "drop it",
            )

    def conflicts(self, others: Sequence[Method], recipe: Recipe) -> Iterator[Conflict]:
        """A source keeps every token, and no other method may take a layer away that is counted on."""
        where, named = "recipe: methods", {*(self.sources or {}), *(self.sources or {}).values()}
        for other in others:
            if other.packs_cache:
                fix = f"drop share_kv, or use {other.name} with 8 or 4 bits"
                yield Conflict("no layer can read the packed codes of another", where, fix)
            windowed = other.windowed_layers
            if windowed != () and None in (windowed, self.sources):
                fix = f"name layers in both: {other.name}.layers and share_kv.sources"
                yield Conflict(f"share_kv and {other.name} may choose the same layers", where, fix)
            if both := named.intersection(windowed or ()):
                message = f"layer {min(both)} cannot have a window and share a cache of all tokens"
                yield Conflict(message, where, f"drop it from {other.name}.layers or from share_kv.sources")
            if self.sources is None and (other.picks_heads or other.takes_attention):
                message = f"share_kv cannot count on layers that {other.name} may take"
                yield Conflict(message, where, "name the layers: share_kv: {sources: {5: 4}}")

    def resolve(self, trials: Trials) -> ShareKv:
        """The method with the pairs that lose least, measured one after the other."""
        if not self.layers:
            return self
        near = distances(trials.spec, trials.statistics, trials.identity)
        return self.named_by(
            {pair: distance.key + distance.value for pair, distance in near.items()},
            lambda sources: trials.divergence(ShareKv(sources=sources)),
            trials.progress,
        )

    def named_by(
        self,
        distances: dict[tuple[int, int], float],
        divergence: Callable[[Sources], float],
        progress: Progress | None = None,
    ) -> ShareKv:
        """The method with the pairs that lose least, one after the other.

        Args:
            distances: Of the pairs that are possible, by layer and source.
            divergence: Of the model with these layers reading these sources.
            progress: Receives the progress.

        Raises:
            UsageError: There are not so many pairs.
        """
        sources: Sources = {}
        for _ in (progress or Silent()).track(range(self.layers or 0), "layers to lose their cache"):
            proposed = sorted(_possible(distances, sources), key=distances.__getitem__)[:PROPOSED]
            if not proposed:
                raise UsageError(
                    f"only {len(sources)} layers find a source",
                    where="recipe: methods.share_kv.layers",
                    fix="ask for fewer",
                )
            losses = {pair: divergence({**sources, pair[0]: pair[1]}) for pair in proposed}
            layer, source = min(proposed, key=losses.__getitem__)
            sources[layer] = source
        return self.model_copy(update={"layers": None, "sources": dict(sorted(sources.items()))})

    def decide(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan) -> Plan:
        """Takes the cache from the layers that read another's, with the share of energy that the maps keep as score.

        Raises:
            UsageError: A source has no cache that holds every token, or heads do not fit.
        """
        method = self
        if self.sources is None:
            near = {pair: distance.key + distance.value for pair, distance in distances(spec, statistics, plan).items()}
            method = self.named_by(near, lambda sources: sum(near[pair] for pair in sources.items()))
        layers = [_without_cache(layer, (method.sources or {}).get(layer.layer)) for layer in plan.layers]
        check_sources(
            plan.model_copy(update={"layers": tuple(layers)}),
            spec,
            lambda layer: f"recipe: methods.share_kv: layer {layer}",
        )
        layers = [
            layer
            if layer.source is None
            else _with_reason(layer, distance(spec, statistics, layer, layers[layer.source]))
            for layer in layers
        ]
        return plan.model_copy(update={"layers": tuple(layers)})

    def apply(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan, edits: Codes) -> Codes:
        """Replaces the codes of layers that have a source by maps from what that caches."""
        return tuple(
            edit
            if layer.source is None
            else _reading(spec, statistics, (layer, plan.layers[layer.source]), (edit, edits[layer.source]))
            for layer, edit in zip(plan.layers, edits, strict=True)
        )


def distances(spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan) -> dict[tuple[int, int], Distance]:
    """How far each layer is from the earlier ones near it whose cache it could read, by some of the samples."""
    some = statistics.thinned(THINNED)
    return {
        (layer.layer, source.layer): distance(spec, some, layer, source)
        for layer in plan.layers
        for source in plan.layers[max(0, layer.layer - REACH) : layer.layer]
        if lack_of(spec, plan, layer, source) is None
    }


def nearest(near: Mapping[tuple[int, int], Distance]) -> dict[int, int]:
    """The nearest source of each layer that has one, the nearest pair first; of distances by layer and source."""
    found: dict[int, int] = {}
    for layer, source in sorted(near, key=lambda pair: sum(near[pair])):
        found.setdefault(layer, source)
    return found


def distance(spec: ModelSpec, statistics: CalibrationStatistics, layer: LayerPlan, source: LayerPlan) -> Distance:
    """What the best maps between two layers leave, with heads paired as they are best; the source not coded."""
    maps = fit_maps(statistics, layer.layer, source.layer, source.kv_heads(spec))
    heads, read = _paired(spec, layer, maps)
    own = heads // spec.group_size
    return Distance(float(maps.key_error[own, read].mean()), float(maps.value_error[own, read].mean()))


def _without_cache(layer: LayerPlan, source: int | None) -> LayerPlan:
    """The layer as it is, or with what is kept of its parts and the cache of a source alone."""
    if source is None:
        return layer
    return layer.model_copy(update={"cache": SharedCache(source=source)})


def _with_reason(layer: LayerPlan, left: Distance) -> LayerPlan:
    reason = f"reads the cache of layer {layer.source}; the map misses {left.key:.0%} of the scores' variance"
    reason += f" and {left.value:.0%} of the outputs'"
    return layer.model_copy(update={"score": 1 - max(left), "reason": reason})


def _possible(distances: dict[tuple[int, int], float], sources: Sources) -> Iterator[tuple[int, int]]:
    """The pairs that make no chain with those that are chosen."""
    for layer, source in distances:
        if layer not in sources and layer not in sources.values() and source not in sources:
            yield layer, source


def _paired(spec: ModelSpec, layer: LayerPlan, maps: Maps) -> tuple[Array, Array]:
    """Query heads in the order of the source head that each reads, and the number of that head among the source's.

    As many read each source head, as the operator needs it. From the best of the cyclic pairings on, two query heads
    change places while that lowers the error; with few heads that ends at the best of all, or near it.
    """
    heads = query_heads(spec, layer)
    read = np.repeat(np.arange(maps.key_error.shape[1]), len(heads) // maps.key_error.shape[1])
    costs = (maps.key_error + maps.value_error)[heads // spec.group_size]
    places = min(
        (np.roll(read, shift) for shift in range(0, len(read), len(read) // maps.key_error.shape[1])),
        key=lambda places: float(costs[np.arange(len(heads)), places].sum()),
    )
    while True:
        now = costs[np.arange(len(heads)), places]
        gain = now[:, None] + now[None, :] - costs[:, places] - costs[:, places].T
        first, second = np.unravel_index(gain.argmax(), gain.shape)
        if gain[first, second] <= 1e-12:
            order = np.argsort(places, kind="stable")
            return heads[order], places[order]
        places[[first, second]] = places[[second, first]]


def _reading(
    spec: ModelSpec,
    statistics: CalibrationStatistics,
    plans: tuple[LayerPlan, LayerPlan],
    edits: tuple[LayerEdit, LayerEdit],
) -> LayerEdit:
    """The edit of a layer with maps from what its source caches; plans and edits so far are those of both."""
    (layer, source), (edit, given) = plans, edits
    encoders = given.code.key_encoder, given.code.value_encoder
    maps = fit_maps(statistics, layer.layer, source.layer, source.kv_heads(spec), encoders)
    heads, read = _paired(spec, layer, maps)
    own = heads // spec.group_size

    def by_head(of_pair: Array) -> Array:
        whole = np.zeros((spec.q_heads, *of_pair.shape[2:]))
        whole[heads] = of_pair[own, read]
        return whole

    offset = maps.offset
    if given.code.value_centre is not None:
        offset = offset + np.einsum("ir,jird->jid", given.code.value_centre[list(source.kv_heads(spec))], maps.value)
    code = replace(
        edit.code,
        query_encoder=by_head(maps.key).swapaxes(1, 2),
        value_decoder=by_head(maps.value),
        value_offset=by_head(offset),
    )
    kept = KeptHeads(tuple(heads.tolist()), source.kv_heads(spec), statistics.output_mean[layer.layer])
    return replace(edit, heads=kept, code=code, rounding=given.rounding, source_cache=given.cache)
