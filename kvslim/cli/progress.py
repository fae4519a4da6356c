"""How far a command is: bars with the time left on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import TYPE_CHECKING, TypeVar

from kvslim.cli.console import stderr_console

if TYPE_CHECKING:
    from rich.progress import TaskID

T = TypeVar("T")
Update = Callable[[int], None]
LINES, FRAMES = 10.0, 0.1  # least seconds between two lines of a log, two pictures of a bar

# Expected shares of the time of a run, by stage, in order: seconds of a model of 135M parameters on two cores.
COMPRESS: Mapping[str, float] = {
    "load": 6,
    "export the plain baseline": 36,
    "calibration text": 40,
    "calibrate": 24,
    "plan": 60,
    "held-out text": 20,
    "export the slim graph": 26,
    "validate": 100,
    "validate: recall": 45,
    "validate: time and memory": 25,
}
VALIDATE: Mapping[str, float] = {
    name: COMPRESS[name] for name in COMPRESS if name.startswith(("load", "export the plain", "held-out", "validate"))
}


class Run:
    """How much of a run is done.

    Args:
        shares: Expected share of the time of each stage, in order; stages may be left out of a run.
        clock: Gives seconds.
    """

    def __init__(self, shares: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self.shares, self.clock = shares, clock
        self.started = self.stage_started = clock()
        self.stage, self.within = "", 0.0

    def enter(self, stage: str) -> None:
        """A stage begins; those before it are over."""
        self.stage, self.within, self.stage_started = stage, 0.0, self.clock()

    @property
    def done(self) -> float:
        """Share of the run that is done; 0 where nothing is known of its stages."""
        stages = list(self.shares)
        if self.stage not in stages:
            return 0.0
        place = stages.index(self.stage)
        before = sum(self.shares[stage] for stage in stages[:place])
        return (before + self.within * self.shares[self.stage]) / sum(self.shares.values())

    @property
    def seconds(self) -> float:
        """Time since the run began."""
        return self.clock() - self.started

    def left(self) -> str:
        """The time that the run will still take, in words."""
        return time_left(self.seconds, self.done)


def time_left(seconds: float, done: float) -> str:
    """What is left of something of which a share took so many seconds."""
    return "" if done <= 0 else f"{minutes(seconds * (1 - done) / done)} left"


def minutes(seconds: float) -> str:
    """Seconds as m:ss."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"


class Terminal:
    """Shows progress on stderr.

    Args:
        shares: Expected shares of the run's time, by stage; without them only stages are shown.
        clock: Gives seconds.
    """

    def __init__(self, shares: Mapping[str, float] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = stderr_console()
        self._run, self._clock = Run(shares or {}, clock), clock
        self._shown = clock()

    def stage(self, name: str) -> None:
        """Prints the name of the stage that begins."""
        self._run.enter(name)
        self._console.print(f"• {name}", markup=False, highlight=False)
        self._shown = self._clock()

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yields `items` and shows how many are done and how long the rest will take."""
        count = len(items) if total is None and isinstance(items, Sized) else total
        show = self._bars if self._console.is_terminal else self._lines
        with show(label, count or 0) as update:
            for done, item in enumerate(items, start=1):
                yield item
                self._run.within = max(self._run.within, done / count if count else 0.0)
                update(done)

    @contextlib.contextmanager
    def _lines(self, label: str, count: int) -> Iterator[Update]:
        started = self._clock()

        def update(done: int) -> None:
            if not self._due(LINES):
                return
            share = done / count if count else 0.0
            parts = [f"{share:.0%}" if count else f"{done}", time_left(self._clock() - started, share)]
            parts += [f"run {self._run.done:.0%}", self._run.left()] if self._run.done else []
            parts += [f"{minutes(self._run.seconds)} passed"]
            self._console.print(f"  {label}: {', '.join(filter(None, parts))}", markup=False, highlight=False)

        yield update

    @contextlib.contextmanager
    def _bars(self, label: str, count: int) -> Iterator[Update]:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
        )
        # A thread that draws would disturb what is timed.
        with Progress(*columns, console=self._console, transient=True, auto_refresh=False) as bars:
            stage = bars.add_task(label, total=count or None, left="")
            run = bars.add_task("whole run", total=1, left="", visible=bool(self._run.done))
            started = self._clock()

            def update(done: int) -> None:
                if self._due(FRAMES) or done == count:
                    share = done / count if count else 0.0
                    bars.update(stage, completed=done, left=time_left(self._clock() - started, share))
                    self._draw_run(bars.update, run)
                    bars.refresh()

            bars.refresh()
            yield update

    def _draw_run(self, update: Callable[..., None], task: TaskID) -> None:
        update(task, completed=self._run.done, left=self._run.left(), visible=bool(self._run.done))

    def _due(self, seconds: float) -> bool:
        """Whether so much time has passed since something was shown; if so, something is shown now."""
        if self._clock() - self._shown < seconds:
            return False
        self._shown = self._clock()
        return True
