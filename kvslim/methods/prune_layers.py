"""`prune_layers`: layers without attention, and so without a cache, without feed-forward part, or without both.

Attention layers are more redundant than feed-forward ones (He et al., "What Matters in Transformers? Not All Attention
is Needed", 2024, section 4). The mean output of a part that goes stays as a bias. Parts go one by one, each the one
whose loss costs least now, since two that are spare alone may stand in for each other. The baseline is block influence,
1 - mean cosine of the hidden states before and after (Men et al., "ShortGPT: Layers in Large Language Models are More
Redundant Than You Expect", 2024, section 3.1), measured once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from kvslim.contract import ModelSpec, Part
from kvslim.errors import UsageError
from kvslim.methods.base import Method, check_layers
from kvslim.progress import Progress, Silent
from kvslim.transform.edits import Codes, KeptHeads, LayerEdit
from kvslim.types import LayerPlan, Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import HeadStatistics
    from kvslim.prepared.trials import Trials

Parts = Mapping[int, Part]
INFLUENCES: tuple[Part, ...] = ("attention", "mlp", "block")  # the order in the statistics
GONE: dict[Part, str] = {
    "attention": "attention removed, and the cache with it; its mean output stays",
    "mlp": "feed-forward part removed; its mean output stays",
    "block": "block removed, and the cache with it; its mean output stays",
}


class PruneLayers(Method):
    """Attention, feed-forward parts or blocks removed: named, or chosen by measured KL or by block influence."""

    name: ClassVar[str] = "prune_layers"
    order: ClassVar[int] = 4
    summary: ClassVar[str] = "layers without attention (and cache), feed-forward part or both, where they are spare"
    supports_encoders: ClassVar[bool] = True

    attention: int | None = Field(None, ge=1, description="number of layers to lose their attention")
    mlps: int | None = Field(None, ge=1, description="number of layers to lose their feed-forward part")
    blocks: int | None = Field(None, ge=1, description="number of layers to go whole")
    layers: dict[int, Part] | None = Field(None, description="the layers themselves, and what each loses")
    score: Literal["kl", "block_influence"] = Field("kl", description="KL measured before each goes, or a statistic")
    protect: int = Field(1, ge=0, description="layers at each end that keep everything in any case")

    @model_validator(mode="after")
    def _one_choice(self) -> PruneLayers:
        if self.layers is not None and any(self.counts.values()):
            raise ValueError("give numbers of layers or the layers themselves, not both")
        return self

    @property
    def counts(self) -> dict[Part, int]:
        """How many of each are to be chosen."""
        return {"attention": self.attention or 0, "mlp": self.mlps or 0, "block": self.blocks or 0}

    @property
    def is_measured(self) -> bool:
        """Whether the choice needs the model itself."""
        return self.score == "kl" and any(self.counts.values())

    @property
    def takes_attention(self) -> bool:
        """Whether any layer may lose its attention."""
        return bool(self.attention or self.blocks or set((self.layers or {}).values()) - {"mlp"})

    def check(self, spec: ModelSpec) -> None:
        """Refuses layers that the model does not have, more than are not protected, and to remove nothing."""
        where = "recipe: methods.prune_layers"
        if not self.layers and not any(self.counts.values()):
            raise UsageError("it says not what to remove", where=where, fix="give attention, mlps, blocks or layers")
        if spec.is_encoder and (self.mlps or self.blocks or set((self.layers or {}).values()) - {"attention"}):
            raise UsageError(
                "a layer of an encoder can lose its attention alone",
                where=where,
                fix="give attention, or layers: {2: attention}",
            )
        check_layers(self.layers or (), spec, f"{where}.layers")
        free, asked = len(self._free(spec)), sum(self.counts.values())
        if asked > free:
            fix = f"use at most {free}, or protect less"
            raise UsageError(f"{asked} of {spec.layers} layers are too many", where=where, fix=fix)
        named = sum(part != "mlp" for part in (self.layers or {}).values())
        if named + (self.attention or 0) + (self.blocks or 0) >= spec.layers:
            raise UsageError("no layer keeps its attention", where=where, fix=f"take that of {spec.layers - 1} at most")

    def resolve(self, trials: Trials) -> PruneLayers:
        """The method with the layers that lose least, measured before each goes."""
        if not self.is_measured:
            return self
        return self.named_by(
            trials.spec, lambda gone: trials.divergence(PruneLayers(layers=dict(gone))), trials.progress
        )

    def named_by(
        self, spec: ModelSpec, loss: Callable[[Parts], float], progress: Progress | None = None
    ) -> PruneLayers:
        """The method with the layers that lose least.

        Args:
            spec: The model's shape.
            loss: Of the model without these parts of these layers.
            progress: Receives the progress.
        """
        gone: dict[int, Part] = {}
        left = self.counts
        for _ in (progress or Silent()).track(range(sum(left.values())), "parts of layers to go"):
            free = [(layer, part) for layer in self._free(spec) if layer not in gone for part in left if left[part]]
            losses = {step: loss({**gone, step[0]: step[1]}) for step in free}
            layer, part = min(losses, key=losses.__getitem__)
            gone[layer], left[part] = part, left[part] - 1
        update = {"attention": None, "mlps": None, "blocks": None, "layers": dict(sorted(gone.items()))}
        return self.model_copy(update=update)

    def decide(self, spec: ModelSpec, statistics: HeadStatistics, plan: Plan) -> Plan:
        """Leaves the chosen layers without heads, without feed-forward part, or without both."""
        method = self
        if any(self.counts.values()):
            influence = statistics.influence
            method = self.named_by(spec, lambda gone: sum(influence[at, INFLUENCES.index(gone[at])] for at in gone))
        named = method.layers or {}
        layers = (_without(layer, named[layer.layer], spec) if layer.layer in named else layer for layer in plan.layers)
        return plan.model_copy(update={"layers": tuple(layers)})

    def apply(self, spec: ModelSpec, statistics: HeadStatistics, plan: Plan, edits: Codes) -> Codes:
        """Adds the mean outputs that stand for what is gone."""
        return tuple(_with_means(edit, layer, statistics) for layer, edit in zip(plan.layers, edits, strict=True))

    def _free(self, spec: ModelSpec) -> range:
        return range(self.protect, spec.layers - self.protect)


def _without(layer: LayerPlan, part: Part, spec: ModelSpec) -> LayerPlan:
    reason = GONE[part].replace(", and the cache with it", "") if spec.is_encoder else GONE[part]
    update: dict[str, object] = {"reason": reason}
    if part != "mlp":
        update["heads"] = ()
    if part != "attention":
        update["mlp"] = False
    return layer.model_copy(update=update)


def _with_means(edit: LayerEdit, layer: LayerPlan, statistics: HeadStatistics) -> LayerEdit:
    if layer.heads == ():
        edit = replace(edit, heads=KeptHeads(()), attention_mean=statistics.attention_mean[layer.layer])
    if not layer.mlp:
        edit = replace(edit, mlp_mean=statistics.mlp_mean[layer.layer])
    return edit
