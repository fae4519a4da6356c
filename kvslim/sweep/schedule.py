"""Which job of a sweep may start: what two jobs share is made by one of them, then found on the disk by the other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kvslim.sweep.asked import Job


def shares(job: Job) -> frozenset[str]:
    """What a job leaves on the disk for others: the plain export, statistics, and what its planner probes."""
    recipe = job.recipe
    model = {"model": job.model, "weights": recipe.weights.model_dump(mode="json")}
    text = {**model, "text": recipe.calibration.model_dump(mode="json"), "is": "statistics"}
    found: list[dict[str, Any]] = [{**model, "is": "plain"}]
    if recipe.decides:
        found.append(text)
    if (budget := recipe.budget) is not None:
        found.append({**text, "is": "probes", "context": budget.context, "timed": budget.time_ratio is not None})
    return frozenset(json.dumps(each, sort_keys=True) for each in found)


class Schedule:
    """The jobs that are left, in their order.

    Args:
        jobs: All of them.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.waiting = list(jobs)
        self._made: set[str] = set()
        self._making: dict[str, frozenset[str]] = {}

    def next(self) -> Job | None:
        """The first job that needs nothing that another is making right now; None if all others wait for one."""
        busy = frozenset[str]().union(*self._making.values())
        for job in self.waiting:
            new = shares(job) - self._made
            if not new & busy:
                self.waiting.remove(job)
                self._making[job.name] = new
                return job
        return None

    def done(self, job: Job, *, made: bool) -> None:
        """A job has ended; what it leaves on the disk is there if it has `made` its artifact."""
        found = self._making.pop(job.name)
        if made:
            self._made |= found
