"""One memory budget for weights and cache: how much of it each gets, so that least is lost in all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kvslim.caches import IntegerCache
from kvslim.contract import MIB, ModelSpec
from kvslim.planning.matrices import FLOAT, MatrixPrices
from kvslim.types import LayerPlan, Plan

SIZES = 64  # of the weights that are tried
LEAST_LOSS = 1e-12
# What opening a graph takes for a layer's branches over integers; measured on SmolLM2's shape.
BRANCHES, FEEDBACK, RESIDUAL = 0.5 * MIB, 0.2 * MIB, 0.3 * MIB


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


def split(room: float, prices: MatrixPrices, sizes: Sequence[CacheSize]) -> Split | None:
    """The split that is expected to lose least.

    Errors of weights and of the cache add up: both are small and know nothing of each other.

    Args:
        room: Bytes of memory for weights, cache, and what the graph takes for it.
        prices: Of the matrices.
        sizes: Plans of the cache.

    Returns:
        The split, or None where not even the smallest of both fit, or there is no plan of the cache.
    """
    return min(_splits(room, prices, sizes), key=lambda split: split.loss, default=None)


def _splits(room: float, prices: MatrixPrices, sizes: Sequence[CacheSize]) -> Iterator[Split]:
    """What fits, by the size of the weights: the cache has the rest."""
    caches, beside, losses = np.array(sorted(sizes, key=_whole)).reshape(-1, 3).T
    whole = caches + beside
    for size in np.geomspace(*prices.sizes, SIZES) if sizes else ():
        limit = float(size) + 1  # a byte more, so that the smallest fit whatever is rounded
        picked = prices.within(limit)
        if picked is not None and (left := room - picked.memory) >= whole[0]:
            lost = np.exp(np.interp(np.log(left), np.log(whole), np.log(np.maximum(losses, LEAST_LOSS))))
            yield Split(limit, left - float(np.interp(left, whole, beside)), picked.loss + float(lost))


def least_room(prices: MatrixPrices, sizes: Sequence[CacheSize]) -> float:
    """Bytes of memory that the smallest weights and the smallest cache take together."""
    picked = prices.within(prices.sizes[0] + 1)
    return (0.0 if picked is None else picked.memory) + min(map(_whole, sizes), default=0.0)


def _whole(size: CacheSize) -> float:
    return size.cache + size.beside


def beside_bytes(spec: ModelSpec, plan: Plan) -> float:
    """What a graph takes for a cache of integers: the matrices that code keys and queries, and the branches."""
    return sum(_beside(spec, layer, plan) for layer in plan.layers)


def _beside(spec: ModelSpec, layer: LayerPlan, plan: Plan) -> float:
    read = layer.cache if layer.source is None else plan.layers[layer.source].cache
    if layer.heads == () or not isinstance(read, IntegerCache):
        return 0.0
    branches = BRANCHES + (FEEDBACK if read.feedback else 0.0) + (RESIDUAL if any(read.residuals) else 0.0)
    if read.rank is None:
        return branches
    queries = spec.q_heads if layer.heads is None else len(layer.heads)
    keys = len(layer.kv_heads(spec)) if layer.source is None else 0
    numbers = spec.head_dim * (keys * read.rank + queries * read.widths(spec.head_dim)[0])
    return branches + FLOAT * numbers
