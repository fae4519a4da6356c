"""From a budget to one plan: the limits that a user gives, and the plans that meet them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvslim.errors import GateError
from kvslim.kv_ratios import smaller
from kvslim.planning.planner import MARGIN, Planned, Planner
from kvslim.progress import Progress
from kvslim.recipe import Budget
from kvslim.types import PlanPoint

MIB = 2**20


class Chosen(NamedTuple):
    """A plan with what it was chosen among.

    Attributes:
        planned: The plan and its point.
        frontier: Points of other sizes, the largest first.
    """

    planned: Planned
    frontier: tuple[PlanPoint, ...]


def choose(
    planner: Planner, budget: Budget, recall_drop: Callable[[Planned], float], progress: Progress | None = None
) -> Chosen:
    """The plan that loses least within bytes and time, or without a limit of bytes the smallest that loses no more.

    Args:
        planner: Finds and measures plans.
        budget: The limits.
        recall_drop: Share of recall that a plan loses.
        progress: Receives the progress.

    Raises:
        GateError: No plan found meets all limits.
    """
    _check_time(planner)
    frontier = planner.frontier(progress)
    limit = budget.bytes_limit(planner.plain_bytes)
    if limit is None and budget.max_kl is None and budget.max_recall_drop is None:
        limit = planner.plain_bytes
    if limit is not None:
        chosen = _within_bytes(planner, budget, frontier, limit)
        if budget.max_recall_drop is not None:
            chosen = _with_recall(chosen, recall_drop)
            _check_recall(chosen, budget.max_recall_drop)
    else:
        chosen = _within_quality(planner, budget, frontier, recall_drop)
    return Chosen(chosen, tuple(planned.point for planned in frontier))


def _check_time(planner: Planner) -> None:
    if planner.time_ratio is not None and planner.time_ratio < planner.least_time_ratio:
        raise GateError(
            f"no plan takes {planner.time_ratio:g} of plain's time per token at {planner.context:,} tokens",
            where="budget.time_ratio",
            fix=f"ask for {planner.least_time_ratio + 0.005:.2f} or more",
        )


def _within_bytes(planner: Planner, budget: Budget, frontier: list[Planned], limit: float) -> Planned:
    planned = planner.allocated(limit)
    if planned is None:
        least = frontier[-1].point.kv_ratio if frontier else 1.0
        raise GateError(
            f"no plan fits into {limit / MIB:.3g} MiB at {planner.context:,} tokens",
            where="budget",
            fix=f"ask for a smaller ratio, such as {least:.3g}",
        )
    planned = planner.never_worse(planned)
    if budget.max_kl is not None and planned.point.kl > MARGIN * budget.max_kl:
        within = [other.point.kv_ratio for other in frontier if other.point.kl * MARGIN <= budget.max_kl]
        raise GateError(
            f"KL is about {planned.point.kl:.2g}, not {budget.max_kl:g}, in {_size(planned)}",
            where="budget.max_kl",
            fix=f"ask for a ratio of {within[-1]:.3g}, or allow more" if within else "allow more",
        )
    return planned


def _within_quality(
    planner: Planner, budget: Budget, frontier: list[Planned], recall_drop: Callable[[Planned], float]
) -> Planned:
    chosen = frontier[-1] if budget.max_kl is None else planner.smallest(budget.max_kl, frontier)
    chosen = planner.never_worse(chosen)
    if budget.max_recall_drop is None:
        return chosen
    larger = [other for other in frontier if other.point.kv_ratio < chosen.point.kv_ratio]
    for planned in [chosen, *reversed(larger)]:
        measured = _with_recall(planned, recall_drop)
        if (measured.point.recall_drop or 0.0) <= budget.max_recall_drop:
            return measured
    _check_recall(measured, budget.max_recall_drop)
    return measured


def _with_recall(planned: Planned, recall_drop: Callable[[Planned], float]) -> Planned:
    """The plan with the recall that it loses in its point."""
    return Planned(planned.plan, planned.point.model_copy(update={"recall_drop": recall_drop(planned)}))


def _check_recall(planned: Planned, limit: float) -> None:
    if (planned.point.recall_drop or 0.0) > limit:
        raise GateError(
            f"recall drops by {planned.point.recall_drop:.1%} in {_size(planned)}",
            where="budget.max_recall_drop",
            fix="ask for a smaller ratio, or allow more",
        )


def _size(planned: Planned) -> str:
    """How many times smaller the cache of a plan is."""
    return f"a cache {smaller(1.0, planned.point.kv_ratio)}"
