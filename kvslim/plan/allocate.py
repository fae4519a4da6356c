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
    taken = [options[0] for options in hulls]
    if sum(option.size for option in taken) > budget:
        return None
    for open_options in (hulls, layers):  # along the hulls, then whatever still fits between them
        while step := _best_step(open_options, taken, budget - sum(option.size for option in taken)):
            layer, option = step
            taken[layer] = option
    return taken


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


def _best_step(layers: Sequence[Sequence[Option]], taken: Sequence[Option], room: float) -> tuple[int, Option] | None:
    """The layer and its larger option that take most loss per byte added, of those that fit."""
    steps = [
        (_slope(now, option), layer, option)
        for layer, (options, now) in enumerate(zip(layers, taken, strict=True))
        for option in options
        if option.loss < now.loss and now.size < option.size <= now.size + room
    ]
    if not steps:
        return None
    _, layer, option = max(steps)
    return layer, option


def _slope(smaller: Option, larger: Option) -> float:
    """Loss taken per byte added."""
    return (smaller.loss - larger.loss) / max(larger.size - smaller.size, 1e-9)
