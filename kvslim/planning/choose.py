"""From a budget to one plan: the limits that a user gives, and the plans that meet them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import chain
from typing import NamedTuple

from kvslim.contract import MIB
from kvslim.errors import GateError
from kvslim.kv_ratios import rounded_down, smaller
from kvslim.planning.healed import LOOSER, Healed, least_healed, smallest_healed
from kvslim.planning.planner import Planned, Planner
from kvslim.progress import Progress, Silent
from kvslim.settings import MARGIN, Budget
from kvslim.types import PlanPoint

FORGETTING = 1, 4 / 5, 2 / 3  # shares of the layers that windows are tried in where recall is lost anyway


class Chosen(NamedTuple):
    """A plan with what it was chosen among.

    Attributes:
        planned: The plan and its point.
        frontier: Points of it and of other sizes, the largest first.
    """

    planned: Planned
    frontier: tuple[PlanPoint, ...]


def choose(
    planner: Planner,
    budget: Budget,
    recall_drop: Callable[[Planned], float],
    progress: Progress | None = None,
    recall_gate: float | None = None,
    healed: Healed | None = None,
) -> Chosen:
    """The plan that loses least within bytes and time, or without a limit of bytes the smallest that loses no more.

    Args:
        planner: Finds and measures plans.
        budget: The limits.
        recall_drop: Share of recall that a plan loses.
        progress: Receives the progress.
        recall_gate: The share that the artifact may lose. Within bytes it limits no plan, but recall is measured at
            larger sizes too, up to one that keeps to it.
        healed: Trains a plan for a while; plans are then judged by what they lose behind that.

    Raises:
        GateError: No plan found meets all limits.
    """
    check_time(planner)
    limit = budget.bytes_limit(planner.plain_bytes)
    if limit is None and budget.max_kl is None and budget.max_recall_drop is None:
        limit = planner.plain_bytes
    most = budget.max_kl if budget.max_kl is None or healed is None else LOOSER[0] * budget.max_kl
    frontier = planner.frontier(progress, partial(_is_beyond, planner, limit, most))
    asked = recall_gate if budget.max_recall_drop is None else budget.max_recall_drop
    drop = cache(recall_drop)
    if limit is None:
        chosen = _smallest(planner, budget, frontier, healed)
    else:
        chosen, kl = _within_bytes(planner, budget, frontier, limit, healed)
        if asked is not None and drop(chosen) > asked:
            chosen, kl = _least_lost(planner, chosen, kl, limit, drop, healed, progress or Silent())
        _check_kl(planner, budget, frontier, chosen, kl)
    recalled = [] if asked is None else _recalled(_upwards(chosen, frontier), asked, drop)
    if recalled:
        chosen = recalled[-1] if limit is None else recalled[0]
    if budget.max_recall_drop is not None:
        _check_recall(chosen, budget.max_recall_drop)
    return Chosen(chosen, _points([chosen, *recalled, *frontier]))


def _is_beyond(planner: Planner, limit: float | None, max_kl: float | None, planned: Planned) -> bool:
    """Whether a plan is smaller than what is asked for, or loses more: each size takes time, and none is needed."""
    if limit is not None:
        return planned.point.kv_bytes_per_token * planner.context < limit
    return max_kl is not None and planned.point.kl * MARGIN > max_kl


def _upwards(chosen: Planned, frontier: list[Planned]) -> list[Planned]:
    """A plan and the larger ones, the smallest first."""
    larger = [other for other in frontier if other.point.kv_ratio < chosen.point.kv_ratio]
    return [chosen, *reversed(larger)]


def _recalled(plans: Iterable[Planned], limit: float, recall_drop: Callable[[Planned], float]) -> list[Planned]:
    """Plans with the recall that they lose in their points, up to the first that loses no more than a limit."""
    found: list[Planned] = []
    for planned in plans:
        found.append(Planned(planned.plan, planned.point.model_copy(update={"recall_drop": recall_drop(planned)})))
        if (found[-1].point.recall_drop or 0.0) <= limit:
            break
    return found


def _points(plans: Iterable[Planned]) -> tuple[PlanPoint, ...]:
    """The points of plans, the largest first; of those of one size the first."""
    points: dict[float, PlanPoint] = {}
    for planned in plans:
        points.setdefault(planned.point.kv_bytes_per_token, planned.point)
    return tuple(sorted(points.values(), key=lambda point: -point.kv_bytes_per_token))


def check_time(planner: Planner) -> None:
    """Refuses a limit of time that no plan keeps.

    Raises:
        GateError: Naming one that can be kept.
    """
    if planner.time_ratio is not None and planner.time_ratio < planner.least_time_ratio:
        raise GateError(
            f"no plan takes {planner.time_ratio:g} of plain's time per token at {planner.context:,} tokens",
            where=Budget.place("time_ratio"),
            fix=f"ask for {planner.least_time_ratio + 0.005:.2f} or more",
        )


def _within_bytes(
    planner: Planner, budget: Budget, frontier: list[Planned], limit: float, healed: Healed | None
) -> tuple[Planned, float]:
    """The plan of least divergence, and what that is once it is healed."""
    planned = planner.allocated(limit)
    if planned is None:
        least = frontier[-1].point.kv_ratio if frontier else 1.0
        raise GateError(
            f"no plan fits into {limit / MIB:.3g} MiB at {planner.context:,} tokens",
            where=Budget.place(budget.size or "kv_ratio"),
            fix=f"ask for {_asked(planner, budget, least)}",
        )
    planned = planner.never_worse(planned)
    return (planned, planned.point.kl) if healed is None else least_healed(planner, planned, limit, healed)


def _least_lost(
    planner: Planner,
    planned: Planned,
    kl: float,
    limit: float,
    recall_drop: Callable[[Planned], float],
    healed: Healed | None,
    progress: Progress,
) -> tuple[Planned, float]:
    """A plan that loses too much recall, or one that loses less of both by windows in layers that recall needs.

    Where few bytes are left, codes lose what windows were kept out of layers for, and more.
    """
    shares = progress.track(FORGETTING, "shares of windows tried")
    others = (planner.forgetting(share).allocated(limit) for share in shares)
    lower = (other for other in others if other is not None and other.point.kl < planned.point.kl)
    # One after the other, so that the recall of a plan is asked within its step.
    best = min(chain([planned], lower), key=lambda found: (recall_drop(found), found.point.kl))
    if best is planned:
        return planned, kl
    forgetting = (best, best.point.kl) if healed is None else healed(best)
    return min((planned, kl), forgetting, key=lambda found: found[1])


def _check_kl(planner: Planner, budget: Budget, frontier: list[Planned], planned: Planned, kl: float) -> None:
    if budget.max_kl is not None and kl > MARGIN * budget.max_kl:
        within = [other.point.kv_ratio for other in frontier if other.point.kl * MARGIN <= budget.max_kl]
        raise GateError(
            f"KL is about {kl:.2g}, not {budget.max_kl:g}, in {_size(planned)}",
            where=Budget.place("max_kl"),
            fix=f"ask for {_asked(planner, budget, within[-1])}, or allow more" if within else "allow more",
        )


def _smallest(planner: Planner, budget: Budget, frontier: list[Planned], healed: Healed | None) -> Planned:
    if not frontier:
        raise GateError(
            f"no plan keeps the limit of time at {planner.context:,} tokens",
            where=Budget.place("time_ratio"),
            fix="allow more time",
        )
    if budget.max_kl is None:
        return planner.never_worse(frontier[-1])
    if healed is not None:
        return smallest_healed(planner, budget.max_kl, frontier, healed)
    return planner.never_worse(planner.smallest(budget.max_kl, frontier))


def _check_recall(planned: Planned, limit: float) -> None:
    if (planned.point.recall_drop or 0.0) > limit:
        raise GateError(
            f"recall drops by {planned.point.recall_drop:.1%} in {_size(planned)}",
            where=Budget.place("max_recall_drop"),
            fix="ask for a larger cache, or allow more",
        )


def _asked(planner: Planner, budget: Budget, ratio: float) -> str:
    """A size that a plan of this ratio fits into, in the unit that the budget has."""
    if budget.kv_mib is None:
        return f"a ratio of {rounded_down(ratio)} or less"
    return f"{math.ceil(100 * planner.plain_bytes / ratio / MIB) / 100:g} MiB or more"


def _size(planned: Planned) -> str:
    """How many times smaller the cache of a plan is."""
    return f"a cache {smaller(1.0, planned.point.kv_ratio)}"
