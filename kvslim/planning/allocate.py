"""Water-filling: the choices of all layers that lose least within a number of bytes and of time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SHARES = tuple(step / 8 for step in range(9))  # of time in what a unit of both costs
HALVINGS = 8


class Option(NamedTuple):
    """One way to keep a layer.

    Attributes:
        size: Bytes at the target context.
        loss: Divergence that it is expected to make.
        name: What the caller knows it by.
        time: Of one token at the target context, in any unit.
    """

    size: float
    loss: float
    name: int
    time: float = 0.0


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


def allocate_both(layers: Sequence[Sequence[Option]], budget: float, time: float) -> list[Option] | None:
    """The same within a budget and a time: two multipliers, in any proportion, one of which decides.

    Args:
        layers: The options of each layer, at least one.
        budget: Bytes in all.
        time: Of all layers.

    Returns:
        The best allocation found, or None when none keeps both.
    """
    found = [taken for share in SHARES if (taken := _mixed(layers, budget, time, share)) is not None]
    return min(found, key=lambda taken: sum(option.loss for option in taken), default=None)


def _mixed(layers: Sequence[Sequence[Option]], budget: float, time: float, share: float) -> list[Option] | None:
    """The allocation of most units, each of so much time and for the rest of bytes, that keeps both limits."""
    mixed = [
        [
            Option((1 - share) * option.size / budget + share * option.time / time, option.loss, place)
            for place, option in enumerate(options)
        ]
        for options in layers
    ]
    units, step, best = 1.0, 0.5, None
    for _ in range(HALVINGS):
        places = allocate(mixed, units)
        if places is None and units == 1:
            break
        taken = [options[place.name] for options, place in zip(layers, places or (), strict=False)]
        fits = sum(option.size for option in taken) <= budget and sum(option.time for option in taken) <= time
        if taken and fits:
            best = taken
        if best and units == 1:
            break
        units += -step if taken and not fits else step
        step /= 2
    return best


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
