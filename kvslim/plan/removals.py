"""What a planner may remove of a layer: what could pay, by its measured loss, for the bytes or the time that it takes.

A layer's whole attention is tried first. A part of its heads is expected to cost its share of that, by their
fluctuation, and only where this could pay is it tried too. Feed-forward parts and blocks save time alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from kvslim.contract import ModelSpec
from kvslim.methods.prune_heads import Heads, kept
from kvslim.plan.trials import PlanTrials
from kvslim.plan.ways import Change

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics

Pays = Callable[[int, Change], bool]
TRIED = 8  # layers, those whose attention changes the hidden states least; all of them where time is limited
ATTENTION, MLP = Change({"heads": ()}, 0.0, share=0.0), Change({"mlp": False}, 0.0)
BLOCK = Change({**ATTENTION.update, **MLP.update}, 0.0, share=0.0)


def removals(
    spec: ModelSpec,
    statistics: CalibrationStatistics,
    trials: PlanTrials,
    pays: Pays,
    layers: Callable[[Iterable[int]], Iterable[int]],
    *,
    timed: bool,
) -> dict[int, list[Change]]:
    """What may be removed of each layer at no cost of recall, with what it loses.

    Args:
        spec: The model's shape.
        statistics: What is known of its heads.
        trials: How the model is tried.
        pays: Whether a change of a layer could be part of a plan.
        layers: Wraps the iterable of layers, to show progress.
        timed: Whether time is limited too.
    """
    found: dict[int, list[Change]] = {}
    spare = np.argsort(statistics.influence[:, 0], kind="stable").tolist()
    for layer in layers(spare if timed else spare[:TRIED]):
        fluctuation = statistics.fluctuation[layer]
        attention = trials.tried(layer, ATTENTION)
        heads = (_without(part, attention.loss, fluctuation, spec) for part in _parts(spec, fluctuation))
        promising = [*(change for change in heads if pays(layer, change)), *([MLP, BLOCK] if timed else [])]
        changes = [attention, *(trials.tried(layer, change) for change in promising)]
        if paying := [change for change in changes if pays(layer, change)]:
            found[layer] = paying
    worst = {layer: max(changes, key=_loss) for layer, changes in found.items()}
    least = sorted(worst, key=lambda layer: worst[layer].loss)
    return {layer: found[layer] for layer in trials.keeping_recall(least, worst)}


def _loss(change: Change) -> float:
    return change.loss


def _parts(spec: ModelSpec, fluctuation: np.ndarray) -> Iterator[Heads]:
    """Heads that could go together: the least kv groups, or the least query heads of every group."""
    groups = fluctuation.reshape(spec.kv_heads, spec.group_size)
    order = np.argsort(groups.sum(1), kind="stable")
    heads = np.arange(spec.q_heads).reshape(groups.shape)
    for count in range(1, spec.kv_heads):
        yield tuple(sorted(heads[order[:count]].ravel().tolist()))
    within = np.argsort(groups, axis=1, kind="stable")
    for count in range(1, spec.group_size):
        yield tuple(sorted(np.take_along_axis(heads, within[:, :count], axis=1).ravel().tolist()))


def _without(gone: Heads, whole: float, fluctuation: np.ndarray, spec: ModelSpec) -> Change:
    """The removal of some heads, with their share of what the whole attention loses."""
    heads = kept(gone, spec)
    share = float(fluctuation[list(gone)].sum() / max(fluctuation.sum(), 1e-30))
    return Change({"heads": heads}, share * whole, share=len(heads) / spec.q_heads)
