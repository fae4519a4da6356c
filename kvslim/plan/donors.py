"""Layers that a planner may let read an earlier layer's cache: the nearest pairs, where that loses little."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kvslim.contract import ModelSpec
from kvslim.methods.share_kv import PROPOSED, distances
from kvslim.plan.removals import Pays
from kvslim.plan.trials import PlanTrials
from kvslim.plan.ways import Change

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics


def sharing(
    spec: ModelSpec,
    statistics: CalibrationStatistics,
    trials: PlanTrials,
    pays: Pays,
    layers: Callable[[Iterable[int]], Iterable[int]],
) -> dict[int, Change]:
    """The layers that may go without a cache at no cost of recall, each with its donor and what it loses.

    No donor reads another's cache, so that all of them can be taken together.

    Args:
        spec: The model's shape.
        statistics: What is known of its cache.
        trials: How the model is tried.
        pays: Whether a change of a layer could be part of a plan.
        layers: Wraps the iterable of layers, to show progress.
    """
    near = {pair: sum(distance) for pair, distance in distances(spec, statistics, trials.base).items()}
    nearest: dict[int, int] = {}
    for layer, donor in sorted(near, key=near.__getitem__):
        nearest.setdefault(layer, donor)
    found: dict[int, Change] = {}
    for layer in layers(list(nearest)[:PROPOSED]):
        change = trials.tried(layer, Change({"donor": nearest[layer]}, 0.0, share=0.0))
        if pays(layer, change):
            found[layer] = change
    taken: list[int] = []
    for layer in sorted(found, key=lambda layer: found[layer].loss):
        donors = {nearest[other] for other in taken}
        if layer not in donors and nearest[layer] not in taken:
            taken.append(layer)
    return {layer: found[layer] for layer in trials.keeping_recall(taken, found)}
