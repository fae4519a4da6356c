"""A planner of a tiny model, told what windows, removed parts and shared caches lose."""

from __future__ import annotations

from collections.abc import Callable

from kvslim.calibrate.statistics import CalibrationStatistics
from kvslim.plan.planner import Planner, Trials
from kvslim.plan.trials import PlanTrials
from kvslim.plan.windows import WindowTrials
from kvslim.transform.edits import LayerEdit
from kvslim.transform.judge import Judge
from kvslim.types import Plan
from kvslim.workshop import Workshop

Codes = tuple[LayerEdit, ...]


def nothing(_: object) -> float:
    return 0.0


def much(_: object) -> float:
    return 1e9


def planner_of(
    workshop: Workshop,
    statistics: CalibrationStatistics,
    *,
    context: int = 2048,
    windows: tuple[Callable[[Codes], float], Callable[[Codes], float]] | None = None,
    plans: tuple[Callable[[Plan], float], Callable[[Plan], float]] = (much, nothing),
    time_ratio: float | None = None,
) -> Planner:
    """A planner at a target context.

    Args:
        workshop: Of the model.
        statistics: What is known of its cache.
        context: Target context in tokens.
        windows: Divergence and lost recall by windows; None if none is offered.
        plans: The same by removed parts and shared caches.
        time_ratio: Limit of time.
    """
    judge = Judge(workshop.model, workshop.architecture, statistics.windows)
    trials = Trials(
        judge.kl,
        judge.kl,
        WindowTrials(context if windows else 0, *(windows or (much, nothing))),
        PlanTrials(Plan.identity(workshop.spec), *plans),
    )
    return Planner(workshop.spec, statistics, workshop.decode_time(context), trials, iter, time_ratio)
