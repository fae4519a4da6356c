"""What a choice costs: the score energy that a rank drops, and the noise that rounding adds.

In the balanced basis coordinate j of the cache has power sqrt(lam_j) and so has its reader: dropping it costs lam_j,
and rounding noise, spread evenly over a group of n coordinates by a rotation, costs (sum of sqrt(lam_j))^2 / n times
a factor of the quantiser. The factor is measured on samples, once per layer and side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvslim.caches import IntegerCache
from kvslim.caches.coded import width_step
from kvslim.caches.rotation import has_rotation
from kvslim.contract import ModelSpec
from kvslim.methods.feedback import has_feedback
from kvslim.methods.fitting import fit
from kvslim.methods.kv_hdc import KvHdc
from kvslim.methods.kv_pca import KvPca
from kvslim.methods.kv_quant import KvQuant, key_rounding_error, value_rounding_error
from kvslim.types import LayerPlan, Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics

Array = np.ndarray
STEP = 8
FINER = 100.0  # an 8-bit step has room to spare, so its noise is not quite 16^2 times less than that of 4 bits


class Choice(NamedTuple):
    """What one side of a layer keeps: coordinates, and how many of them twice."""

    rank: int
    residual: int


class Cost(NamedTuple):
    """What a choice adds to a side's scores: dropped energy and rounding noise."""

    dropped: float
    noise: float


@dataclass(frozen=True)
class SideCosts:
    """Costs of one side of one layer.

    Attributes:
        values: [heads, head_dim] eigenvalues of the balanced basis, largest first.
        factor: Noise of 4-bit rounding per unit of evenly spread power.
    """

    values: Array
    factor: float

    def cost(self, choice: Choice, bits: int) -> Cost:
        """The cost of a choice stored in 8 or 4 bits."""
        rank, residual = choice
        if bits == 4 and not residual and has_feedback(rank):
            noise = self.factor * self._in_halves(rank)
        else:
            noise = self.factor * (self._spread(residual, rank) + self._spread(0, residual) / FINER)
        return Cost(float(self.values[:, rank:].sum()), noise if bits == 4 else noise / FINER)

    def _in_halves(self, rank: int) -> float:
        """Power of coordinates that are rounded in two halves: their geometric mean; see `methods.feedback`."""
        amplitude = np.sqrt(np.maximum(self.values[:, :rank], 0))
        strong, weak = (amplitude[:, half].mean(1) for half in (slice(rank // 2), slice(rank // 2, None)))
        return float((strong * weak).sum() * rank)

    def _spread(self, start: int, stop: int) -> float:
        if start == stop:
            return 0.0
        amplitude = np.sqrt(np.maximum(self.values[:, start:stop], 0)).sum(1)
        return float(np.square(amplitude).sum() / (stop - start))


def side_costs(spec: ModelSpec, statistics: CalibrationStatistics) -> list[tuple[SideCosts, SideCosts]]:
    """Costs of keys and of values, layer by layer."""
    plan = rounded_plan(spec)
    codes = fit(spec, statistics, plan, before=KvQuant.order)
    costs = []
    for layer, code in zip(plan.layers, codes, strict=True):
        sides = []
        bases = KvPca().bases(statistics, layer.layer, "balanced")
        stored = layer.cache
        assert isinstance(stored, IntegerCache)  # `rounded_plan` makes it so
        noises = [error(statistics, layer.layer, stored, code) for error in (key_rounding_error, value_rounding_error)]
        for basis, noise in zip(bases, noises, strict=True):
            bare = SideCosts(basis.values, 1.0)
            sides.append(SideCosts(basis.values, noise / bare.cost(Choice(spec.head_dim, 0), 4).noise))
        costs.append((sides[0], sides[1]))
    return costs


def rounded_plan(spec: ModelSpec) -> Plan:
    """All coordinates of every layer in 4 bits."""
    whole = Choice(spec.head_dim, 0)
    return Plan(layers=tuple(bundled(LayerPlan(layer=layer), whole, None, 4) for layer in range(spec.layers)))


def choices(spec: ModelSpec, window: int | None, width: int, bits: int) -> Iterator[Choice]:
    """All that one side can keep in a cache of `width` numbers per head."""
    step = width_step(window, "int4" if bits == 4 else "int8")
    for residual in range(0, width // 2 + 1, STEP) if bits == 4 else (0,):
        rank = width - residual
        if rank <= spec.head_dim and width % step == 0 and _has_rotations(rank, residual):
            yield Choice(rank, residual)


def bundled(layer: LayerPlan, key: Choice, value: Choice | None, bits: int) -> LayerPlan:
    """A layer's plan with these choices, as hyperdimensional codes in integers."""
    value = value or key
    return layer.with_cache(
        rank=key.rank,
        value_rank=None if value.rank == key.rank else value.rank,
        residual=key.residual,
        value_residual=None if value.residual == key.residual else value.residual,
        rotation=KvHdc().seed,
        stored=f"int{bits}",
        granularity="per_channel" if bits == 4 else "per_tensor",
        feedback=bits == 4,
    )


def _has_rotations(rank: int, residual: int) -> bool:
    return has_rotation(rank - residual) and has_rotation(residual)
