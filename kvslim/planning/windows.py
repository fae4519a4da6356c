"""Windows that a planner may give to layers: those that it has seen lose little, and no recall.

A window is a share of the target context. The text that its divergence is measured on is at least twice as long, and a
quarter of that context; recall is asked over all of it, as what a layer remembers of far back shows nowhere else.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

from pydantic import Field

from kvslim.caches import WindowCache
from kvslim.contract import Frozen, ModelSpec
from kvslim.methods.kv_window import MOST_RECALL, KvWindow
from kvslim.planning.candidates import SINKS, Alteration
from kvslim.planning.trials import Pays
from kvslim.transform.edits import Codes, LayerEdit

Measure = Callable[[Codes], float]
Shifts = Callable[[LayerEdit, Sequence[int]], Mapping[int, float]]
SHARES = (1 / 4, 1 / 8, 1 / 16)  # of the target context, the largest first
LEAST = 16  # tokens; onnxruntime-genai takes no shorter ring beside full caches


class WindowTrials(NamedTuple):
    """How windows are tried.

    Attributes:
        seen: Tokens of the text that they are tried on, and at most twice the distance that its questions reach back.
        divergence: Of the model with codes on that text.
        shifts: How far layers, each alone, move what they give where recalled answers are predicted.
        recall_drop: Probability that recalled answers may lose with codes.
        most: How many lengths are tried.
    """

    seen: int
    divergence: Measure
    shifts: Shifts
    recall_drop: Measure
    most: int = len(SHARES)

    def lengths(self, context: int) -> list[int]:
        """The windows to try for a target context, the longest first."""
        windows = [int(context * share) for share in SHARES if context <= 4 * self.seen]
        return [window for window in windows if window >= LEAST and 2 * window <= self.seen][: self.most]

    def loss(self, layer: int, window: int, layers: int, context: int) -> float:
        """What a window in one of the layers loses at a target context, for the tokens that lie beyond the window."""
        seen = self.divergence(windowed([layer], window, layers))
        return seen * (1 - window / context) / (1 - window / self.seen)


def window_alterations(
    layer: int, spec: ModelSpec, trials: WindowTrials, pays: Pays, context: int
) -> tuple[Alteration, ...]:
    """The windows that could be worth it in a layer, each with what it loses at a target context, the longest first.

    Where one is not worth it, shorter ones, which lose more, are not tried.
    """
    tried = (
        Alteration(window=length, loss=trials.loss(layer, length, spec.layers, context))
        for length in trials.lengths(context)
        if layer in KvWindow(window=length).able(spec)
    )
    return tuple(takewhile(pays, tried))


class Forgetting(Frozen):
    """What windows of one length do to recall."""

    layers: tuple[int, ...] = Field(description="where they could be worth it; that move answers least first")
    kept: int = Field(description="how many of these, from the first, may have one together at no cost of recall")


def windows_by_recall(windows: dict[int, dict[int, float]], layers: int, trials: WindowTrials) -> dict[int, Forgetting]:
    """What each window does to recall.

    Layers that move what the model gives at answers least are taken first, as many as keep recall. In one plan all
    windows are of one length, as onnxruntime-genai needs it. A layer that a longer window takes recall from is not
    asked again.

    Args:
        windows: What each window loses in each layer where it could be worth it, by length and layer.
        layers: Of the model.
        trials: How windows are tried.
    """
    found: dict[int, Forgetting] = {}
    refused: set[int] = set()
    for length in sorted(windows, reverse=True):
        shifts = trials.shifts(_edit(length), sorted(windows[length]))
        row = sorted(shifts, key=lambda layer: (layer in refused, shifts[layer]))
        asked = range(1, 1 + sum(layer not in refused for layer in row))
        drop = lambda count, row=row, length=length: trials.recall_drop(windowed(row[:count], length, layers))  # noqa: E731
        kept = bisect_right(asked, MOST_RECALL, key=drop)
        refused.update(row[kept:])
        found[length] = Forgetting(layers=tuple(row), kept=kept)
    return found


def windowed(chosen: Sequence[int], window: int, layers: int) -> Codes:
    """Codes of a model with a window in some layers and nothing else."""
    return tuple(_edit(window) if layer in chosen else LayerEdit() for layer in range(layers))


def _edit(window: int) -> LayerEdit:
    return LayerEdit(cache=WindowCache(window=window, sinks=SINKS))
