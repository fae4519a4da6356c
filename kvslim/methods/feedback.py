"""Rounding with feedback: half of the coordinates takes up what rounding leaves of the other half.

A code of n numbers of equal precision holds balanced coordinates best when its noise follows their geometric mean, not
their arithmetic one, as reverse water-filling gives strong coordinates more bits than weak ones (Cover and Thomas,
"Elements of Information Theory", 2nd edition, section 10.3.3). With one precision for all numbers the way there is
successive rounding (Babai, "On Lovasz' lattice reduction and the nearest lattice point problem", Combinatorica 6(1),
1986): a number is rounded, and the next one corrects what that cost. Here in two steps, the last half first, so that a
graph needs one small product more. Strong and weak coordinates are mixed in pairs by the angle at which both steps lose
equally much, which is the geometric mean decomposition of a diagonal matrix (Jiang, Hager and Li, "The geometric mean
decomposition", Linear Algebra and its Applications 396, 2005).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvslim.caches.rotation import has_rotation, rotation
from kvslim.methods.kv_pca import SILENT

Array = np.ndarray


class Mixing(NamedTuple):
    """How balanced coordinates become those that are rounded; r = rank.

    Attributes:
        encoder: [heads, r, r]; coordinates y are stored as `y @ encoder`.
        decoder: [heads, r, r]; what meets y in a product meets what is stored as itself times this.
    """

    encoder: Array
    decoder: Array


def has_feedback(rank: int) -> bool:
    """Whether coordinates of that number can be rounded in two halves, each in a rotation of its own."""
    return rank % 2 == 0 and has_rotation(rank // 2)


def mixing(values: Array, seed: int) -> Mixing:
    """Coordinates rotated in two halves, and strong ones mixed with weak ones.

    Args:
        values: [heads, r] eigenvalues of the balanced basis, largest first: a coordinate's power times its reader's.
        seed: Of the rotations.
    """
    heads, rank = values.shape
    half = rank // 2
    turn = np.kron(np.eye(2), rotation(half, seed))
    strong, weak = (np.sqrt(np.maximum(part, 0)).mean(1) for part in (values[:, :half], values[:, half:]))
    weak = np.maximum(weak, np.finfo(np.float64).tiny)
    deviation = np.sqrt(np.stack([strong, weak], 1)).repeat(half, axis=1)[:, None]
    cos, sin = np.sqrt(weak / (strong + weak)), np.sqrt(strong / (strong + weak))
    pairs = np.stack([np.stack([cos, -sin], 1), np.stack([sin, cos], 1)], 1)
    mixed = np.einsum("hij,kl->hikjl", pairs, np.eye(half)).reshape(heads, rank, rank)
    return Mixing((turn / deviation) @ mixed, (turn * deviation) @ mixed)


def feedback(metric: Array) -> Array:
    """What the first half takes up of the last half's error: [heads, r / 2, r / 2], least squares in the metric.

    Args:
        metric: [heads, r, r] second moment of what reads the coordinates.
    """
    half = metric.shape[-1] // 2
    first = metric[:, :half, :half] + SILENT * np.eye(half)
    return np.linalg.solve(first, metric[:, :half, half:])
