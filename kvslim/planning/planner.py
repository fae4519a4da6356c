"""One budget over all methods: the codes, windows and heads that lose least, measured before any graph is made."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, tee
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
from kvslim.planning.probes import BITS, FIX, Change, Probes
from kvslim.progress import Progress, Silent
from kvslim.settings import MARGIN, Budget
from kvslim.transform.edits import Codes, LayerEdit
from kvslim.types import KVLayout, LayerPlan, Plan, PlanPoint

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics

Layers = Sequence[Sequence[Candidate]]
Alterations = Mapping[int, Sequence[Alteration]]
Groups = list[list[tuple[LayerPlan, ...]]]  # plans, by the number of bits where that counts
RATIOS = (4, 16 / 3, 8, 32 / 3, 16, 64 / 3)  # of the frontier, against the plain fp32 cache
UNSURE = 3  # a plan that is expected to lose up to so many times more may still lose less
FASTER = 1.1  # an int8 cache is read faster than int4: it may lose this much more
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
        with_recall: Gives probes back with the layers that keep recall under some kinds of changes. It is asked when a
            plan with such a change is to be measured, since it takes as long as measuring many plans.
        divergences: Of the model with one after another of many codes, on text that prices do not come from. Codes may
            be taken ahead, to be measured beside each other.
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
        with_recall: Callable[[Probes, Iterable[Change]], Probes],
        divergences: Callable[[Iterable[Codes]], Iterator[float]],
        time_ratio: float | None = None,
    ) -> None:
        _check(probes, spec, time.context, timed=time_ratio is not None)
        self.spec, self.statistics, self.base, self.divergences = spec, statistics, base, divergences
        self.time, self.context, self.time_ratio = time, time.context, time_ratio
        # The plain graph keeps the model's windows, whatever the recipe does with them.
        self.plain_bytes = KVLayout.of(spec, Plan.identity(spec)).bytes_at(self.context)
        self.plain_time = time.of_plan(base.layers)
        self._maker = CandidateMaker(spec, base, time, timed=probes.timed)
        self.whole = {bits: [layer.candidates[bits] for layer in probes.layers] for bits in BITS}
        self._with_recall = with_recall
        self._offer(probes)
        if time_ratio is not None:  # whether it can be kept depends on all that may be changed
            self.ask_of_all()
        self._fitted: dict[LayerPlan, tuple[LayerPlan, LayerEdit]] = {}
        self._divergences: dict[tuple[LayerPlan, ...], float] = {}

    def ask_of_all(self) -> None:
        """Asks of every kind of change at once whether it keeps recall."""
        if changes := self._probes.unasked:
            self._ask(changes)

    @property
    def least_time_ratio(self) -> float:
        """Time of a token over the plain model's that no plan falls below; where time is limited, all is asked."""
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
        worth = (self._worth(self.plain_bytes / ratio) for ratio in RATIOS)
        first = next(worth)  # what this asks of recall is a part of its own; smaller sizes may ask more
        best = self._best(chain([first], worth))
        for planned in (progress or Silent()).track(best, "sizes planned", len(RATIOS)):
            if planned is not None:
                found.append(planned)
                if is_enough is not None and is_enough(planned):
                    break
        return found

    def allocated(self, budget: float) -> Planned | None:
        """The plan of least divergence within a budget in bytes at the target context; None if none fits."""
        return next(self._best([self._worth(budget)]))

    def forgetting(self, share: float) -> Planner:
        """The same planner, with windows in a share of the layers whatever recall that costs."""
        if "windows" in self._probes.unasked:
            self._ask(["windows"])

        def with_recall(_: Probes, changes: Iterable[Change]) -> Probes:
            self._ask(changes)
            return self._probes.forgetting(share)

        other = copy.copy(self)
        other._with_recall = with_recall
        other._offer(self._probes.forgetting(share))
        return other

    def kinds(self, budget: float) -> dict[frozenset[str], Planned]:
        """By kind the best plan within a budget, where it could be the best of all; the least divergence first."""
        (worth,) = self._that_keep_recall(lambda: [self._likely_kinds(budget)])
        found = zip(map(kind_of, worth), self._measured(map(self._made, worth)), strict=True)
        return dict(sorted(found, key=lambda item: item[1].point.kl))

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
        are not worth that. Where the best plan of every size is slower than plain, those in other bits count too, and
        where these are slower as well, the fastest of all that keep the margin.

        Raises:
            GateError: Even the best plan of the frontier exceeds it.
        """
        sizes = [planned.point.kv_bytes_per_token for planned in frontier]
        tried, slowest = list(frontier), 1.0
        if not any(_is_within(planned, max_kl, slowest) for planned in tried):
            tried += [planned for size in sizes for planned in self._by_bits(size * self.context)]
            times = [planned.point.time_ratio for planned in tried if _is_within(planned, max_kl)]
            slowest = max(slowest, min(times, default=slowest))
        fitting = [planned for planned in tried if _is_within(planned, max_kl, slowest)]
        if not fitting:
            least = MARGIN * min(planned.point.kl for planned in tried)
            raise GateError(
                f"no plan is sure to keep KL within {max_kl:g}",
                where=Budget.place("max_kl"),
                fix=f"allow {_at_least(least)} or more",
            )
        best = max(fitting, key=lambda planned: planned.point.kv_ratio)
        low = max((size for size in sizes if size < best.point.kv_bytes_per_token), default=0.0)
        for _ in range(SEARCHES):
            middle = (low + best.point.kv_bytes_per_token) / 2
            found = (
                planned for planned in self._by_bits(middle * self.context) if _is_within(planned, max_kl, slowest)
            )
            if (first := next(found, None)) is None:
                low = middle
            else:
                best = first
        return best

    def _ask(self, changes: Iterable[Change]) -> None:
        """Asks which layers keep recall with those kinds of changes, and offers these alone."""
        self._offer(self._with_recall(self._probes, changes))

    def _offer(self, probes: Probes) -> None:
        """Makes plans of what these probes found."""
        self._probes = probes
        self.offered = {bits: list(self._offered(whole, probes)) for bits, whole in self.whole.items()}
        self.narrower = {bits: self._narrower(offered, probes) for bits, offered in self.offered.items()}

    def _offered(self, whole: Layers, probes: Probes) -> Iterator[Layers]:
        """What plans are made of: whole caches or windows of one length, all parts or not; or shared caches."""
        removed = probes.removed
        for window in ({}, *probes.windowed):
            layers = self._altered(whole, window)
            yield layers
            if removed:
                yield self._altered(layers, removed)
        if shared := probes.shared:
            # Before it is asked all changes are taken to be possible. Chains of caches are too then; none is measured.
            known = probes.recall.sharing is not None
            sources = {each.source for layer in shared.values() for each in layer} if known else set[int | None]()
            free = {layer: parts for layer, parts in removed.items() if layer not in sources}
            yield self._altered(self._altered(whole, free), shared)

    def _narrower(self, offered: Sequence[Layers], probes: Probes) -> list[Layers]:
        """The same with narrower feed-forward parts too, where that could be worth it."""
        narrowed = probes.narrowed
        return [self._altered(layers, narrowed) for layers in offered if narrowed]

    def _altered(self, layers: Layers, alterations: Alterations) -> Layers:
        return [self._maker.altered(layer, alterations.get(index, ())) for index, layer in enumerate(layers)]

    def _best(self, sizes: Iterable[Groups]) -> Iterator[Planned | None]:
        """The plan of least divergence of each size, of those that `_worth` finds; None where there is none."""
        sizes, ahead = tee(sizes)
        measured = self._measured(self._made(plan) for worth in ahead for plans in worth for plan in plans)
        for worth in sizes:
            found = [min(islice(measured, len(plans)), key=_divergence) for plans in worth]
            is_fast = len(found) == 2 and found[0].point.kl <= FASTER * found[1].point.kl
            yield found[0] if is_fast else min(found, key=_divergence, default=None)

    def _by_bits(self, budget: float) -> Iterator[Planned]:
        """The best plans within a budget, first one in int8, then one in int4."""
        return (min(map(self._planned, plans), key=_divergence) for plans in self._worth(budget))

    def _worth(self, budget: float) -> Groups:
        """The plans within a budget that could be the best of all: first those in int8, then those in int4."""
        return self._that_keep_recall(lambda: self._likely(budget))

    def _that_keep_recall(self, find: Callable[[], Groups]) -> Groups:
        """Some plans, found again once it is asked whether the changes that they have keep recall.

        Before it is asked a change is taken to be possible in all layers, so asking can only make plans with it lose
        more. Where it does, plans with other changes may come in, which are asked of in turn.
        """
        plans = find()
        while changes := self._unasked(chain(*plans)):
            self._ask(changes)
            plans = find()
        return plans

    def _unasked(self, plans: Iterable[Sequence[LayerPlan]]) -> list[Change]:
        """The kinds of changes that plans have and of which it is not known whether they keep recall."""
        kinds = frozenset[str]().union(*map(kind_of, plans))
        return [change for change in self._probes.unasked if change in kinds]

    def _likely_kinds(self, budget: float) -> list[tuple[LayerPlan, ...]]:
        """By kind the plan within a budget that is expected to lose least, where it could be the best of all."""
        likely: dict[frozenset[str], tuple[LayerPlan, ...]] = {}
        filled = (self._all_filled(budget, kinds).values() for kinds in (self.offered, self.narrower))
        for plan in sorted((plan for found in filled for plans in found for plan in plans), key=_expected):
            likely.setdefault(kind_of(plan), plan)
        least = min(map(_expected, likely.values()), default=0.0)
        return [plan for plan in likely.values() if _expected(plan) <= UNSURE * least]

    def _likely(self, budget: float) -> Groups:
        """The plans of `_worth`, whatever is known of recall.

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
        likely = (
            [(way[bits], UNSURE * most) for way, most in zip(ways, least, strict=True) if bits in way] for bits in BITS
        )
        worth = (list(dict.fromkeys(plan for plan, most in plans if _expected(plan) <= most)) for plans in likely)
        return [plans for plans in worth if plans]

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
        return next(self._measured([self._made(layers, how)]))

    def _made(self, layers: Sequence[LayerPlan], how: str = "") -> tuple[Plan, Codes]:
        """Those layers with keys centred where that pays, and their own codes."""
        fitted = [self._fit(layer) for layer in layers]
        plan = self._plan_of(_with_reason(layer, how + layer.reason) for layer, _ in fitted)
        return plan, tuple(code for _, code in fitted)

    def _measured(self, made: Iterable[tuple[Plan, Codes]]) -> Iterator[Planned]:
        """Plans with what they lose, in their order; none is measured twice."""
        plans, ahead = tee(made)
        found = self._new(ahead)
        for plan, _ in plans:
            while plan.layers not in self._divergences:
                layers, self._divergences[layers] = next(found)
            yield Planned(plan, self._point(plan))

    def _new(self, made: Iterable[tuple[Plan, Codes]]) -> Iterator[tuple[tuple[LayerPlan, ...], float]]:
        """The layers of plans that were not measured before, with their divergences."""
        new, ahead = tee(self._unmeasured(made))
        layers = (plan.layers for plan, _ in new)
        return zip(layers, self.divergences(self._shared(plan, own) for plan, own in ahead), strict=False)

    def _shared(self, plan: Plan, own: Codes) -> Codes:
        """The codes of a plan, shared caches among them."""
        give_back()  # codes of all layers and what is computed with them come on top of what is in memory
        return ShareKv().apply(self.spec, self.statistics, plan, own)

    def _unmeasured(self, made: Iterable[tuple[Plan, Codes]]) -> Iterator[tuple[Plan, Codes]]:
        known = set(self._divergences)
        for plan, codes in made:
            if plan.layers not in known:
                known.add(plan.layers)
                yield plan, codes

    def _point(self, plan: Plan) -> PlanPoint:
        """Bytes, time and divergence of a plan that was measured."""
        size = KVLayout.of(self.spec, plan).bytes_at(self.context)
        return PlanPoint(
            cache=next(layer.cache.dtype for layer in plan.layers if layer.has_cache),
            kv_bytes_per_token=size / self.context,
            kv_ratio=self.plain_bytes / size,
            time_ratio=self.time.of_plan(plan.layers) / self.plain_time,
            kl=self._divergences[plan.layers],
        )

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
        "narrowing": any(layer.mlp_width is not None for layer in layers),
        "sharing": any(layer.source is not None for layer in layers),
    }
    return frozenset(name for name, is_done in done.items() if is_done)


def _is_within(planned: Planned, max_kl: float, slowest: float = math.inf) -> bool:
    """Whether a plan keeps a margin to a limit of divergence, and is expected to keep one of time over plain's."""
    return planned.point.kl * MARGIN <= max_kl and planned.point.time_ratio <= slowest


def _at_least(limit: float) -> str:
    """A limit in two digits, rounded up: who allows what is told allows enough."""
    scale = 10 ** (1 - math.floor(math.log10(limit)))
    return f"{math.ceil(limit * scale) / scale:.2g}"


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
