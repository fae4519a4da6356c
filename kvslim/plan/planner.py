"""One budget over all methods: the codes, windows and heads that lose least, measured before any graph is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from kvslim.contract import ModelSpec
from kvslim.errors import GateError
from kvslim.methods.fitting import fit
from kvslim.methods.kv_quant import with_integers
from kvslim.methods.kv_window import KvWindow
from kvslim.methods.share_kv import ShareKv
from kvslim.plan.allocate import allocate, allocate_both
from kvslim.plan.cost import side_costs
from kvslim.plan.decode_time import DecodeTime
from kvslim.plan.donors import sharing
from kvslim.plan.probes import Divergence, prices
from kvslim.plan.removals import removals
from kvslim.plan.trials import PlanTrials, keeping_recall
from kvslim.plan.ways import Change, Way, Ways, words
from kvslim.plan.windows import SINKS, Window, WindowTrials, windowed
from kvslim.transform.edits import LayerEdit
from kvslim.types import KVLayout, LayerPlan, Plan, PlanPoint

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics

RATIOS = (4, 16 / 3, 8, 32 / 3, 16, 64 / 3)  # of the frontier, against the plain fp32 cache
LARGEST_INT8 = 6  # times smaller than plain; beyond, int8 would cost too much rank
FASTER = 1.1  # an int8 cache is read faster than int4: it may lose this much more
MARGIN = 1.25  # other text loses more than calibration text by about so much
SEARCHES = 4
Layers = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class Planned:
    """A plan with what it is expected to lose.

    Attributes:
        plan: What happens to each layer.
        point: Its bytes and its measured divergence on calibration text.
    """

    plan: Plan
    point: PlanPoint


class Trials(NamedTuple):
    """How a model is measured.

    Attributes:
        probe: Divergence of the model with codes, on the text that prices come from.
        judge: The same on other calibration text, which plans are compared on.
        windows: How windows are tried.
        plans: How removed parts and shared caches are tried.
    """

    probe: Divergence
    judge: Divergence
    windows: WindowTrials
    plans: PlanTrials


class Planner:
    """Searches plans for a model.

    Args:
        spec: The model's shape.
        statistics: What is known of its cache.
        time: Of a token at the target context, at which bytes are counted too.
        trials: How the model is measured.
        layers: Wraps the iterable of probed layers, to show progress.
        time_ratio: Time of a token over the plain model's, which every plan keeps; None for no limit.
    """

    def __init__(
        self,
        spec: ModelSpec,
        statistics: CalibrationStatistics,
        time: DecodeTime,
        trials: Trials,
        layers: Layers,
        time_ratio: float | None = None,
    ) -> None:
        base = trials.plans.base
        self.spec, self.statistics, self.base, self.judge = spec, statistics, base, trials.judge
        self.time, self.context, self.time_ratio = time, time.context, time_ratio
        self.plain_bytes = KVLayout.of(spec, base).bytes_at(self.context)
        self.plain_time = time.of_plan(base.layers)
        self.made = Ways(spec, base, self.context, time.of_layer, timed=time_ratio is not None)
        costs = side_costs(spec, statistics)
        priced = prices(spec, statistics, costs, trials.probe, layers)
        self.whole = {
            bits: [self.made.coded(*layer, bits) for layer in zip(base.layers, costs, priced, strict=True)]
            for bits in (8, 4)
        }
        windows = [_windowed(window) for window in self._windows(layers, trials.windows)]
        tried = spec, statistics, trials.plans, self._pays, layers
        removed, shared = removals(*tried, timed=time_ratio is not None), sharing(*tried)
        self.ways = {bits: list(self._offered(whole, windows, removed, shared)) for bits, whole in self.whole.items()}
        self._fitted: dict[LayerPlan, tuple[LayerPlan, LayerEdit]] = {}
        self._divergences: dict[tuple[LayerPlan, ...], float] = {}

    @property
    def least_time_ratio(self) -> float:
        """Time of a token over the plain model's that no plan falls below."""
        kinds = (ways for kinds in self.ways.values() for ways in kinds)
        least = min(sum(min(option.time for option, _ in layer) for layer in ways) for ways in kinds)
        return (least + self.time.of_plan(())) / self.plain_time

    def frontier(self) -> list[Planned]:
        """The best plan found at each of a row of sizes, the largest first."""
        found = [self.allocated(self.plain_bytes / ratio) for ratio in RATIOS]
        return [planned for planned in found if planned is not None]

    def allocated(self, budget: float) -> Planned | None:
        """The plan of least divergence within a budget in bytes at the target context; None if none fits."""
        kinds = (8, 4) if budget * LARGEST_INT8 >= self.plain_bytes else (4,)
        found = [planned for bits in kinds if (planned := self._allocated(budget, bits)) is not None]
        if len(found) == 2 and found[0].point.kl <= FASTER * found[1].point.kl:
            return found[0]
        return min(found, key=_divergence, default=None)

    def never_worse(self, planned: Planned) -> Planned:
        """The plan, or all layers alike at no more bytes, where that loses less."""
        ways, budget = self.whole[4], planned.point.kv_bytes_per_token * self.context
        sizes = range(min(len(layer) for layer in ways))
        fitting = [place for place in sizes if self._keeps([layer[place] for layer in ways], budget)]
        if not fitting:
            return planned
        uniform = self._planned([layer[fitting[-1]][1] for layer in ways], "uniform, which loses less here; ")
        return min(planned, uniform, key=_divergence)

    def smallest(self, max_kl: float, frontier: list[Planned]) -> Planned:
        """The smallest plan whose divergence keeps a margin to a limit.

        Raises:
            GateError: Even the best plan of the frontier exceeds it.
        """
        sizes = [planned.point.kv_bytes_per_token for planned in frontier]
        fitting = [planned for planned in frontier if planned.point.kl * MARGIN <= max_kl]
        if not fitting:
            least = MARGIN * min(map(_divergence, frontier), default=math.nan)
            raise GateError(
                f"no plan is sure to keep KL within {max_kl:g}", where="max_kl", fix=f"allow {least:.2g} or more"
            )
        best = fitting[-1]
        low = max((size for size in sizes if size < best.point.kv_bytes_per_token), default=0.0)
        for _ in range(SEARCHES):
            middle = (low + best.point.kv_bytes_per_token) / 2
            tried = self.allocated(middle * self.context)
            if tried is None or tried.point.kl * MARGIN > max_kl:
                low = middle
            else:
                best = tried
        return best

    def _windows(self, layers: Layers, trials: WindowTrials) -> list[Window]:
        """The windows that layers may have; in one plan all are of one length, as onnxruntime-genai needs it."""
        offered: list[Window] = []
        refused: set[int] = set()
        for length in trials.lengths(self.context):
            losses: dict[int, float] = {}
            for layer in layers(KvWindow(window=length).able(self.spec)):
                loss = trials.loss(layer, length, self.spec.layers, self.context)
                if layer not in refused and self._pays(layer, _window_of(length, loss)):
                    losses[layer] = loss
            drops = partial(_recall_drop, trials, length, self.spec.layers)
            kept = keeping_recall(sorted(losses, key=losses.__getitem__), drops)
            refused |= losses.keys() - kept
            if kept:
                offered.append(Window(length, {layer: losses[layer] for layer in kept}))
        return offered

    def _pays(self, layer: int, change: Change) -> bool:
        """Whether a change could be part of a plan."""
        return any(self.made.pays(ways[layer], change) for ways in self.whole.values())

    def _offered(
        self,
        whole: list[list[Way]],
        windows: list[dict[int, list[Change]]],
        removed: dict[int, list[Change]],
        shared: dict[int, Change],
    ) -> Iterator[list[list[Way]]]:
        """What plans are made of: whole caches or windows of one length, all parts or not; or shared caches."""
        for window in ({}, *windows):
            ways = self._changed(whole, window)
            yield ways
            if removed:
                yield self._changed(ways, removed)
        if shared:
            donors = {change.update["donor"] for change in shared.values()}
            free = {layer: changes for layer, changes in removed.items() if layer not in donors}
            yield self._changed(self._changed(whole, free), {layer: [change] for layer, change in shared.items()})

    def _changed(self, ways: list[list[Way]], changes: dict[int, list[Change]]) -> list[list[Way]]:
        return [self.made.changed(layer, changes.get(index, ())) for index, layer in enumerate(ways)]

    def _allocated(self, budget: float, bits: int) -> Planned | None:
        """The best of the plans within a budget that are made of each kind of ways."""
        found = {layers: None for ways in self.ways[bits] if (layers := self._filled(budget, ways))}
        return min(map(self._planned, found), key=_divergence, default=None)

    def _filled(self, budget: float, ways: list[list[Way]]) -> tuple[LayerPlan, ...] | None:
        """The best way to keep each layer within a budget; None if none fits."""
        offered = [[option for option, _ in layer] for layer in ways]
        limit = self._time_limit
        options = allocate(offered, budget) if limit is None else allocate_both(offered, budget, limit)
        filled = tuple(layer[option.name][1] for layer, option in zip(ways, options or (), strict=False))
        return filled if any(layer.has_cache for layer in filled) else None

    def _keeps(self, ways: Sequence[Way], budget: float) -> bool:
        """Whether those ways keep the limits of bytes and time."""
        options = [option for option, _ in ways]
        in_time = self._time_limit is None or sum(option.time for option in options) <= self._time_limit
        return in_time and sum(option.size for option in options) <= budget

    @property
    def _time_limit(self) -> float | None:
        """Time that all layers may take together."""
        return None if self.time_ratio is None else self.time_ratio * self.plain_time - self.time.of_plan(())

    def _planned(self, layers: Sequence[LayerPlan], how: str = "") -> Planned:
        """Those layers with keys centred where that pays, measured."""
        fitted = [self._fit(layer) for layer in layers]
        told = tuple(layer.model_copy(update={"reason": how + layer.reason}) for layer, _ in fitted)
        plan = self.base.model_copy(update={"layers": told})
        if plan.layers not in self._divergences:
            codes = ShareKv().apply(self.spec, self.statistics, plan, tuple(code for _, code in fitted))
            self._divergences[plan.layers] = self.judge(codes)
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
            told = layer.model_copy(update={"reason": words(layer, self.spec)})
            final = self.base.model_copy(update={"layers": (told,)})
            if layer.has_cache:
                final = with_integers(self.spec, self.statistics, final, {}, True)
            own = LayerEdit() if layer.source is not None else fit(self.spec, self.statistics, final)[0]
            self._fitted[layer] = final.layers[0], own
        return self._fitted[layer]


def _recall_drop(trials: WindowTrials, length: int, layers: int, some: Sequence[int]) -> float:
    return trials.recall_drop(windowed(some, length, layers))


def _window_of(length: int, loss: float) -> Change:
    return Change({"window": length, "sinks": SINKS}, loss)


def _windowed(window: Window) -> dict[int, list[Change]]:
    return {layer: [_window_of(window.length, loss)] for layer, loss in window.losses.items()}


def _divergence(planned: Planned) -> float:
    return planned.point.kl
