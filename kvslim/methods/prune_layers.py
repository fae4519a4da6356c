"""`prune_layers`: layers without attention, and so without a cache; their feed-forward parts stay.

Attention layers are more redundant than feed-forward ones (He et al., "What Matters in Transformers? Not All Attention
is Needed", 2024, section 4). The mean output of an attention that goes stays as a bias. Layers go one by one, each the
one whose loss costs least now, since two that are spare alone may stand in for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from kvslim.errors import UsageError
from kvslim.methods.base import Method
from kvslim.types import ModelSpec, Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import HeadStatistics
    from kvslim.transform.codes import LayerCodes

Layers = tuple[int, ...]


class PruneLayers(Method):
    """Attention removed from layers that are named, or chosen by measured KL."""

    name: ClassVar[str] = "prune_layers"
    order: ClassVar[int] = 4
    summary: ClassVar[str] = "layers without attention and cache, where the model can do without"

    attention: int | None = Field(None, ge=1, description="number of layers to lose their attention, by measured KL")
    layers: tuple[int, ...] | None = Field(None, description="the layers themselves")
    protect: int = Field(1, ge=0, description="layers at each end that keep their attention in any case")

    @model_validator(mode="after")
    def _one_choice(self) -> PruneLayers:
        if self.attention is not None and self.layers is not None:
            raise ValueError("give attention or layers, not both")
        return self

    def check(self, spec: ModelSpec) -> None:
        """Refuses layers that the model does not have, more than are not protected, and to remove nothing."""
        where = "recipe: methods.prune_layers"
        if self.attention is None and not self.layers:
            raise UsageError("it says not what to remove", where=where, fix="give attention or layers")
        beyond = [layer for layer in self.layers or () if not 0 <= layer < spec.layers]
        if beyond:
            raise UsageError(
                f"the model has {spec.layers} layers, not a layer {beyond[0]}",
                where=f"{where}.layers",
                fix=f"use 0 to {spec.layers - 1}",
            )
        free = len(self._free(spec)) if self.attention else spec.layers - 1
        count = self.attention or len(set(self.layers or ()))
        if count > free:
            raise UsageError(
                f"{count} of {spec.layers} layers are too many", where=where, fix=f"use at most {free}, or protect less"
            )

    def chosen(
        self,
        spec: ModelSpec,
        divergence: Callable[[Layers], float],
        layers: Callable[[Iterable[int]], Iterable[int]],
    ) -> PruneLayers:
        """The method with the layers that lose least.

        Args:
            spec: The model's shape.
            divergence: Of the model without the attention of the layers given.
            layers: Wraps the iterable of layers that go, to show progress.
        """
        gone: Layers = ()
        for _ in layers(range(self.attention or 0)):
            left = [layer for layer in self._free(spec) if layer not in gone]
            losses = {layer: divergence((*gone, layer)) for layer in left}
            gone = (*gone, min(left, key=losses.__getitem__))
        return self.model_copy(update={"attention": None, "layers": tuple(sorted(gone))})

    def decide(self, spec: ModelSpec, statistics: HeadStatistics, plan: Plan) -> Plan:
        """Leaves the chosen layers without heads; `prune_heads` carries it out."""
        cache = "" if spec.is_encoder else ", and the cache with it"
        reason = f"attention removed{cache}; its mean output stays"
        layers = (
            layer.model_copy(update={"heads": (), "reason": reason}) if layer.layer in (self.layers or ()) else layer
            for layer in plan.layers
        )
        return plan.model_copy(update={"layers": tuple(layers)})

    def apply(
        self, spec: ModelSpec, statistics: HeadStatistics, plan: Plan, codes: tuple[LayerCodes, ...]
    ) -> tuple[LayerCodes, ...]:
        """The codes as they are."""
        return codes

    def _free(self, spec: ModelSpec) -> range:
        return range(self.protect, spec.layers - self.protect)
