"""Narrower feed-forward parts that a planner may choose, by their measured loss, for the time that they take.

A quarter of a layer's channels is tried first. Another share of them is expected to cost in proportion, and only where
that could pay is it tried too. Recall is not asked, as it is not of the codes that narrower parts stand in for. Asked
as of removals it left 8 of the 30 layers of SmolLM2-135M, and 2.7 times the divergence at three quarters of the time.
"""

from __future__ import annotations

from kvslim.methods.prune_mlp import TRIED, stepped
from kvslim.planning.candidates import Alteration
from kvslim.planning.trials import Pays, PlanTrials

OTHERS = (1 / 8, 1 / 2)  # shares of the channels


def narrowing(layer: int, width: int, trials: PlanTrials, pays: Pays) -> tuple[Alteration, ...]:
    """The widths that could be worth it in a layer, each with what it loses.

    Args:
        layer: The layer.
        width: Channels of its feed-forward part.
        trials: How the model is tried.
        pays: Whether an alteration of the layer could be part of a plan.
    """
    first = Alteration(width=stepped(width, TRIED))
    if first.width == width:
        return ()
    first = trials.tried(layer, first)
    others = (Alteration(width=stepped(width, share), loss=first.loss * share / TRIED) for share in OTHERS)
    tried = [first, *(trials.tried(layer, other) for other in others if other.width != width and pays(other))]
    return tuple(alteration for alteration in tried if pays(alteration))
