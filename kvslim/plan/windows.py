"""Windows that a planner may give to layers: those that it has seen lose little, and no recall.

A window is a share of the target context. The text that it is tried on is at least twice as long, and a quarter of that
context: what a layer would lose further back than anything was measured, nobody knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvslim.plan.lazy import MOST_RECALL
from kvslim.transform.codes import LayerCodes

Measure = Callable[[tuple[LayerCodes, ...]], float]
SHARES = (1 / 4, 1 / 8, 1 / 16)  # of the target context, the largest first
SINKS = 4


class WindowTrials(NamedTuple):
    """How windows are tried.

    Attributes:
        seen: Tokens of the text that they are tried on, and at most twice the distance that its questions reach back.
        divergence: Of the model with codes on that text.
        recall_drop: Share of recall that the model loses with codes.
    """

    seen: int
    divergence: Measure
    recall_drop: Measure

    def lengths(self, context: int) -> list[int]:
        """The windows to try for a target context, the longest first."""
        windows = [int(context * share) for share in SHARES if context <= 4 * self.seen]
        return [window for window in windows if window > SINKS and 2 * window <= self.seen]

    def at_context(self, loss: float, window: int, context: int) -> float:
        """A loss seen on the trial text, where it falls on the tokens beyond the window, at a target context."""
        return loss * (1 - window / context) / (1 - window / self.seen)


def alone(windows: dict[int, int], layers: int) -> tuple[LayerCodes, ...]:
    """Codes of a model with windows in some layers and nothing else."""
    return tuple(
        LayerCodes(window=windows[layer], sinks=SINKS) if layer in windows else LayerCodes() for layer in range(layers)
    )


def keeping_recall(
    wanted: Sequence[tuple[int, int]], taken: dict[int, int], layers: int, recall_drop: Measure
) -> dict[int, int]:
    """As many windows as together cost no recall.

    Halves of the row are tried as one, and only those that fail are taken apart.

    Args:
        wanted: Layer and window, those that lose least first.
        taken: Windows of layers, already accepted; a layer that is wanted again takes its new one.
        layers: Of the model.
        recall_drop: Share of recall that the model loses with codes.

    Returns:
        The windows accepted, by layer, those taken before among them.
    """
    if not wanted:
        return taken
    together = {**taken, **dict(wanted)}
    if recall_drop(alone(together, layers)) <= MOST_RECALL:
        return together
    if len(wanted) == 1:
        return taken
    middle = len(wanted) // 2
    taken = keeping_recall(wanted[:middle], taken, layers, recall_drop)
    return keeping_recall(wanted[middle:], taken, layers, recall_drop)
