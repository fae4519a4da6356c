"""Heads in clusters: which heads take the attention of which, and how many clusters a layer needs.

The k-medoids problem, solved as PAM does, greedily and then by swaps (Kaufman and Rousseeuw, "Finding Groups in Data",
1990, chapter 2): always the same answer, and a medoid is a head, which a mean of heads is not. A loss is an array
[heads, heads]; entry (h, r) says what head h loses by the attention of head r, and the diagonal is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
FIRST_TOKENS = 5  # of a prompt, from which dynamic clusters are formed (Agarwal et al., "CHAI", 2024)
PLATEAU = 0.5  # of the mean fall per cluster


def clusters_of(loss: Array, count: int, pools: int) -> tuple[int, ...]:
    """For each head the one whose attention it takes; representatives take their own.

    Args:
        loss: [heads, heads].
        count: Clusters in all, as many in each pool.
        pools: Equal runs of heads that share among themselves alone, such as those that read one kv head.
    """
    size = len(loss) // pools
    found: list[int] = []
    for start in range(0, len(loss), size):
        own = loss[start : start + size, start : start + size]
        chosen = _medoids(own, count // pools)
        found += [start + chosen[place] for place in own[:, chosen].argmin(1)]
    return tuple(found)


def curve(loss: Array, pools: int) -> Array:
    """What all heads lose together with 1, 2, ... clusters in each pool."""
    heads = np.arange(len(loss))
    counts = range(pools, len(loss) + 1, pools)
    return np.array([loss[heads, list(clusters_of(loss, count, pools))].sum() for count in counts])


def elbow(loss: Array, pools: int) -> int:
    """The number of clusters beyond which the error falls little.

    That is the least number from which on every further cluster (one more in each pool) takes away less than half of
    what a cluster takes away in the mean. Where the error falls evenly, no number is enough: each head its own cluster.
    """
    errors = curve(loss, pools)
    if len(errors) == 1:
        return pools
    falls = -np.diff(errors)
    large = np.flatnonzero(falls >= PLATEAU * errors[0] / len(falls)) if errors[0] > 0 else np.zeros(0, np.int64)
    return pools * (1 if large.size == 0 else int(large[-1]) + 2)


def prompt_loss(weights: Array, values: Array, calibrated: Array) -> Array:
    """What heads lose by each other's attention, as the first tokens of a prompt and calibration have it.

    Each counts by its share of its own sum. The tokens show how this prompt is read; they are few, and calibration,
    which saw many, decides what they leave open.

    Args:
        weights: [heads, tokens, tokens] attention of the first tokens to each other.
        values: [heads, tokens, head_dim] their values.
        calibrated: [heads, heads] mean loss over calibration text.
    """
    centred = values - values.mean(1, keepdims=True)
    power = np.square(centred).sum(-1)
    apart = np.square(weights[:, None] - weights[None]).sum(2)
    seen = np.einsum("ijk,ik->ij", apart, power)
    loss: Array = _shared_out(seen) + _shared_out(calibrated)
    return loss


def _shared_out(loss: Array) -> Array:
    total = loss.sum()
    shares: Array = loss / total if total > 0 else loss
    return shares


@dataclass(frozen=True, eq=False)
class Formed:
    """How a layer forms clusters of its heads for each prompt.

    Attributes:
        count: Clusters.
        calibrated: [heads, heads] what heads lose by each other's attention, from calibration.
    """

    count: int
    calibrated: Array

    def clusters(self, weights: Array, values: Array) -> tuple[int, ...]:
        """The clusters that first tokens give; arguments as for `prompt_loss`."""
        return clusters_of(prompt_loss(weights, values, self.calibrated), self.count, pools=1)


def _medoids(loss: Array, count: int) -> list[int]:
    """The heads, in order, that the others lose least by."""
    chosen: list[int] = []
    for _ in range(count):
        left = [head for head in range(len(loss)) if head not in chosen]
        chosen.append(min(left, key=lambda head: _total(loss, [*chosen, head])))
    while (better := min(_swaps(loss, chosen), key=lambda swap: _total(loss, swap), default=chosen)) != chosen:
        if _total(loss, better) >= _total(loss, chosen) * (1 - 1e-12):
            break
        chosen = better
    return sorted(chosen)


def _swaps(loss: Array, chosen: list[int]) -> Iterator[list[int]]:
    """The choice with one head exchanged for one outside it."""
    for place in range(len(chosen)):
        for head in range(len(loss)):
            if head not in chosen:
                yield [*chosen[:place], head, *chosen[place + 1 :]]


def _total(loss: Array, chosen: list[int]) -> float:
    return float(loss[:, chosen].min(1).sum())
