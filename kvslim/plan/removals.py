"""Heads that a planner may remove: those whose measured loss could pay for the bytes or the time that they take.

A layer's whole attention is tried first. A part of its heads is expected to cost its share of that, by their
fluctuation, and only where this could pay is it tried too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvslim.methods.prune_heads import Heads, kept
from kvslim.plan.ways import Change
from kvslim.plan.windows import keeping_recall
from kvslim.types import ModelSpec

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics

Loss = Callable[[dict[int, Heads]], float]
Pays = Callable[[int, Change], bool]


class RemovalTrials(NamedTuple):
    """How a model is tried without some query heads, by layer.

    Attributes:
        divergence: From the model as it is.
        recall_drop: Share of recall that it loses.
    """

    divergence: Loss
    recall_drop: Loss


def removals(
    spec: ModelSpec,
    statistics: CalibrationStatistics,
    trials: RemovalTrials,
    pays: Pays,
    layers: Callable[[Iterable[int]], Iterable[int]],
) -> dict[int, list[Change]]:
    """What may be removed of each layer at no cost of recall, with what it loses.

    Args:
        spec: The model's shape.
        statistics: What is known of its heads.
        trials: How the model is tried.
        pays: Whether a change of a layer could be part of a plan.
        layers: Wraps the iterable of layers, to show progress.
    """
    found: dict[int, list[Change]] = {}
    gone: dict[int, Heads] = {}
    for layer in layers(range(spec.layers)):
        fluctuation = statistics.fluctuation[layer]
        every = tuple(range(spec.q_heads))
        whole = trials.divergence({layer: every})
        tried = {every: _without(every, whole, spec)}
        for part in _parts(spec, fluctuation):
            share = float(fluctuation[list(part)].sum() / max(fluctuation.sum(), 1e-30))
            if pays(layer, _without(part, share * whole, spec)):
                tried[part] = _without(part, trials.divergence({layer: part}), spec)
        paying = {part: change for part, change in tried.items() if pays(layer, change)}
        if paying:
            found[layer], gone[layer] = list(paying.values()), max(paying, key=len)
    least = sorted(found, key=lambda layer: max(change.loss for change in found[layer]))
    kept_layers = keeping_recall(least, lambda some: trials.recall_drop({layer: gone[layer] for layer in some}))
    return {layer: found[layer] for layer in kept_layers}


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


def _without(gone: Heads, loss: float, spec: ModelSpec) -> Change:
    heads = kept(gone, spec)
    return Change({"heads": heads}, loss, share=len(heads) / spec.q_heads)
