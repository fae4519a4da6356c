"""Plans for a budget, by the planner of `kvslim compress` or with a part of what it may offer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

Kind = Sequence[Sequence[Any]]  # what plans may be made of: candidates by layer


class OpenPlanner:
    """A planner of a model in memory.

    Args:
        trials: Of the model.
        time_ratio: Limit of the time of a token, over the plain model's; None for no limit.
    """

    def __init__(self, trials: Any, time_ratio: float | None = None) -> None:
        from kvslim.planning.budget import planner_of

        self._planner = planner_of(trials, None, time_ratio)
        self._planner.ask_of_all()  # what it offers then changes here alone

    def frontier(self) -> Any:
        """The best plans at a row of sizes."""
        return self._planner.frontier()

    def within_time(self, *, narrower: bool = True) -> Any:
        """The plan of least KL within the limit of time; None if none keeps it.

        Args:
            narrower: Whether feed-forward parts may be narrower.
        """
        every = self._planner.narrower
        self._planner.narrower = every if narrower else {bits: [] for bits in every}
        try:
            return self._planner.allocated(self._planner.plain_bytes)
        finally:
            self._planner.narrower = every

    def allocated(self, ratio: float) -> Any:
        """The plan of least KL for a cache so many times smaller, with what is expected of it."""
        planned = self._allocated(ratio)
        assert planned is not None, f"nothing is {ratio:.3g} times smaller"
        return planned

    def never_worse(self, planned: Any) -> Any:
        """The plan, or all layers alike where that loses less."""
        return self._planner.never_worse(planned)

    def planned(self, ratio: float) -> Any:
        """The plan of least KL, or all layers alike where that loses less."""
        return self.never_worse(self.allocated(ratio))

    def planned_of(self, ratio: float, kinds: Callable[[Kind], bool]) -> Any:
        """The same of some kinds of candidates alone."""
        every = self._planner.offered
        with self._only({bits: [kind for kind in offered if kinds(kind)] for bits, offered in every.items()}):
            return self.planned(ratio)

    def alternatives(self, ratio: float) -> Iterator[Any]:
        """The 4-bit plan of each kind of candidates, where one fits."""
        seen = set()
        for kind in self._planner.offered[4]:
            with self._only({8: [], 4: [kind]}):
                planned = self._allocated(ratio)
            if planned is not None and planned.plan.layers not in seen:
                seen.add(planned.plan.layers)
                yield planned

    def _allocated(self, ratio: float) -> Any:
        return self._planner.allocated(self._planner.plain_bytes / ratio)

    @contextmanager
    def _only(self, some: Mapping[int, Sequence[Kind]]) -> Iterator[None]:
        """Within the block the planner offers some kinds of candidates alone."""
        every = self._planner.offered
        self._planner.offered = some
        try:
            yield
        finally:
            self._planner.offered = every


def branch_mib(plan: Any) -> float:
    """MiB of memory for the branches of a plan's graph, as a budget of memory counts them."""
    from kvslim.contract import MIB
    from kvslim.planning.split import branch_bytes

    return branch_bytes(plan) / MIB
