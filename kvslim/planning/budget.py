"""A planner of a model in memory, and its choice for a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from kvslim.calibrate import cache
from kvslim.methods.fitting import fit
from kvslim.planning.candidates import SINKS
from kvslim.planning.choose import Chosen, choose
from kvslim.planning.decode_time import DecodeTime
from kvslim.planning.planner import Planned, Planner
from kvslim.planning.probes import FORMAT as PROBES_FORMAT
from kvslim.planning.probes import Change, Probes
from kvslim.planning.probing import Prober
from kvslim.planning.trials import PlanTrials
from kvslim.planning.windows import SHARES, WindowTrials
from kvslim.settings import Budget, Heal
from kvslim.transform.kl_evaluator import is_large
from kvslim.transform.surgery import layer_modules

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics
    from kvslim.prepared.decoder import PreparedDecoder
    from kvslim.prepared.decoder_trials import DecoderTrials


def choose_within(budget: Budget, trials: DecoderTrials) -> Chosen:
    """The planner's choice for a budget.

    Raises:
        GateError: No plan found meets all limits.
    """
    found = planner_of(trials, budget.context, budget.time_ratio)
    recall_drop = lambda planned: trials.more_recall.drop(trials.codes(planned.plan))  # noqa: E731
    recipe = trials.prepared.recipe
    healed = None if recipe.heal is None else partial(_healed, trials, recipe.heal)
    return choose(found, budget, recall_drop, trials.progress, recipe.gates.max_recall_drop, healed)


def _healed(trials: DecoderTrials, settings: Heal, planned: Planned) -> tuple[Planned, float]:
    plan, kl = trials.healed(planned.plan, settings)
    return Planned(plan, planned.point), kl


def planner_of(trials: DecoderTrials, context: int | None = None, time_ratio: float | None = None) -> Planner:
    """A planner of what was probed; bytes and time count at a context, by default the target."""
    context = context or trials.prepared.context
    timed = time_ratio is not None
    prober = _prober(trials, context, probes_key(trials, context, timed=timed), timed=timed)

    def with_recall(probes: Probes, changes: Iterable[Change]) -> Probes:
        probes = prober.with_recall(probes, changes, trials.progress)
        cache.store_probes(probes)
        return probes

    known = trials.spec, trials.statistics, trials.identity, prober.time
    return Planner(*known, _probes_of(trials, prober), with_recall, trials.losses, time_ratio)


def _probes_of(trials: DecoderTrials, prober: Prober) -> Probes:
    """What was measured of the layers, from the disk when they were probed before."""
    probes = cache.load_probes(prober.key, Probes)
    if probes is None:
        prepared, task = trials.prepared, LayerProbing(trials.statistics, prober.time.context, prober.key, prober.timed)
        parts = prepared.workers.map(prepared, task, range(trials.spec.layers), prober.probe_layer)
        probes = Probes.merge(*trials.progress.track(parts, "layers probed", trials.spec.layers))
        cache.store_probes(probes)
    return probes


@dataclass(frozen=True)
class LayerProbing:
    """The probing of one layer after another.

    Attributes:
        statistics: What is known of the model's cache.
        context: Target context in tokens.
        key: What the probes are stored under.
        timed: Whether time is limited too.
    """

    statistics: CalibrationStatistics
    context: int
    key: str
    timed: bool

    def open(self, prepared: PreparedDecoder) -> Callable[[int], Probes]:
        """What probes a layer."""
        vars(prepared)["statistics"] = self.statistics
        return _prober(prepared.trials(), self.context, self.key, timed=self.timed).probe_layer


def probes_key(trials: DecoderTrials, context: int, *, timed: bool) -> str:
    """Hash of all that decides what probes measure; of a budget only its context and whether it limits time."""
    recipe, asked = trials.prepared.recipe, {"seed", "recall_items", "recall_distance"}
    made = trials.prepared.weights_like, recipe.layout, recipe.window_cache, recipe.validation.model_dump(include=asked)
    of = trials.prepared.digest, trials.statistics.digest(), trials.held_out.length, context, timed
    return cache.content_key("probes", PROBES_FORMAT, *of, *made)


def _prober(trials: DecoderTrials, context: int, key: str, *, timed: bool) -> Prober:
    spec, statistics = trials.spec, trials.statistics
    reach = max(item.reach for item in trials.far_items)
    windows = WindowTrials(
        min(trials.held_out.length, 2 * (reach - SINKS)),
        trials.held_out.kl,
        trials.far_recall.shifts,
        trials.far_recall.drop,
        1 if is_large(trials.model) else len(SHARES),
    )
    return Prober(
        spec,
        statistics,
        decode_time(trials.prepared, context),
        lambda codes: trials.probe.kl(codes),  # its text passes through the model when it is first asked, if ever
        windows,
        PlanTrials(
            trials.identity,
            lambda plan: trials.probe.kl(fit(spec, statistics, plan)),
            lambda plan: trials.recall.drop(fit(spec, statistics, plan)),
        ),
        timed,
        key,
    )


def decode_time(prepared: PreparedDecoder, context: int) -> DecodeTime:
    """What a token costs after so many others."""
    spec, architecture = prepared.spec, prepared.architecture
    layers = layer_modules(prepared.model, architecture)
    attention = tuple(_matrix_numbers(layer.get_submodule(architecture.attention)) for layer in layers)
    others = tuple(_matrix_numbers(layer) - own for layer, own in zip(layers, attention, strict=True))
    head = spec.vocab_size * spec.hidden_size
    down: Any = layers[0].get_submodule(architecture.down)
    width = down.weight.shape[1]
    return DecodeTime(spec, context, prepared.weights_like, attention, others, head, width)


def _matrix_numbers(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)
