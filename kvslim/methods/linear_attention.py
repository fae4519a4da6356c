"""`linear_attention`: layers with a short exact window, and a trained state of constant size of all before it.

Sinks and recent tokens are kept as `kv_window` keeps them. What leaves the window is not forgotten but added to sums
over features of its key, so that linear attention reads them (see `caches.attention.linear` for formula and sources).
The features begin as clusters of the calibration text's keys: a key belongs to those that it lies near, and a query
sees a cluster as it sees its centre. Then `healing.transfer` trains them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from kvslim.caches import FullCache, LinearCache
from kvslim.contract import ModelSpec
from kvslim.errors import UsageError
from kvslim.methods.base import Conflict, Method, check_layers
from kvslim.methods.kv_window import kept_attention
from kvslim.transform.edits import Array, Codes, Features
from kvslim.types import LayerPlan, Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics
    from kvslim.recipe import Recipe

WHERE = "recipe: methods.linear_attention"
ROUNDS = 6  # of clustering
SHARPNESS = 8  # how many times narrower than a cluster the bell is by which a key belongs to it
LEAST_SPREAD = 1e-3  # of the mean square of a key's numbers; a cluster of one key has none


class LinearAttention(Method):
    """Sinks, a window and a state in given layers, in those whose attention reaches farthest, or in all."""

    name: ClassVar[str] = "linear_attention"
    order: ClassVar[int] = 16
    summary: ClassVar[str] = "a cache of constant size per layer: recent tokens, and a trained state of all before"
    needs_gqa: ClassVar[str] = "state"
    either: ClassVar[tuple[str, ...]] = ("layers", "count")

    window: int = Field(64, ge=1, description="recent tokens that a layer keeps exact")
    sinks: int = Field(4, ge=0, description="first tokens that it keeps exact beside them")
    features: int = Field(64, ge=1, description="rows of the state per kv head, each of head_dim + 1 float32 numbers")
    layers: tuple[int, ...] | None = Field(None, description="indices of the layers; by default all")
    count: int | None = Field(None, ge=1, description="number of layers, those whose attention reaches farthest")

    def check(self, spec: ModelSpec) -> None:
        """Refuses layers that the model does not have, or that have a window of their own."""
        able, named = self.able(spec), self.layers or ()
        check_layers(named, spec, f"{WHERE}.layers")
        if windowed := sorted(set(named).difference(able)):
            raise UsageError(
                f"layer {windowed[0]} has a sliding window of its own, behind which a state keeps nothing",
                where=f"{WHERE}.layers",
                fix="name layers without one",
            )
        if (self.count or 1) > len(able):
            raise UsageError(
                f"the model has {len(able)} layers without a sliding window, the recipe asks for {self.count or 'all'}",
                where=f"{WHERE}.count" if self.count else WHERE,
                fix=f"use at most {len(able)}" if able else "drop the method",
            )

    @property
    def windowed_layers(self) -> tuple[int, ...] | None:
        """The layers that are named; else any may get a state. What left its window is no token of its own."""
        return self.layers

    def conflicts(self, others: Sequence[Method], recipe: Recipe) -> Iterator[Conflict]:
        """Other methods that take tokens out of the same layers, and text from which no state can be learnt."""
        yield from super().conflicts(others, recipe)
        for other in others:
            both = (self.windowed_layers, other.windowed_layers)
            if () not in both and (None in both or set(both[0] or ()) & set(both[1] or ())):
                message = f"{self.name} and {other.name} may both take tokens out of one layer"
                yield Conflict(message, "recipe: methods", "name different layers for each")
        kept, text = self.window + self.sinks, recipe.calibration
        tokens = text.samples * text.length
        if 2 * kept > tokens or kept >= (text.context or tokens):
            yield Conflict(
                f"{tokens} tokens of calibration text, and contexts of {text.context or tokens}, "
                f"hardly leave a window of {kept}",
                WHERE,
                "use a shorter window, or raise calibration.samples or calibration.context",
            )

    def able(self, spec: ModelSpec) -> list[int]:
        """The layers that see all tokens."""
        return [layer for layer, own in enumerate(spec.windows) if own is None]

    def decide(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan) -> Plan:
        """Gives the chosen layers a state, with the attention that their exact tokens get as reason.

        Raises:
            UsageError: Another method has decided on the cache of a layer that is named.
        """
        kept = kept_attention(statistics, self.window).min(axis=1)
        free = [each.layer for each in plan.layers if each.heads != () and isinstance(each.cache, FullCache)]
        taken = [layer for layer in self.layers or () if layer not in free]
        if taken:
            raise UsageError(
                f"another method has taken the cache of layer {taken[0]}",
                where=f"{WHERE}.layers",
                fix="name other layers",
            )
        able = set(self.able(spec) if self.layers is None else self.layers).intersection(free)
        if self.count is not None:
            able = set(sorted(able, key=lambda layer: kept[layer])[: self.count])
        layers = (self._decided(each, kept[each.layer]) if each.layer in able else each for each in plan.layers)
        return plan.model_copy(update={"layers": tuple(layers)})

    def apply(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan, edits: Codes) -> Codes:
        """Adds the features that a layer's state begins with."""
        return tuple(
            replace(edit, features=clusters_of_keys(statistics.key_samples[layer.layer], layer.cache.features))
            if isinstance(layer.cache, LinearCache)
            else edit
            for layer, edit in zip(plan.layers, edits, strict=True)
        )

    def _decided(self, layer: LayerPlan, kept: float) -> LayerPlan:
        cache = LinearCache(window=self.window, sinks=self.sinks, features=self.features)
        reason = f"{self.sinks} sinks and {self.window} recent tokens, which get {kept:.1%} of attention or more, exact"
        reason += f"; all others in {self.features} features"
        return layer.model_copy(update={"cache": cache, "score": None, "reason": reason})


def clusters_of_keys(keys: Array, count: int) -> Features:
    """Features that are clusters of keys, by k-means (Lloyd, "Least squares quantization in PCM", 1982).

    Args:
        keys: [kv_heads, n, head_dim], after RoPE.
        count: Of clusters.
    """
    keys = keys.astype(np.float64)
    picked = np.random.default_rng(0).choice(keys.shape[1], count, replace=count > keys.shape[1])
    centres = keys[:, picked]
    for _ in range(ROUNDS):
        nearest = np.eye(count)[_squares(keys, centres).argmin(-1)]
        members = nearest.sum(1)[:, :, None]
        means = nearest.swapaxes(1, 2) @ keys / np.maximum(members, 1)
        centres = np.where(members > 0, means, centres)
    least = LEAST_SPREAD * np.square(keys).mean((1, 2))
    spread = np.maximum(_squares(keys, centres).min(-1).mean(-1) / SHARPNESS, least)[:, None, None]
    return Features(
        key_weight=centres / spread,
        key_bias=-np.square(centres / np.sqrt(2 * spread)).sum(-1),
        query_weight=centres,
        query_bias=np.zeros(centres.shape[:2]),
    )


def _squares(keys: Array, centres: Array) -> Array:
    """Squared distances [heads, n, count]."""
    crossed = keys @ centres.swapaxes(1, 2)
    found: Array = np.square(keys).sum(-1)[:, :, None] - 2 * crossed + np.square(centres).sum(-1)[:, None]
    return np.maximum(found, 0.0)
