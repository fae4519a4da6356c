"""One budget over all methods: the codes, windows and heads that lose least, measured before any graph is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvslim.contract import ModelSpec
from kvslim.errors import GateError, UsageError
from kvslim.memory import give_back
from kvslim.methods.fitting import fit
from kvslim.methods.kv_quant import with_integers
from kvslim.methods.share_kv import ShareKv
from kvslim.planning.allocate import allocate, allocate_both
from kvslim.planning.candidates import Alteration, Candidate, CandidateMaker, options, reason_of
from kvslim.planning.decode_time import DecodeTime
from kvslim.planning.prices import Divergence
from kvslim.planning.probes import BITS, FIX, Probes
from kvslim.progress import Progress, Silent
from kvslim.settings import Budget
from kvslim.transform.edits import LayerEdit
from kvslim.types import KVLayout, LayerPlan, Plan, PlanPoint

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics

Layers = Sequence[Sequence[Candidate]]
Alterations = Mapping[int, Sequence[Alteration]]
RATIOS = (4, 16 / 3, 8, 32 / 3, 16, 64 / 3)  # of the frontier, against the plain fp32 cache
UNSURE = 3  # a plan that is expected to lose up to so many times more may still lose less
FASTER = 1.1  # an int8 cache is read faster than int4: it may lose this much more
MARGIN = 2.5  # other text, and longer text, may lose so much more than calibration text
SEARCHES = 4


@dataclass(frozen=True)
class Planned:
    """A plan with what it is expected to lose.

    Attributes:
        plan: What happens to each layer.
        point: Its bytes and its measured divergence on calibration text.
    """

    plan: Plan
    point: PlanPoint


class Planner:
    """Searches plans for a model among what was probed of it.

    Args:
        spec: The model's shape.
        statistics: What is known of its cache.
        base: The plan that changes nothing.
        time: Of a token at the target context, at which bytes are counted too.
        probes: Of all layers, at that context.
        divergence: Of the model with codes, on text that prices do not come from.
        time_ratio: Time of a token over the plain model's, which every plan keeps; None for no limit.

    Raises:
        UsageError: The probes lack a layer, or are of another context or kind of limit.
    """

    def __init__(
        self,
        spec: ModelSpec,
        statistics: CalibrationStatistics,
        base: Plan,
        time: DecodeTime,
        probes: Probes,
        divergence: Divergence,
        time_ratio: float | None = None,
    ) -> None:
        _check(probes, spec, time.context, timed=time_ratio is not None)
        self.spec, self.statistics, self.base, self.divergence = spec, statistics, base, divergence
        self.time, self.context, self.time_ratio = time, time.context, time_ratio
        self.plain_bytes = KVLayout.of(spec, base).bytes_at(self.context)
        self.plain_time = time.of_plan(base.layers)
        self._maker = CandidateMaker(spec, base, time, timed=probes.timed)
        self.whole = {bits: [layer.candidates[bits] for layer in probes.layers] for bits in BITS}
        self.offered = {bits: list(self._offered(whole, probes)) for bits, whole in self.whole.items()}
        self.narrower = {bits: self._narrower(offered, probes) for bits, offered in self.offered.items()}
        self._fitted: dict[LayerPlan, tuple[LayerPlan, LayerEdit]] = {}
        self._divergences: dict[tuple[LayerPlan, ...], float] = {}

    @property
    def least_time_ratio(self) -> float:
        """Time of a token over the plain model's that no plan falls below."""
        kinds = (layers for bits in BITS for layers in (*self.offered[bits], *self.narrower[bits]))
        least = min(sum(min(each.time for each in layer) for layer in layers) for layers in kinds)
        return (least + self.time.of_plan(())) / self.plain_time

    def frontier(
        self, progress: Progress | None = None, is_enough: Callable[[Planned], bool] | None = None
    ) -> list[Planned]:
        """The best plan found at each of a row of sizes, the largest first.

        Args:
            progress: Receives the progress.
            is_enough: Whether a plan ends the row; None for the whole.
        """
        found: list[Planned] = []
        for ratio in (progress or Silent()).track(RATIOS, "sizes planned"):
            if (planned := self.allocated(self.plain_bytes / ratio)) is not None:
                found.append(planned)
                if is_enough is not None and is_enough(planned):
                    break
        return found

    def allocated(self, budget: float) -> Planned | None:
        """The plan of least divergence within a budget in bytes at the target context; None if none fits."""
        found = list(self._by_bits(budget))
        if len(found) == 2 and found[0].point.kl <= FASTER * found[1].point.kl:
            return found[0]
        return min(found, key=_divergence, default=None)

    def kinds(self, budget: float) -> dict[frozenset[str], Planned]:
        """By kind the best plan within a budget, where it could be the best of all; the least divergence first."""
        likely: dict[frozenset[str], tuple[LayerPlan, ...]] = {}
        filled = (self._all_filled(budget, kinds).values() for kinds in (self.offered, self.narrower))
        for plan in sorted((plan for found in filled for plans in found for plan in plans), key=_expected):
            likely.setdefault(kind_of(plan), plan)
        least = min(map(_expected, likely.values()), default=0.0)
        found = {kind: self._planned(plan) for kind, plan in likely.items() if _expected(plan) <= UNSURE * least}
        return dict(sorted(found.items(), key=lambda item: item[1].point.kl))

    def never_worse(self, planned: Planned) -> Planned:
        """The plan, or all layers alike in as many bits and at no more bytes, where that loses less."""
        bits = 8 if planned.point.cache == "int8" else 4
        whole, budget = self.whole[bits], planned.point.kv_bytes_per_token * self.context
        sizes = range(min(len(layer) for layer in whole))
        fitting = [place for place in sizes if self._keeps([layer[place] for layer in whole], budget)]
        if not fitting:
            return planned
        uniform = self._planned([layer[fitting[-1]].layer for layer in whole], "uniform, which loses less here; ")
        return min(planned, uniform, key=_divergence)

    def smallest(self, max_kl: float, frontier: list[Planned]) -> Planned:
        """The smallest plan whose divergence keeps a margin to a limit, of those that are no slower than plain.

        Int4 coordinates with a residual can lose little and still take twice as long to read as int8: a few bytes less
        are not worth that.

        Raises:
            GateError: Even the best plan of the frontier exceeds it.
        """
        sizes = [planned.point.kv_bytes_per_token for planned in frontier]
        fitting = [planned for planned in frontier if _is_within(planned, max_kl)]
        if not fitting:
            least = MARGIN * min((each.point.kl for each in frontier if each.point.time_ratio <= 1), default=math.nan)
            raise GateError(
                f"no plan is sure to keep KL within {max_kl:g}",
                where=Budget.place("max_kl"),
                fix=f"allow {least:.2g} or more",
            )
        best = fitting[-1]
        low = max((size for size in sizes if size < best.point.kv_bytes_per_token), default=0.0)
        for _ in range(SEARCHES):
            middle = (low + best.point.kv_bytes_per_token) / 2
            found = (planned for planned in self._by_bits(middle * self.context) if _is_within(planned, max_kl))
            if (first := next(found, None)) is None:
                low = middle
            else:
                best = first
        return best

    def _offered(self, whole: Layers, probes: Probes) -> Iterator[Layers]:
        """What plans are made of: whole caches or windows of one length, all parts or not; or shared caches."""
        removed = probes.removed
        for window in ({}, *probes.windowed):
            layers = self._altered(whole, window)
            yield layers
            if removed:
                yield self._altered(layers, removed)
        if shared := probes.shared:
            sources = {alteration.source for layer in shared.values() for alteration in layer}
            free = {layer: parts for layer, parts in removed.items() if layer not in sources}
            yield self._altered(self._altered(whole, free), shared)

    def _narrower(self, offered: Sequence[Layers], probes: Probes) -> list[Layers]:
        """The same with narrower feed-forward parts too, where that could be worth it."""
        narrowed = probes.narrowed
        return [self._altered(layers, narrowed) for layers in offered if narrowed]

    def _altered(self, layers: Layers, alterations: Alterations) -> Layers:
        return [self._maker.altered(layer, alterations.get(index, ())) for index, layer in enumerate(layers)]

    def _by_bits(self, budget: float) -> Iterator[Planned]:
        """The best plans within a budget, where they could be the best of all: first one in int8, then one in int4.

        In each number of bits they are codes alone, what is expected to lose least, and that with narrower feed-forward
        parts. Alterations do more together than each alone, so these must beat codes alone, which are therefore never
        left out for their sake; nor are plans without narrower parts for the sake of those.
        """
        found, narrower = (self._all_filled(budget, kinds) for kinds in (self.offered, self.narrower))
        ways = (
            {bits: plans[0] for bits, plans in found.items()},
            *({bits: min(plans, key=_expected) for bits, plans in kind.items()} for kind in (found, narrower)),
        )
        least = [min(map(_expected, way.values()), default=0.0) for way in ways]
        for bits in BITS:
            likely = ((way[bits], UNSURE * most) for way, most in zip(ways, least, strict=True) if bits in way)
            worth = dict.fromkeys(plan for plan, most in likely if _expected(plan) <= most)
            if worth:
                yield min(map(self._planned, worth), key=_divergence)

    def _all_filled(
        self, budget: float, kinds: Mapping[int, Sequence[Layers]]
    ) -> dict[int, list[tuple[LayerPlan, ...]]]:
        """By bits the best candidates within a budget of all that is offered, codes alone first; no bits without."""
        filled = {
            bits: [layers for each in offered if (layers := self._filled(budget, each))]
            for bits, offered in kinds.items()
        }
        return {bits: plans for bits, plans in filled.items() if plans}

    def _filled(self, budget: float, offered: Layers) -> tuple[LayerPlan, ...] | None:
        """The best candidate of each layer within a budget; None if none fits."""
        possible = [options(layer) for layer in offered]
        limit = self._time_limit
        taken = allocate(possible, budget) if limit is None else allocate_both(possible, budget, limit)
        filled = tuple(layer[option.name].layer for layer, option in zip(offered, taken or (), strict=False))
        return filled if any(layer.has_cache for layer in filled) else None

    def _keeps(self, candidates: Sequence[Candidate], budget: float) -> bool:
        """Whether those candidates keep the limits of bytes and time."""
        in_time = self._time_limit is None or sum(each.time for each in candidates) <= self._time_limit
        return in_time and sum(each.size for each in candidates) <= budget

    @property
    def _time_limit(self) -> float | None:
        """Time that all layers may take together."""
        return None if self.time_ratio is None else self.time_ratio * self.plain_time - self.time.of_plan(())

    def _planned(self, layers: Sequence[LayerPlan], how: str = "") -> Planned:
        """Those layers with keys centred where that pays, measured."""
        fitted = [self._fit(layer) for layer in layers]
        plan = self._plan_of(_with_reason(layer, how + layer.reason) for layer, _ in fitted)
        if plan.layers not in self._divergences:
            give_back()  # codes of all layers and what is computed with them come on top of what is in memory
            codes = ShareKv().apply(self.spec, self.statistics, plan, tuple(code for _, code in fitted))
            self._divergences[plan.layers] = self.divergence(codes)
        size = KVLayout.of(self.spec, plan).bytes_at(self.context)
        point = PlanPoint(
            cache=next(layer.cache.dtype for layer in plan.layers if layer.has_cache),
            kv_bytes_per_token=size / self.context,
            kv_ratio=self.plain_bytes / size,
            time_ratio=self.time.of_plan(plan.layers) / self.plain_time,
            kl=self._divergences[plan.layers],
        )
        return Planned(plan, point)

    def _fit(self, layer: LayerPlan) -> tuple[LayerPlan, LayerEdit]:
        """A layer's final plan and its codes, fitted once."""
        if layer not in self._fitted:
            final = self._plan_of([_with_reason(layer, reason_of(layer, self.spec))])
            if layer.has_cache:
                final = with_integers(self.spec, self.statistics, final, {}, True)
            own = fit(self.spec, self.statistics, final, before=ShareKv.order)
            self._fitted[layer] = final.layers[0], own[0]
        return self._fitted[layer]

    def _plan_of(self, layers: Iterable[LayerPlan]) -> Plan:
        return self.base.model_copy(update={"layers": tuple(layers)})


def kind_of(layers: Sequence[LayerPlan]) -> frozenset[str]:
    """What is done to layers besides coding their caches."""
    done = {
        "windows": any(layer.has_cache and layer.cache.kept is not None for layer in layers),
        "removals": any(layer.heads is not None or not layer.mlp for layer in layers),
        "narrower parts": any(layer.mlp_width is not None for layer in layers),
        "shared caches": any(layer.source is not None for layer in layers),
    }
    return frozenset(name for name, is_done in done.items() if is_done)


def _is_within(planned: Planned, max_kl: float) -> bool:
    """Whether a plan keeps a margin to a limit of divergence, and is expected to be no slower than plain."""
    return planned.point.kl * MARGIN <= max_kl and planned.point.time_ratio <= 1


def _check(probes: Probes, spec: ModelSpec, context: int, *, timed: bool) -> None:
    """Refuses probes that are not of this model at this context, with this kind of limit."""
    probes.check_layers(spec.layers)
    if (probes.context, probes.timed) != (context, timed):
        kind = "with" if probes.timed else "without"
        raise UsageError(
            f"the probes are for {probes.context:,} tokens {kind} a limit of time", where="probes", fix=FIX
        )


def _with_reason(layer: LayerPlan, reason: str) -> LayerPlan:
    return layer.model_copy(update={"reason": reason})


def _expected(layers: Sequence[LayerPlan]) -> float:
    """Sum of what the layers are expected to lose, each alone."""
    return sum(layer.score or 0.0 for layer in layers)


def _divergence(planned: Planned) -> float:
    return planned.point.kl
