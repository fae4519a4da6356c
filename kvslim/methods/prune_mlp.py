"""`prune_mlp`: feed-forward parts with fewer channels.

A channel goes where what it adds changes least: the variance of its activation times the squared norm of its column in
the down projection (An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", 2024, section
3.2). Its mean stays as a bias, and the refit of the down projection takes up what it can of the rest. How many go of
each layer is measured: the KL without a quarter of a layer's channels, alone, is taken to grow with the square of the
share that goes, and so all layers together lose least where each share is in inverse proportion to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from kvslim.contract import ModelSpec
from kvslim.errors import UsageError
from kvslim.methods.base import Method, check_layers
from kvslim.transform.edits import Array, Channels, Codes, LayerEdit
from kvslim.types import LayerPlan, Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics
    from kvslim.prepared.trials import Trials

STEP = 32  # channels: what kernels take at once, and the smallest block of quantised weights
TRIED = 0.25  # share of a layer's channels that is tried
MOST = 0.75  # share of a layer's channels that goes, at most
WHERE = "recipe: methods.prune_mlp"


class PruneMlp(Method):
    """Channels of feed-forward parts removed, in numbers that are named or chosen by measured KL."""

    name: ClassVar[str] = "prune_mlp"
    order: ClassVar[int] = 7
    summary: ClassVar[str] = "feed-forward parts without the channels that change least"
    either: ClassVar[tuple[str, ...]] = ("ratio", "widths")

    ratio: float | None = Field(None, gt=0, le=MOST, description="share of all channels to remove")
    widths: dict[int, int] | None = Field(None, description="channels that stay, by layer: multiples of 32")
    score: Literal["kl", "alike"] = Field("kl", description="shares by KL measured in each layer, or alike in all")

    def check(self, spec: ModelSpec) -> None:
        """Refuses layers that the model does not have, widths that kernels do not like, and to remove nothing."""
        if not self.ratio and not self.widths:
            raise UsageError("it says not what to remove", where=WHERE, fix="give ratio: 0.2, or widths")
        where = f"{WHERE}.widths"
        check_layers(self.widths or (), spec, where)
        for width in (self.widths or {}).values():
            if width < STEP or width % STEP:
                fix = f"give {max(STEP, width // STEP * STEP)}"
                raise UsageError(f"{width} channels are not a multiple of {STEP}", where=where, fix=fix)

    @property
    def is_measured(self) -> bool:
        """Whether the choice needs the model itself."""
        return self.ratio is not None and self.score == "kl"

    def resolve(self, trials: Trials) -> PruneMlp:
        """The method with the widths at which all layers are expected to lose least."""
        if not self.is_measured:
            return self
        width = trials.statistics.inner_mean.shape[1]
        tried = stepped(width, TRIED)
        layers = trials.spec.layers
        losses = trials.divergences(PruneMlp(widths={layer: tried}) for layer in range(layers))
        return self._shared_out(list(trials.progress.track(losses, "layers narrowed", layers)), width)

    def decide(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan) -> Plan:
        """Gives layers their widths."""
        method = self if self.ratio is None else self._shared_out([1.0] * spec.layers, statistics.inner_mean.shape[1])
        widths = method.widths or {}
        layers = (_narrowed(layer, widths.get(layer.layer), statistics) for layer in plan.layers)
        return plan.model_copy(update={"layers": tuple(layers)})

    def apply(self, spec: ModelSpec, statistics: CalibrationStatistics, plan: Plan, edits: Codes) -> Codes:
        """Says which channels stay.

        Raises:
            UsageError: A layer is to keep more channels than it has.
        """
        return tuple(_with_channels(edit, layer, statistics) for layer, edit in zip(plan.layers, edits, strict=True))

    def _shared_out(self, losses: Sequence[float], width: int) -> PruneMlp:
        """The method with widths in place of a ratio; `losses` are those of each layer for a share that was tried."""
        shares = shared_out(np.array(losses), self.ratio or 0.0)
        widths = {layer: stepped(width, share) for layer, share in enumerate(shares)}
        return PruneMlp(widths={layer: kept for layer, kept in widths.items() if kept < width})


def shared_out(costs: Array, ratio: float) -> Array:
    """Shares [layers] of mean `ratio`, none above the most, that make the sum of costs * share ** 2 least.

    Args:
        costs: [layers], any unit.
        ratio: Their mean, at most `MOST`.
    """
    weights = 1 / np.maximum(costs, 1e-9 * max(float(costs.max()), 1e-30))
    shares = np.zeros(len(costs))
    free = np.ones(len(costs), bool)
    while free.any():
        left = ratio * len(costs) - shares[~free].sum()
        shares[free] = left * weights[free] / weights[free].sum()
        over = free & (shares > MOST)
        if not over.any():
            break
        shares[over], free = MOST, free & ~over
    return shares


def stepped(width: int, share: float) -> int:
    """The channels of `width` that stay when a share of them goes, in whole steps; all where the share is too small."""
    return width - round(share * width / STEP) * STEP


def _narrowed(layer: LayerPlan, width: int | None, statistics: CalibrationStatistics) -> LayerPlan:
    whole = statistics.inner_mean.shape[1]
    if width is None or width == whole or not layer.mlp:
        return layer
    reason = f"{width:,} of {whole:,} channels of the feed-forward part"
    return layer.model_copy(
        update={"mlp_width": width, "reason": reason if layer.reason == "kept" else f"{layer.reason}; {reason}"}
    )


def _with_channels(edit: LayerEdit, layer: LayerPlan, statistics: CalibrationStatistics) -> LayerEdit:
    if layer.mlp_width is None or not layer.mlp:
        return edit
    mean, square = statistics.inner_mean[layer.layer], statistics.inner_square[layer.layer]
    if layer.mlp_width > len(mean):
        raise UsageError(
            f"layer {layer.layer} is to keep {layer.mlp_width} channels, and has {len(mean)}",
            where="mlp_width",
            fix=f"give {len(mean)} or fewer, or none",
        )
    varying = 1 - mean**2 / np.maximum(square, np.finfo(np.float64).tiny)  # the share that is not its mean
    scores = varying * statistics.inner_added[layer.layer]
    kept = np.sort(np.argsort(-scores, kind="stable")[: layer.mlp_width])
    return replace(edit, channels=Channels(kept, mean))
