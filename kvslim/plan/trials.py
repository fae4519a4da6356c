"""What a model loses by a change of some of its layers, and of which layers it keeps its recall."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvslim.plan.lazy import MOST_RECALL
from kvslim.plan.ways import Change
from kvslim.types import Plan

Measure = Callable[[Plan], float]


@dataclass(frozen=True)
class PlanTrials:
    """How a model is tried with a plan.

    Attributes:
        base: The plan that changes nothing.
        divergence: From the model as it is.
        recall_drop: Share of recall that it loses.
    """

    base: Plan
    divergence: Measure
    recall_drop: Measure

    def tried(self, layer: int, change: Change) -> Change:
        """A change with what the model loses by it."""
        return change._replace(loss=self.divergence(self._changed({layer: change})))

    def keeping_recall(self, layers: Sequence[int], changes: Mapping[int, Change]) -> list[int]:
        """As many of the layers, those that lose least first, as can change together at no cost of recall."""
        drop = lambda some: self.recall_drop(self._changed({layer: changes[layer] for layer in some}))  # noqa: E731
        return keeping_recall(layers, drop)

    def _changed(self, changes: Mapping[int, Change]) -> Plan:
        layers = (
            layer.model_copy(update=changes[layer.layer].update) if layer.layer in changes else layer
            for layer in self.base.layers
        )
        return self.base.model_copy(update={"layers": tuple(layers)})


def keeping_recall(wanted: Sequence[int], recall_drop: Callable[[Sequence[int]], float]) -> list[int]:
    """As many of the layers as can change together at no cost of recall.

    Halves of the row are tried as one, and only those that fail are taken apart.

    Args:
        wanted: Layers, those that lose least first.
        recall_drop: Share of recall that the model loses by a change of some layers.
    """

    def kept(taken: list[int], more: Sequence[int]) -> list[int]:
        together = [*taken, *more]
        if not more or recall_drop(together) <= MOST_RECALL:
            return together
        if len(more) == 1:
            return taken
        middle = len(more) // 2
        return kept(kept(taken, more[:middle]), more[middle:])

    return kept([], wanted)
