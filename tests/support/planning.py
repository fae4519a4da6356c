"""A planner of a tiny model, with what windows, removed parts and shared caches lose made up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from kvslim.calibrate.statistics import CalibrationStatistics
from kvslim.planning.budget import decode_time
from kvslim.planning.planner import Planner
from kvslim.planning.probes import Change, Probes
from kvslim.planning.probing import Prober
from kvslim.planning.trials import PlanTrials
from kvslim.planning.windows import WindowTrials
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.transform.edits import Codes
from kvslim.transform.kl_evaluator import KLEvaluator
from kvslim.types import Plan


def nothing(_: object) -> float:
    return 0.0


def much(_: object) -> float:
    return 1e9


def alike(_: object, layers: Sequence[int]) -> dict[int, float]:
    return dict.fromkeys(layers, 0.0)


def prober_of(
    prepared: PreparedDecoder,
    statistics: CalibrationStatistics,
    *,
    context: int = 2048,
    divergence: Callable[[Codes], float] | None = None,
    windows: tuple[Callable[[Codes], float], Callable[[Codes], float]] | None = None,
    plans: tuple[Callable[[Plan], float], Callable[[Plan], float]] = (much, nothing),
    timed: bool = False,
    key: str = "",
) -> Prober:
    """What probes a tiny model at a target context.

    Args:
        prepared: Of the model.
        statistics: What is known of its cache.
        context: Target context in tokens.
        divergence: Of the model with codes; None to measure it.
        windows: Divergence and lost recall by windows; None if none is offered.
        plans: The same by removed parts and shared caches.
        timed: Whether time is limited too.
        key: What the probes are stored under.
    """
    measured = divergence or evaluator_of(prepared, statistics).kl
    lost, forgotten = windows or (much, nothing)
    return Prober(
        prepared.spec,
        statistics,
        decode_time(prepared, context),
        measured,
        WindowTrials(context if windows else 0, lost, alike, forgotten),
        PlanTrials(Plan.identity(prepared.spec), *plans),
        timed,
        key,
    )


def probed(prober: Prober) -> Probes:
    """All layers, and what keeps recall."""
    return prober.with_recall(Probes.merge(*map(prober.probe_layer, range(prober.spec.layers))))


def evaluator_of(prepared: PreparedDecoder, statistics: CalibrationStatistics) -> KLEvaluator:
    return KLEvaluator(prepared.model, prepared.architecture, statistics.windows)


def planner_of(
    prepared: PreparedDecoder,
    statistics: CalibrationStatistics,
    *,
    context: int = 2048,
    windows: tuple[Callable[[Codes], float], Callable[[Codes], float]] | None = None,
    plans: tuple[Callable[[Plan], float], Callable[[Plan], float]] = (much, nothing),
    time_ratio: float | None = None,
) -> Planner:
    """A planner at a target context; arguments as of `prober_of`, and the limit of time."""
    timed = time_ratio is not None
    prober = prober_of(prepared, statistics, context=context, windows=windows, plans=plans, timed=timed)
    return planner_with(prepared, statistics, probed(prober), time_ratio)


def planner_with(
    prepared: PreparedDecoder, statistics: CalibrationStatistics, probes: Probes, time_ratio: float | None = None
) -> Planner:
    """A planner of probes at their context, of which it is known what keeps recall."""
    time, evaluator = decode_time(prepared, probes.context), evaluator_of(prepared, statistics)
    divergences = partial(map, evaluator.kl)
    identity = Plan.identity(prepared.spec)
    return Planner(prepared.spec, statistics, identity, time, probes, unasked, divergences, time_ratio)


def unasked(_: Probes, changes: Iterable[Change]) -> Probes:
    raise AssertionError(f"it is known which layers keep recall with {changes}")
