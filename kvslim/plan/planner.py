"""One budget over all methods: the ranks, bits and refinements that lose least, measured before any graph is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvslim.errors import GateError
from kvslim.methods.fitting import fit
from kvslim.methods.kv_pca import rank_step
from kvslim.methods.kv_quant import with_integers
from kvslim.methods.kv_window import KvWindow
from kvslim.plan.allocate import Option, allocate, hull
from kvslim.plan.cost import STEP, SideCosts, bundled, choices, side_costs
from kvslim.plan.probes import Divergence, Price, prices
from kvslim.plan.windows import SINKS, Window, WindowTrials, keeping_recall
from kvslim.transform.codes import LayerCodes
from kvslim.types import KVLayout, LayerPlan, ModelSpec, Plan, PlanPoint

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics

RATIOS = (4, 16 / 3, 8, 32 / 3, 16, 64 / 3)  # of the frontier, against the plain fp32 cache
LARGEST_INT8 = 6  # times smaller than plain; beyond, int8 would cost too much rank
FASTER = 1.1  # an int8 cache is read faster than int4: it may lose this much more
MARGIN = 1.25  # other text loses more than calibration text by about so much
SEARCHES = 4
Layers = Callable[[Iterable[int]], Iterable[int]]
Way = tuple[Option, LayerPlan]


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
    """Searches plans for a model.

    Args:
        spec: The model's shape.
        statistics: What is known of its cache.
        base: The plan that changes nothing.
        context: Target context in tokens, at which bytes are counted.
        probe: Divergence of the model with the codes given, on the text that prices come from.
        judge: The same on other calibration text, which plans are compared on.
        layers: Wraps the iterable of probed layers, to show progress.
        trials: How windows are tried.
    """

    def __init__(
        self,
        spec: ModelSpec,
        statistics: CalibrationStatistics,
        base: Plan,
        context: int,
        probe: Divergence,
        judge: Divergence,
        layers: Layers,
        trials: WindowTrials,
    ) -> None:
        self.spec, self.statistics, self.base, self.context, self.judge = spec, statistics, base, context, judge
        self.plain_bytes = KVLayout.of(spec, base).bytes_at(context)
        costs = side_costs(spec, statistics)
        priced = prices(spec, statistics, costs, probe, layers)
        whole = self.whole = {
            bits: [self._ways(*layer, bits) for layer in zip(base.layers, costs, priced, strict=True)]
            for bits in (8, 4)
        }
        windows = self._windows(layers, trials)
        self.ways = {bits: [ways, *(self._with(ways, window) for window in windows)] for bits, ways in whole.items()}
        self._fitted: dict[LayerPlan, tuple[LayerPlan, LayerCodes]] = {}
        self._divergences: dict[tuple[LayerPlan, ...], float] = {}

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
        fitting = [place for place in sizes if sum(layer[place][0].size for layer in ways) <= budget]
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

    def _ways(
        self, layer: LayerPlan, costs: tuple[SideCosts, SideCosts], priced: tuple[Price, Price], bits: int
    ) -> list[Way]:
        """The best way to store a layer in each size, with what it is expected to lose."""
        window = self.spec.windows[layer.layer]
        ways: list[Way] = []
        for width in range(rank_step(window), (2 if bits == 4 else 1) * self.spec.head_dim + 1, STEP):
            possible = list(choices(self.spec, window, width, bits))
            if not possible:
                continue
            (key_loss, key), (value_loss, value) = (
                min((price.of(cost.cost(choice, bits)), choice) for choice in possible)
                for price, cost in zip(priced, costs, strict=True)
            )
            stored = bundled(layer, key, value, bits).model_copy(update={"score": key_loss + value_loss})
            ways.append((Option(self._bytes(stored), key_loss + value_loss, len(ways)), stored))
        return ways

    def _windows(self, layers: Layers, trials: WindowTrials) -> list[Window]:
        """The windows that layers may have; in one plan all are of one length, as onnxruntime-genai needs it."""
        offered: list[Window] = []
        refused: set[int] = set()
        for length in trials.lengths(self.context):
            losses: dict[int, float] = {}
            for layer in layers(KvWindow(window=length).able(self.spec)):
                loss = trials.loss(layer, length, self.spec.layers, self.context)
                if layer not in refused and self._pays(layer, Window(length, {layer: loss})):
                    losses[layer] = loss
            kept = keeping_recall(sorted(losses, key=losses.__getitem__), length, self.spec.layers, trials.recall_drop)
            refused |= losses.keys() - kept
            if kept:
                offered.append(Window(length, {layer: losses[layer] for layer in kept}))
        return offered

    def _pays(self, layer: int, window: Window) -> bool:
        """Whether a window is the best choice of a layer at any price per byte, and loses less than the least rank."""
        for ways in self.whole.values():
            both = [option for option, _ in self._with(ways, window)[layer]]
            whole = both[: len(ways[layer])]
            most = max(option.loss for option in whole)
            if any(option.name >= len(whole) and option.loss < most for option in hull(both)):
                return True
        return False

    def _with(self, ways: list[list[Way]], window: Window) -> list[list[Way]]:
        """Ways to store each layer, and behind them the same with a window."""
        found = [list(layer) for layer in ways]
        for index, more in window.losses.items():
            for option, layer in ways[index]:
                loss = option.loss + more
                update = {"window": window.length, "sinks": SINKS, "score": loss}
                stored = layer.model_copy(update=update)
                found[index].append((Option(self._bytes(stored), loss, len(found[index])), stored))
        return found

    def _bytes(self, layer: LayerPlan) -> int:
        """What one layer takes at the target context."""
        tensors = KVLayout.of(self.spec, self.base.model_copy(update={"layers": (layer,)})).tensors
        return sum(tensor.bytes_per_token * tensor.rows(self.context) for tensor in tensors)

    def _allocated(self, budget: float, bits: int) -> Planned | None:
        """The best plan without windows or with windows of any one length."""
        found = {layers: None for ways in self.ways[bits] if (layers := _filled(budget, ways))}
        return min(map(self._planned, found), key=_divergence, default=None)

    def _planned(self, layers: Sequence[LayerPlan], how: str = "") -> Planned:
        """Those layers with keys centred where that pays, measured."""
        fitted = [self._fit(layer) for layer in layers]
        told = tuple(layer.model_copy(update={"reason": how + layer.reason}) for layer, _ in fitted)
        plan = self.base.model_copy(update={"layers": told})
        if plan.layers not in self._divergences:
            self._divergences[plan.layers] = self.judge(tuple(code for _, code in fitted))
        size = KVLayout.of(self.spec, plan).bytes_at(self.context)
        point = PlanPoint(
            cache=plan.layers[0].cache,
            kv_bytes_per_token=size / self.context,
            kv_ratio=self.plain_bytes / size,
            kl=self._divergences[plan.layers],
        )
        return Planned(plan, point)

    def _fit(self, layer: LayerPlan) -> tuple[LayerPlan, LayerCodes]:
        """A layer's final plan and its codes, fitted once."""
        if layer not in self._fitted:
            alone = self.base.model_copy(
                update={"layers": (layer.model_copy(update={"reason": _words(layer, self.spec)}),)}
            )
            final = with_integers(self.spec, self.statistics, alone, {}, True)
            self._fitted[layer] = final.layers[0], fit(self.spec, self.statistics, final)[0]
        return self._fitted[layer]


def _filled(budget: float, ways: list[list[Way]]) -> tuple[LayerPlan, ...] | None:
    """The best way to store each layer within a budget; None if none fits."""
    options = allocate([[option for option, _ in layer] for layer in ways], budget)
    if options is None:
        return None
    return tuple(layer[option.name][1] for layer, option in zip(ways, options, strict=True))


def _divergence(planned: Planned) -> float:
    return planned.point.kl


def _words(layer: LayerPlan, spec: ModelSpec) -> str:
    key, value = layer.ranks(spec.head_dim)
    ranks = f"rank {key}" if key == value else f"ranks {key} and {value}"
    refined = ", {} and {} of them refined".format(*layer.twice) if any(layer.twice) else ""
    window = "" if layer.window is None else f", of {layer.sinks} sinks and {layer.window} recent tokens"
    return f"{ranks} of {spec.head_dim}{refined}{window}, expected to cost {layer.score:.1e} nats"
