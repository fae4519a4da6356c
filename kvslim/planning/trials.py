"""What a model loses by an alteration of some of its layers, and of which layers it keeps its recall."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvslim.methods.kv_window import MOST_RECALL
from kvslim.planning.candidates import Alteration, altered
from kvslim.types import Plan

PARTS = 8  # of a row of layers; to take them further apart would take minutes
Measure = Callable[[Plan], float]
Pays = Callable[[Alteration], bool]


@dataclass(frozen=True)
class PlanTrials:
    """How a model is tried with a plan.

    Attributes:
        base: The plan that changes nothing.
        divergence: From the model as it is.
        recall_drop: Probability that recalled answers may lose.
    """

    base: Plan
    divergence: Measure
    recall_drop: Measure

    def tried(self, layer: int, alteration: Alteration) -> Alteration:
        """An alteration with what the model loses by it."""
        return alteration.model_copy(update={"loss": self.divergence(self._altered({layer: alteration}))})

    def keeping_recall(self, layers: Sequence[int], alterations: Mapping[int, Alteration]) -> tuple[int, ...]:
        """As many of the layers, those that lose least first, as can be altered together at no cost of recall."""
        drop = lambda some: self.recall_drop(self._altered({layer: alterations[layer] for layer in some}))  # noqa: E731
        return tuple(keeping_recall(layers, drop))

    def _altered(self, alterations: Mapping[int, Alteration]) -> Plan:
        layers = (
            altered(layer, alterations[index]) if index in alterations else layer
            for index, layer in enumerate(self.base.layers)
        )
        return self.base.model_copy(update={"layers": tuple(layers)})


def keeping_recall(wanted: Sequence[int], recall_drop: Callable[[Sequence[int]], float]) -> list[int]:
    """As many of the layers as can be altered together at no cost of recall.

    Halves of the row are tried as one, and only those that fail are taken apart, down to an eighth of it.

    Args:
        wanted: Layers, those that lose least first.
        recall_drop: Probability that recalled answers may lose by an alteration of some layers.
    """

    def kept(taken: list[int], more: Sequence[int]) -> list[int]:
        together = [*taken, *more]
        if not more or recall_drop(together) <= MOST_RECALL:
            return together
        if len(more) <= max(1, len(wanted) // PARTS):
            return taken
        middle = len(more) // 2
        return kept(kept(taken, more[:middle]), more[middle:])

    return kept([], wanted)
