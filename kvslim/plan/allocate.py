"""Water-filling: the choices of all layers that lose least within a number of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """One way to store a layer.

    Attributes:
        size: Bytes at the target context.
        loss: Divergence that it is expected to make.
        name: What the caller knows it by.
    """

    size: float
    loss: float
    name: int


def allocate(layers: Sequence[Sequence[Option]], budget: float) -> list[Option] | None:
    """One option per layer, of least total loss within a budget, up to the gaps between options.

    Every layer starts with its smallest option; then the step that takes most loss per byte is taken, as long as one
    fits. On the lower convex hull of each layer's options that is optimal for the budget it ends at (Everett,
    "Generalized Lagrange multiplier method", Operations Research 11(3), 1963).

    Args:
        layers: The options of each layer, at least one.
        budget: Bytes in all.

    Returns:
        The options, or None when even the smallest do not fit.
    """
    hulls = [hull(options) for options in layers]
    taken = [0] * len(hulls)
    room = budget - sum(options[0].size for options in hulls)
    if room < 0:
        return None
    while True:
        steps = [
            (_gain(options, place), layer)
            for layer, (options, place) in enumerate(zip(hulls, taken, strict=True))
            if place + 1 < len(options) and options[place + 1].size - options[place].size <= room
        ]
        if not steps:
            return [options[place] for options, place in zip(hulls, taken, strict=True)]
        _, layer = max(steps)
        room -= hulls[layer][taken[layer] + 1].size - hulls[layer][taken[layer]].size
        taken[layer] += 1


def hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of loss over size, by size."""
    kept: list[Option] = []
    for option in sorted(options):
        if kept and option.loss >= kept[-1].loss:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) <= _slope(kept[-1], option):
            kept.pop()
        kept.append(option)
    return kept


def _gain(options: Sequence[Option], place: int) -> float:
    return _slope(options[place], options[place + 1])


def _slope(smaller: Option, larger: Option) -> float:
    """Loss taken per byte added."""
    return (smaller.loss - larger.loss) / max(larger.size - smaller.size, 1e-9)
