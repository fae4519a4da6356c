"""How much each layer and side hurts: the divergence of the model with that side alone compressed.

Two probes drop coordinates, one rounds. Dropped energy and rounding noise are priced apart, since a direction that is
gone hurts a model more than the same energy spread as noise; and dropped energy by a power law through its two probes,
since a layer that bears a little may not bear a lot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvslim.caches import FullCache
from kvslim.contract import ModelSpec
from kvslim.methods.fitting import fit
from kvslim.plan.cost import Choice, Cost, SideCosts, rounded_plan
from kvslim.transform.edits import LayerEdit
from kvslim.types import LayerPlan, Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics

Divergence = Callable[[tuple[LayerEdit, ...]], float]
LITTLE, MUCH = 0.75, 0.5  # shares of head_dim that the two probes of a dropped rank keep
STEEPEST = 3.0
TINY = 1e-12


@dataclass(frozen=True)
class Price:
    """What costs of one side turn into, nats per token.

    Attributes:
        energy: Dropped energy of the probe that drops little.
        kl: Its divergence.
        exponent: Of the power law beyond it; up to it the divergence is linear.
        per_noise: Divergence per rounding noise.
    """

    energy: float
    kl: float
    exponent: float
    per_noise: float

    def of(self, cost: Cost) -> float:
        """The divergence that a cost is expected to make."""
        share = cost.dropped / self.energy
        dropped = self.kl * (share if share <= 1 else share**self.exponent)
        return dropped + self.per_noise * cost.noise


def prices(
    spec: ModelSpec,
    statistics: CalibrationStatistics,
    costs: list[tuple[SideCosts, SideCosts]],
    divergence: Divergence,
    layers: Callable[[Iterable[int]], Iterable[int]],
) -> list[tuple[Price, Price]]:
    """The price of keys and of values, layer by layer.

    Args:
        spec: The model's shape.
        statistics: What is known of its cache.
        costs: Of each layer's sides.
        divergence: Of the model with the codes given, on calibration text.
        layers: Wraps the iterable of layers, to show progress.
    """
    ranks = [max(8, int(spec.head_dim * share) // 8 * 8) for share in (LITTLE, MUCH)]
    probes = [_coded(spec, statistics, rank) for rank in ranks]
    rounded = fit(spec, statistics, rounded_plan(spec))
    priced = []
    for layer in layers(range(spec.layers)):
        sides = []
        for side, side_cost in enumerate(costs[layer]):
            energies = [side_cost.cost(Choice(rank, 0), 8).dropped for rank in ranks]
            kls = [divergence(_alone(codes, layer, side)) for codes in probes]
            noise = divergence(_alone(rounded, layer, side))
            per_noise = noise / side_cost.cost(Choice(spec.head_dim, 0), 4).noise
            sides.append(_price(energies, kls, per_noise))
        priced.append((sides[0], sides[1]))
    return priced


def _price(energies: list[float], kls: list[float], per_noise: float) -> Price:
    (little, much), (low, high) = np.maximum(energies, TINY), np.maximum(kls, TINY)
    exponent = np.log(high / low) / max(np.log(much / little), TINY)
    return Price(little, low, float(np.clip(exponent, 1.0, STEEPEST)), per_noise)


def _coded(spec: ModelSpec, statistics: CalibrationStatistics, rank: int) -> tuple[LayerEdit, ...]:
    layers = tuple(LayerPlan(layer=layer, cache=FullCache(rank=rank)) for layer in range(spec.layers))
    return fit(spec, statistics, Plan(layers=layers))


def _alone(codes: tuple[LayerEdit, ...], layer: int, side: int) -> tuple[LayerEdit, ...]:
    """The codes of one side of one layer, and none of any other."""
    edit, bare = codes[layer], LayerEdit()
    if side == 0:
        edit = edit.coded(value_encoder=None, value_decoder=None, value_offset=None).rounded(value_scale=None)
    else:
        edit = edit.coded(key_encoder=None, query_encoder=None, key_offset=None).rounded(key_scale=None)
    return tuple(edit if index == layer else bare for index in range(len(codes)))
