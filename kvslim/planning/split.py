"""One memory budget for weights and cache: how much of it each gets, so that least is lost in all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kvslim.types import PlanPoint

SIZES = 64  # of the cache that are tried


class Split(NamedTuple):
    """Shares of a memory budget, in bytes, and what is expected to be lost.

    Attributes:
        weights: Of the matrices in memory.
        cache: Of the cache at the target context.
        loss: Nats per token.
    """

    weights: float
    cache: float
    loss: float


def split(
    room: float, least: float, loss_of_weights: Callable[[float], float], frontier: Sequence[PlanPoint], context: int
) -> Split | None:
    """The split that is expected to lose least.

    Errors of weights and of the cache add up: both are small and know nothing of each other.

    Args:
        room: Bytes for both.
        least: Bytes of the matrices in their smallest formats.
        loss_of_weights: Expected divergence of the matrices within so many bytes, at least `least`.
        frontier: The planner's points, the largest first.
        context: Tokens at which the cache's bytes count.

    Returns:
        The split, or None where not even the smallest of both fit, or there is no plan of the cache.
    """
    if not frontier:
        return None
    sizes = np.array([point.kv_bytes_per_token * context for point in reversed(frontier)])
    losses = np.array([max(point.kl, 1e-12) for point in reversed(frontier)])
    tried = np.geomspace(sizes[0], sizes[-1], SIZES)
    of_cache = np.exp(np.interp(np.log(tried), np.log(sizes), np.log(losses)))
    found = [
        Split(room - size, size, float(loss) + loss_of_weights(room - size))
        for size, loss in zip(map(float, tried), of_cache, strict=True)
        if room - size >= least
    ]
    return min(found, key=lambda split: split.loss, default=None)
