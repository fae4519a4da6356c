"""`kv_window`: layers that keep attention sinks and recent tokens alone, in a cache of constant size.

Most attention of most layers falls on the first tokens and on recent ones (Xiao et al., "Efficient Streaming Language
Models with Attention Sinks", 2023, section 3); layers of which that holds most are lazy and lose least (Zhang et al.,
"SimLayerKV", 2024). A layer is as lazy as its busiest head: what counts is the least share of attention that any head
keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from kvslim.caches import FullCache, WindowCache
from kvslim.contract import ModelSpec
from kvslim.errors import GateError, UsageError
from kvslim.methods.base import Conflict, Method, check_layers
from kvslim.transform.edits import Codes
from kvslim.types import LayerPlan, Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics
    from kvslim.prepared.trials import Trials
    from kvslim.recipe import Recipe
    from kvslim.transform.edits import Array

MOST_RECALL = 0.01  # of the probability of recalled answers; what windows in all layers together may cost


def kept_attention(statistics: CalibrationStatistics, window: int) -> Array:
    """Mean share of attention, [L, H], that falls on the sinks and on the `window` most recent other tokens.

    Within a bucket of ages the attention is taken to be even.
    """
    ages = statistics.age_mass.shape[-1]
    starts = 2 ** np.arange(ages) - 1
    share: Array = np.clip((window - starts) / 2 ** np.arange(ages), 0, 1)
    kept: Array = statistics.sink_mass + statistics.age_mass @ share
    return kept


class KvWindow(Method):
    """Sinks and a window in given layers, in the laziest ones, or in all."""

    name: ClassVar[str] = "kv_window"
    order: ClassVar[int] = 15
    summary: ClassVar[str] = "a cache of constant size per layer: attention sinks and recent tokens"
    needs_gqa: ClassVar[str] = "ring"
    either: ClassVar[tuple[str, ...]] = ("layers", "lazy")

    window: int = Field(256, ge=1, description="recent tokens that a layer keeps")
    sinks: int = Field(4, ge=0, description="first tokens that it keeps beside them")
    layers: tuple[int, ...] | None = Field(None, description="indices of the layers; by default all")
    lazy: int | None = Field(None, ge=1, description="number of layers, those that lose least KL and no recall")

    def check(self, spec: ModelSpec) -> None:
        """Refuses layers that the model does not have."""
        check_layers(self.layers or (), spec, "recipe: methods.kv_window.layers")
        if (self.lazy or 0) > spec.layers:
            raise UsageError(
                f"the model has {spec.layers} layers, the recipe asks for {self.lazy} lazy layers",
                where="recipe: methods.kv_window.lazy",
                fix=f"use at most {spec.layers}",
            )

    @property
    def windowed_layers(self) -> tuple[int, ...] | None:
        """The layers that are named; else any may get a window."""
        return self.layers

    def conflicts(self, others: Sequence[Method], recipe: Recipe) -> Iterator[Conflict]:
        """Text too short to measure what a window forgets."""
        yield from super().conflicts(others, recipe)
        kept = self.window + self.sinks
        lengths = {
            "calibration.length": recipe.calibration.length,
            "validation.recall_distance": recipe.validation.recall_distance,
        }
        short = {key: length for key, length in lengths.items() if self.lazy and length <= kept}
        if short:
            named = " and ".join(f"{key} of {length} tokens" for key, length in short.items())
            longer = " ".join(f"--set {key}={2 * kept}" for key in short)
            yield Conflict(
                f"{named} never leaves a window of {kept}, so no layer can be judged by it",
                "recipe: methods.kv_window.lazy",
                f"name the layers, shorten the window, or {longer}",
            )

    def resolve(self, trials: Trials) -> KvWindow:
        """The method with its number of lazy layers turned into those layers: least loss, and no recall lost.

        Perplexity and KL on plain text hide what a window forgets, so a layer that retrieval needs is out however
        little else it loses.

        Raises:
            GateError: Fewer layers keep the recall.
        """
        if not self.lazy:
            return self
        losses: dict[int, float] = {}
        for layer in trials.progress.track(self.able(trials.spec), "layers tried with a window"):
            alone = self.model_copy(update={"lazy": None, "layers": (layer,)})
            if trials.recall_drop(alone) <= MOST_RECALL:
                losses[layer] = trials.divergence(alone)
        if len(losses) < self.lazy:
            raise GateError(
                f"only {len(losses)} layers keep recall with a window of {self.window} tokens",
                where="recipe: methods.kv_window.lazy",
                fix=f"ask for {len(losses)} lazy layers, or a longer window" if losses else "use a longer window",
            )
        chosen = sorted(sorted(losses, key=losses.__getitem__)[: self.lazy])
        return self.model_copy(update={"lazy": None, "layers": tuple(chosen)})

    def able(self, spec: ModelSpec) -> list[int]:
        """The layers that see further than the window."""
        return [layer for layer, own in enumerate(spec.windows) if own is None or own > self.window]

    def decide(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan) -> Plan:
        """Gives the chosen layers a window, with the attention that it keeps as reason.

        A layer whose own window is no longer keeps that.
        """
        kept = kept_attention(statistics, self.window).min(axis=1)
        able = self.able(spec)
        chosen = set(able if self.layers is None else self.layers).intersection(able)
        if self.lazy is not None:
            chosen = set(sorted(able, key=lambda layer: -kept[layer])[: self.lazy])
        layers = (
            self._decided(layer, layer.cache, kept[layer.layer])
            if layer.layer in chosen and isinstance(layer.cache, FullCache)
            else layer
            for layer in plan.layers
        )
        return plan.model_copy(update={"layers": tuple(layers)})

    def apply(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan, edits: Codes) -> Codes:
        """Nothing is fitted: the cache says it all."""
        return edits

    def _decided(self, layer: LayerPlan, cache: FullCache, kept: float) -> LayerPlan:
        reason = f"{self.sinks} sinks and {self.window} recent tokens get {kept:.1%} of attention or more"
        reason = reason if cache.rank is None else f"{layer.reason}; {reason}"
        return layer.model_copy(update={"cache": windowed(cache, self.window, self.sinks), "reason": reason})


def windowed(cache: FullCache, window: int, sinks: int) -> WindowCache:
    """A full cache's codes in a ring."""
    return WindowCache(**cache.model_dump(exclude={"kind"}), window=window, sinks=sinks)
