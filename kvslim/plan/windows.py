"""Windows that a planner may give to layers: those that it has seen lose little, and no recall.

A window is a share of the target context. The text that it is tried on is at least twice as long, and a quarter of that
context: what a layer would lose further back than anything was measured, nobody knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvslim.caches import WindowCache
from kvslim.transform.edits import LayerEdit

Measure = Callable[[tuple[LayerEdit, ...]], float]
SHARES = (1 / 4, 1 / 8, 1 / 16)  # of the target context, the largest first
SINKS = 4
LEAST = 16  # tokens; onnxruntime-genai takes no shorter ring beside full caches


class Window(NamedTuple):
    """A length, and the divergence that it is expected to make in each layer that may have it."""

    length: int
    losses: dict[int, float]


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
        return [window for window in windows if window >= LEAST and 2 * window <= self.seen]

    def loss(self, layer: int, window: int, layers: int, context: int) -> float:
        """What a window in one of the layers loses at a target context, for the tokens that lie beyond the window."""
        seen = self.divergence(windowed([layer], window, layers))
        return seen * (1 - window / context) / (1 - window / self.seen)


def windowed(chosen: Sequence[int], window: int, layers: int) -> tuple[LayerEdit, ...]:
    """Codes of a model with a window in some layers and nothing else."""
    return tuple(
        LayerEdit(cache=WindowCache(window=window, sinks=SINKS)) if layer in chosen else LayerEdit()
        for layer in range(layers)
    )
