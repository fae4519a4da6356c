"""How much each layer and side hurts: the divergence of the model with that side alone compressed.

Two probes drop coordinates, one rounds. Dropped energy and rounding noise are priced apart, since a direction that is
gone hurts a model more than the same energy spread as noise; and dropped energy by a power law through its two probes,
since a layer that bears a little may not bear a lot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import ConfigDict

from kvslim.caches import FullCache
from kvslim.contract import Frozen, ModelSpec
from kvslim.methods.fitting import fit
from kvslim.planning.cost import Choice, Cost, SideCosts, rounded_plan
from kvslim.transform.edits import Codes, LayerEdit
from kvslim.types import LayerPlan, Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics

Divergence = Callable[[Codes], float]
LITTLE, MUCH = 0.75, 0.5  # shares of head_dim that the two probes of a dropped rank keep
STEEPEST = 3.0
TOGETHER = 4.0  # dropped coordinates lose so much more in all layers together, and on other text, than each alone
TINY = 1e-12


class Price(Frozen):
    """What costs of one side turn into, nats per token.

    Attributes:
        energy: Dropped energy of the probe that drops little.
        kl: Its divergence.
        exponent: Of the power law beyond it; up to it the divergence is linear.
        per_noise: Divergence per rounding noise.
    """

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="constants")

    energy: float
    kl: float
    exponent: float
    per_noise: float

    def of(self, cost: Cost) -> float:
        """The divergence that a cost is expected to make."""
        share = cost.dropped / self.energy
        dropped = TOGETHER * self.kl * (share if share <= 1 else share**self.exponent)
        return dropped + self.per_noise * cost.noise


@dataclass(frozen=True)
class Pricing:
    """What prices are found with.

    Attributes:
        spec: The model's shape.
        divergence: Of the model with the codes given, on calibration text.
        ranks: Of the two probes that drop coordinates.
        dropped: Codes of all layers in these ranks.
        rounded: Codes of all layers with all coordinates in 4 bits.
    """

    spec: ModelSpec
    divergence: Divergence
    ranks: tuple[int, ...]
    dropped: tuple[Codes, ...]
    rounded: Codes

    @classmethod
    def fitted(cls, spec: ModelSpec, statistics: CalibrationStatistics, divergence: Divergence) -> Pricing:
        """Fits the codes that the probes take a side of."""
        ranks = tuple(max(8, int(spec.head_dim * share) // 8 * 8) for share in (LITTLE, MUCH))
        dropped = tuple(_coded(spec, statistics, rank) for rank in ranks)
        return cls(spec, divergence, ranks, dropped, fit(spec, statistics, rounded_plan(spec)))

    def of_layer(self, layer: int, costs: tuple[SideCosts, SideCosts]) -> tuple[Price, Price]:
        """The prices of a layer's keys and of its values, whose costs these are."""
        key, value = (self._of_side(layer, side, cost) for side, cost in enumerate(costs))
        return key, value

    def _of_side(self, layer: int, side: int, costs: SideCosts) -> Price:
        energies = [costs.cost(Choice(rank, 0), 8).dropped for rank in self.ranks]
        kls = [self.divergence(_alone(codes, layer, side)) for codes in self.dropped]
        noise = self.divergence(_alone(self.rounded, layer, side))
        return _price(energies, kls, noise / costs.cost(Choice(self.spec.head_dim, 0), 4).noise)


def _price(energies: list[float], kls: list[float], per_noise: float) -> Price:
    (little, much), (low, high) = np.maximum(energies, TINY), np.maximum(kls, TINY)
    exponent = np.clip(np.log(high / low) / max(np.log(much / little), TINY), 1.0, STEEPEST)
    return Price(energy=float(little), kl=float(low), exponent=float(exponent), per_noise=float(per_noise))


def _coded(spec: ModelSpec, statistics: CalibrationStatistics, rank: int) -> Codes:
    layers = tuple(LayerPlan(layer=layer, cache=FullCache(rank=rank)) for layer in range(spec.layers))
    return fit(spec, statistics, Plan(layers=layers))


def _alone(codes: Codes, layer: int, side: int) -> Codes:
    """The codes of one side of one layer, and none of any other."""
    edit = codes[layer]
    edit = _without_values(edit) if side == 0 else _without_keys(edit)
    return tuple(edit if index == layer else LayerEdit() for index in range(len(codes)))


def _without_values(edit: LayerEdit) -> LayerEdit:
    edit = edit.coded(value_encoder=None, value_decoder=None, value_offset=None, value_centre=None)
    return edit.rounded(value_scale=None, value_feedback=None)


def _without_keys(edit: LayerEdit) -> LayerEdit:
    edit = edit.coded(key_encoder=None, query_encoder=None, key_offset=None)
    return edit.rounded(key_scale=None, key_feedback=None)
