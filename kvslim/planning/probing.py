"""Probing a model: each layer alone, then what keeps recall where several layers are altered together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvslim.contract import ModelSpec
from kvslim.memory import give_back
from kvslim.planning.candidates import Alteration, CandidateMaker
from kvslim.planning.cost import SideCosts, side_costs
from kvslim.planning.decode_time import DecodeTime
from kvslim.planning.narrowing import narrowing
from kvslim.planning.prices import Divergence, Pricing
from kvslim.planning.probes import BITS, CHANGES, Change, LayerProbe, Probes
from kvslim.planning.removals import removals, removals_keeping_recall, spare_layers
from kvslim.planning.sharing import nearest_sources, sharing, sharing_keeping_recall
from kvslim.planning.trials import Pays, PlanTrials
from kvslim.planning.windows import WindowTrials, window_alterations, windows_by_recall
from kvslim.progress import Progress, Silent

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics


@dataclass(frozen=True)
class Prober:
    """Probes a model.

    Attributes:
        spec: The model's shape.
        statistics: What is known of its cache.
        time: Of a token at the target context, at which bytes are counted too.
        divergence: Of the model with codes, on the text that prices come from.
        windows: How windows are tried.
        plans: How removed parts and shared caches are tried.
        timed: Whether time is limited too.
        key: Hash of all that decides what is measured.
    """

    spec: ModelSpec
    statistics: CalibrationStatistics
    time: DecodeTime
    divergence: Divergence
    windows: WindowTrials
    plans: PlanTrials
    timed: bool = False
    key: str = ""

    def probe_layer(self, layer: int) -> Probes:
        """Probes one layer alone."""
        give_back()  # what probes of other layers left behind adds up
        return Probes(key=self.key, context=self.time.context, timed=self.timed, layers=(self._layer(layer),))

    def with_recall(
        self, probes: Probes, changes: Iterable[Change] = CHANGES, progress: Progress | None = None
    ) -> Probes:
        """Probes of all layers, with what keeps recall.

        Args:
            probes: Of all layers.
            changes: The kinds of changes to ask it of.
            progress: Receives the progress.

        Raises:
            UsageError: A layer is not probed.
        """
        probes.check_layers(self.spec.layers)
        removed = {layer.layer: layer.removals for layer in probes.layers}
        shared = {layer.layer: layer.sharing for layer in probes.layers}
        ways: dict[Change, Callable[[], Any]] = {
            "windows": lambda: windows_by_recall(probes.window_losses, self.spec.layers, self.windows),
            "removals": lambda: removals_keeping_recall(removed, self._spare, self.plans),
            "sharing": lambda: sharing_keeping_recall(shared, self._sources, self.plans),
        }
        asked = (progress or Silent()).track(list(changes), "kinds of changes asked for recall")
        kept = probes.recall.model_copy(update={change: ways[change]() for change in asked})
        return probes.model_copy(update={"recall": kept})

    def _layer(self, layer: int) -> LayerProbe:
        costs, base = self._costs[layer], self.plans.base.layers[layer]
        prices = self._pricing.of_layer(layer, costs)
        candidates = {bits: tuple(self._maker.coded(base, costs, prices, bits)) for bits in BITS}

        def pays(alteration: Alteration) -> bool:
            return any(self._maker.pays(whole, alteration) for whole in candidates.values())

        source = self._sources.get(layer)
        return LayerProbe(
            layer=layer,
            prices=prices,
            candidates=candidates,
            windows=window_alterations(layer, self.spec, self.windows, pays, self.time.context),
            removals=self._removals(layer, pays),
            narrowing=narrowing(layer, self.time.width, self.plans, pays) if self.timed else (),
            sharing=None if source is None else sharing(layer, source, self.plans, pays),
        )

    def _removals(self, layer: int, pays: Pays) -> tuple[Alteration, ...]:
        if layer not in self._spare:
            return ()
        return removals(layer, self.spec, self.statistics, self.plans, pays, timed=self.timed)

    @cached_property
    def _maker(self) -> CandidateMaker:
        return CandidateMaker(self.spec, self.plans.base, self.time, self.timed)

    @cached_property
    def _costs(self) -> list[tuple[SideCosts, SideCosts]]:
        return side_costs(self.spec, self.statistics)

    @cached_property
    def _pricing(self) -> Pricing:
        return Pricing.fitted(self.spec, self.statistics, self.divergence)

    @cached_property
    def _spare(self) -> list[int]:
        return spare_layers(self.statistics, timed=self.timed)

    @cached_property
    def _sources(self) -> dict[int, int]:
        return nearest_sources(self.spec, self.statistics, self.plans.base)
