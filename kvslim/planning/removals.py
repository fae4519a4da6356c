"""What a planner may remove of a layer: what could pay, by its measured loss, for the bytes or the time that it takes.

A layer's whole attention is tried first. A part of its heads is expected to cost its share of that, by their
fluctuation, and only where this could pay is it tried too. Feed-forward parts and blocks save time alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvslim.contract import ModelSpec
from kvslim.methods.prune_heads import Heads, kept
from kvslim.planning.candidates import Alteration
from kvslim.planning.trials import Pays, PlanTrials

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics

TRIED = 8  # layers, those whose attention changes the hidden states least; all of them where time is limited
ATTENTION, MLP = Alteration(heads=(), share=0.0), Alteration(mlp=False)
BLOCK = Alteration(heads=(), mlp=False, share=0.0)


def spare_layers(statistics: CalibrationStatistics, *, timed: bool) -> list[int]:
    """The layers to remove something of, those whose attention changes the hidden states least first."""
    spare: list[int] = np.argsort(statistics.influence[:, 0], kind="stable").tolist()
    return spare if timed else spare[:TRIED]


def removals(
    layer: int, spec: ModelSpec, statistics: CalibrationStatistics, trials: PlanTrials, pays: Pays, *, timed: bool
) -> tuple[Alteration, ...]:
    """What could be worth removing of a layer, with what it loses.

    Args:
        layer: The layer.
        spec: The model's shape.
        statistics: What is known of its heads.
        trials: How the model is tried.
        pays: Whether an alteration of the layer could be part of a plan.
        timed: Whether time is limited too.
    """
    fluctuation = statistics.fluctuation[layer]
    attention = trials.tried(layer, ATTENTION)
    heads = (_without(part, attention.loss, fluctuation, spec) for part in _parts(spec, fluctuation))
    promising = [*(part for part in heads if pays(part)), *([MLP, BLOCK] if timed else [])]
    tried = [attention, *(trials.tried(layer, alteration) for alteration in promising)]
    return tuple(alteration for alteration in tried if pays(alteration))


def removals_keeping_recall(
    found: Mapping[int, Sequence[Alteration]], order: Sequence[int], trials: PlanTrials
) -> tuple[int, ...]:
    """The layers whose worst removals can be made together at no cost of recall.

    Args:
        found: The removals of each layer; none where nothing pays.
        order: The layers, for those that lose equally much.
        trials: How the model is tried.
    """
    worst = {layer: max(found[layer], key=_loss) for layer in order if found[layer]}
    return trials.keeping_recall(sorted(worst, key=lambda layer: worst[layer].loss), worst)


def _loss(alteration: Alteration) -> float:
    return alteration.loss


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


def _without(gone: Heads, whole: float, fluctuation: np.ndarray, spec: ModelSpec) -> Alteration:
    """The removal of some heads, with their share of what the whole attention loses."""
    heads = kept(gone, spec)
    share = float(fluctuation[list(gone)].sum() / max(fluctuation.sum(), 1e-30))
    return Alteration(heads=heads, loss=share * whole, share=len(heads) / spec.q_heads)
