"""One memory budget for weights and cache: how much of it each gets, so that least is lost in all."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kvslim.caches import Cache, IntegerCache
from kvslim.contract import ModelSpec
from kvslim.devices.peak import BRANCH_BYTES, FEEDBACK_BYTES, RESIDUAL_BYTES
from kvslim.planning.matrices import FLOAT, MatrixPrices
from kvslim.types import LayerPlan, Plan

SIZES = 64  # of the weights that are tried
LEAST_LOSS = 1e-12


class WeightsSize(NamedTuple):
    """The matrices at one size.

    Attributes:
        file: Bytes of a file that they are picked within.
        memory: Bytes in a process.
        loss: Nats per token.
    """

    file: float
    memory: float
    loss: float


class CacheSize(NamedTuple):
    """A plan of the cache at one size.

    Attributes:
        cache: Its bytes at the target context.
        beside: Bytes that a graph takes more for it.
        loss: Nats per token.
    """

    cache: float
    beside: float
    loss: float


class Split(NamedTuple):
    """Shares of a memory budget, in bytes, and what is expected to be lost.

    Attributes:
        weights: Of the matrices in the file; in memory they take some more.
        cache: Of the cache at the target context.
        loss: Nats per token.
    """

    weights: float
    cache: float
    loss: float


def weights_sizes(prices: MatrixPrices) -> list[WeightsSize]:
    """The sizes of the weights that are tried, the smallest first."""
    limits = [float(size) + 1 for size in np.geomspace(*prices.sizes, SIZES)]  # a byte more, whatever is rounded
    picked = [(limit, prices.within(limit)) for limit in limits]
    return [WeightsSize(limit, each.memory, each.loss) for limit, each in picked if each is not None]


def split(room: float, weights: Sequence[WeightsSize], caches: Sequence[CacheSize]) -> Split | None:
    """The split that is expected to lose least.

    Errors of weights and of the cache add up: both are small and know nothing of each other.

    Args:
        room: Bytes of memory for weights, cache, and what the graph takes for it.
        weights: Sizes of the matrices.
        caches: Plans of the cache.

    Returns:
        The split, or None where not even the smallest of both fit, or there is no plan of the cache.
    """
    return min(_splits(room, weights, caches), key=lambda split: split.loss, default=None)


def _splits(room: float, weights: Sequence[WeightsSize], caches: Sequence[CacheSize]) -> Iterator[Split]:
    """What fits, by the size of the weights: the cache has the rest."""
    useful = _useful(caches)
    if not useful:
        return
    whole = [_whole(size) for size in useful]
    losses = np.log([max(size.loss, LEAST_LOSS) for size in useful])
    for size in weights:
        if (left := room - size.memory) >= whole[0]:
            lost = float(np.exp(np.interp(np.log(left), np.log(whole), losses)))
            yield Split(size.file, _cache_within(left, useful), size.loss + lost)


def _useful(sizes: Sequence[CacheSize]) -> list[CacheSize]:
    """Those that lose less than all that take less, by what they take."""
    found: list[CacheSize] = []
    for size in sorted(sizes, key=_whole):
        if not found or size.loss < found[-1].loss:
            found.append(size)
    return found


def _cache_within(left: float, sizes: Sequence[CacheSize]) -> float:
    """Bytes of the cache alone: between two sizes the plan may be of the kind of either."""
    below = bisect_right(sizes, left, key=_whole) - 1
    beside = max(size.beside for size in sizes[below : below + 2])
    return max(left - beside, sizes[below].cache)


def least_room(weights: Sequence[WeightsSize], caches: Sequence[CacheSize]) -> float:
    """Bytes of memory that the smallest weights and the smallest cache take together; there is one of each."""
    return weights[0].memory + min(map(_whole, caches))


def _whole(size: CacheSize) -> float:
    return size.cache + size.beside


def beside_bytes(spec: ModelSpec, plan: Plan) -> float:
    """What a graph takes for a cache of integers: the matrices that code keys and queries, and the branches."""
    return branch_bytes(plan) + sum(FLOAT * _code_numbers(spec, layer, plan) for layer in plan.layers)


def branch_bytes(plan: Plan) -> float:
    """What the branches of a graph over integers take, one to read prompts and one to decode."""
    return sum(_of_branches(_read(layer, plan)) for layer in plan.layers)


def _of_branches(cache: Cache | None) -> float:
    if not isinstance(cache, IntegerCache):
        return 0.0
    more = FEEDBACK_BYTES * cache.feedback + RESIDUAL_BYTES * any(cache.residuals)
    return BRANCH_BYTES + more


def _code_numbers(spec: ModelSpec, layer: LayerPlan, plan: Plan) -> int:
    cache = _read(layer, plan)
    if not isinstance(cache, IntegerCache) or cache.rank is None:
        return 0
    queries = spec.q_heads if layer.heads is None else len(layer.heads)
    keys = len(layer.kv_heads(spec)) if layer.source is None else 0
    return spec.head_dim * (keys * cache.rank + queries * cache.widths(spec.head_dim)[0])


def _read(layer: LayerPlan, plan: Plan) -> Cache | None:
    """The cache that a layer reads; None where it has no attention."""
    if layer.heads == ():
        return None
    return layer.cache if layer.source is None else plan.layers[layer.source].cache
