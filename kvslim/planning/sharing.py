"""Layers that a planner may let read an earlier layer's cache: the nearest pairs, where that loses little."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING

from kvslim.contract import ModelSpec
from kvslim.methods.share_kv import PROPOSED, distances, nearest
from kvslim.planning.candidates import Alteration
from kvslim.planning.trials import Pays, PlanTrials
from kvslim.types import Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics


def nearest_sources(spec: ModelSpec, statistics: CalibrationStatistics, base: Plan) -> dict[int, int]:
    """The layers nearest to an earlier one, each with that as its source, the nearest pair first."""
    return dict(islice(nearest(distances(spec, statistics, base)).items(), PROPOSED))


def sharing(layer: int, source: int, trials: PlanTrials, pays: Pays) -> Alteration | None:
    """A layer that reads a source's cache, with what that loses; None where it is not worth it."""
    alteration = trials.tried(layer, Alteration(source=source, share=0.0))
    return alteration if pays(alteration) else None


def sharing_keeping_recall(
    found: Mapping[int, Alteration | None], sources: Mapping[int, int], trials: PlanTrials
) -> tuple[int, ...]:
    """The layers that may go without a cache together at no cost of recall.

    No source reads another's cache, so that all of them can be taken together.

    Args:
        found: What each layer's sharing loses; None where it is not worth it.
        sources: The source of each layer, the nearest pair first.
        trials: How the model is tried.
    """
    worth = {layer: alteration for layer in sources if (alteration := found[layer]) is not None}
    taken: list[int] = []
    for layer in sorted(worth, key=lambda layer: worth[layer].loss):
        read = {sources[other] for other in taken}
        if layer not in read and sources[layer] not in taken:
            taken.append(layer)
    return trials.keeping_recall(taken, worth)
