"""How much of a run is done, and how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from kvslim.stages import PARTS

Clock = Callable[[], float]


class Pace:
    """Follows the stages of a run and the steps within a stage.

    What is left of a stage follows from its steps, and before the first from how fast earlier stages were. It counts
    down between two steps, so that it also holds when a step takes minutes. Parts of a stage that are passed over, such
    as one whose result is on the disk, count for nothing.

    Args:
        clock: Gives seconds.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self.started = self._entered = self._stepped = clock()
        self.shares: Mapping[str, float] = {}
        self.stage = ""
        self._within = self._step = self._begun = self._skipped = 0.0
        self._spent: dict[str, float] = {}

    def expect(self, shares: Mapping[str, float]) -> None:
        """The stages to come, with the share of the time that each is expected to take."""
        self.shares = shares

    def enter(self, stage: str) -> None:
        """A stage begins; the one before it is over."""
        self.leave()
        self.stage = stage
        self._within = self._step = self._begun = self._skipped = 0.0
        self._entered = self._stepped = self._clock()

    def leave(self) -> None:
        """The stage is over."""
        if self.stage:
            self._spent[self.stage] = self.stage_seconds
        self.stage = ""

    def step(self, label: str, done: float, whole: float, step: float = 1) -> None:
        """A step of a part begins; where nothing is known of the whole, nothing is of the stage.

        A label that is not expected stands for the first part: methods measure where the planner would.

        Args:
            label: Of the part.
            done: What the steps before it count for; 0 where the part begins.
            whole: What all steps count for; 0 where it is not known.
            step: What this one counts for.
        """
        if not whole:
            return
        parts = PARTS.get(self.stage, {label: 1.0})
        labels, shares = list(parts), [share / sum(parts.values()) for share in parts.values()]
        place = labels.index(label) if label in labels else 0
        begins, share = sum(shares[:place]), shares[place]
        self._skipped += max(0.0, begins - self._begun)
        self._begun = max(self._begun, begins + share)
        if (within := begins + share * done / whole) >= self._within:
            self._within, self._step, self._stepped = within, share * step / whole, self._clock()

    @property
    def place(self) -> str:
        """Such as `3/7 `; empty for a stage that was not expected."""
        names = list(self.shares)
        return f"{names.index(self.stage) + 1}/{len(names)} " if self.stage in names else ""

    @property
    def seconds(self) -> float:
        """Time since the run began."""
        return self._clock() - self.started

    @property
    def stage_seconds(self) -> float:
        """Time since the stage began."""
        return self._clock() - self._entered

    @property
    def stage_left(self) -> float | None:
        """Seconds that the stage will still take; None where nothing is known."""
        passed, whole = self.stage_seconds, 1 - self._skipped
        done, after = ((share - self._skipped) / whole for share in (self._within, self._within + self._step))
        if done <= 0:
            rate = self._rate()
            left = None if rate is None else self.shares.get(self.stage, 0.0) * rate - passed
            return left if left is not None and left > 0 else None
        since = self._clock() - self._stepped
        counted_down = (passed - since) * (1 - done) / done - since
        over_now = passed * (1 - after) / after  # if the step that runs were over now
        return max(counted_down, over_now, 0.0)

    @property
    def left(self) -> float | None:
        """Seconds that the run will still take; None where nothing is known."""
        names, stage_left = list(self.shares), self.stage_left
        if self.stage not in names or stage_left is None:
            return None
        later = sum(self.shares[name] for name in names[names.index(self.stage) + 1 :])
        share, time_of_stage = self.shares[self.stage], self.stage_seconds + stage_left
        known = {name: seconds for name, seconds in self._spent.items() if name in self.shares}
        rate = (sum(known.values()) + time_of_stage) / (sum(self.shares[name] for name in known) + share)
        return stage_left + later * rate

    def _rate(self) -> float | None:
        """Seconds of the stages that are over per share; None where there is none."""
        known = {name: seconds for name, seconds in self._spent.items() if self.shares.get(name)}
        return sum(known.values()) / sum(self.shares[name] for name in known) if known else None


def done(passed: float, left: float | None) -> float | None:
    """The share of some time that has passed."""
    if left is None:
        return None
    return passed / (passed + left) if passed + left > 0 else 0.0


def minutes(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss."""
    whole = round(seconds)
    hours = f"{whole // 3600}:{whole // 60 % 60:02}" if whole >= 3600 else f"{whole // 60}"
    return f"{hours}:{whole % 60:02}"


def left_in_words(left: float | None) -> str:
    """Such as `1:20 left`; empty where nothing is known."""
    return "" if left is None else f"{minutes(left)} left"
