"""Plans judged by what they lose after a short training, where the model is healed."""

from __future__ import annotations

from collections.abc import Callable

from kvslim.planning.planner import UNSURE, Planned, Planner, kind_of
from kvslim.settings import MARGIN

Healed = Callable[[Planned], tuple[Planned, float]]  # the plan as it goes on to be healed, and what it is to lose then
TRIED = 3  # plans
LOOSER = 1.5, 1.2  # minutes of training took up to a third of the divergence


def least_healed(planner: Planner, planned: Planned, budget: float, healed: Healed) -> tuple[Planned, float]:
    """The plan that loses least once it is healed, of one and the best of other kinds at its size; and what it loses.

    Args:
        planner: Finds and measures plans.
        planned: The plan that loses least as it is.
        budget: Bytes at the target context.
        healed: Trains a plan for a while.
    """
    own, most = kind_of(planned.plan.layers), UNSURE * planned.point.kl
    others = [other for kind, other in planner.kinds(budget).items() if kind != own and other.point.kl <= most]
    return min(map(healed, [planned, *others[: TRIED - 1]]), key=lambda found: found[1])


def smallest_healed(planner: Planner, max_kl: float, frontier: list[Planned], healed: Healed) -> Planned:
    """The smallest plan found that keeps a margin to a limit of divergence once it is healed.

    Raises:
        GateError: No plan does.
    """
    for looser in LOOSER:
        planned = planner.smallest(looser * max_kl, frontier)
        after, kl = healed(planned)
        if kl * MARGIN <= max_kl:
            return after
    return planner.never_worse(planner.smallest(max_kl, frontier))
