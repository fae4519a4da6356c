"""How far a command is: bars with the time left on a terminal, dated lines in a log, one line for each stage done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from kvslim.cli.console import stderr_console
from kvslim.cli.pace import Clock, Pace, done, left_in_words, minutes
from kvslim.stages import TIME

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

T = TypeVar("T")
LINES = 15.0  # seconds between two lines of a log
FRAMES, QUIET_FRAMES = 0.5, 5.0  # seconds between two pictures of a bar; and while something is timed
COUNTED = 0.1  # least seconds between two steps that are drawn


class Terminal:
    """Shows progress on stderr while it is entered.

    Args:
        quiet: Whether everything is timed, and little is drawn for that reason.
        clock: Gives seconds.
        now: Gives the date.
    """

    def __init__(
        self, *, quiet: bool = False, clock: Clock = time.monotonic, now: Callable[[], datetime] = datetime.now
    ) -> None:
        self._console = stderr_console()
        self._pace, self._clock, self._now = Pace(clock), clock, now
        self._quiet, self._label, self._told, self._shown = quiet, "", "", clock()
        self._bars: Bars | None = None
        self._lock, self._over = threading.RLock(), threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Terminal:
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._ticker.join()
        self._end_stage(finished=error is None)

    @property
    def seconds(self) -> float:
        """Time since the run began."""
        return self._pace.seconds

    def expect(self, stages: Mapping[str, float]) -> None:
        """The stages to come."""
        self._pace.expect(stages)

    def stage(self, name: str) -> None:
        """Ends a stage with a line, and begins one."""
        with self._lock:
            self._end_stage(finished=True)
            self._pace.enter(name)
            self._label, self._told, self._shown = "", "", self._clock()
            if self._console.is_terminal:
                self._start_bars()
            else:
                self._line(self._title)

    def track(
        self, items: Iterable[T], label: str, total: int | None = None, weights: Sequence[float] | None = None
    ) -> Iterator[T]:
        """Yields `items` and shows how many are done and how long the rest will take."""
        count = len(items) if total is None and isinstance(items, Sized) else total or 0
        whole = count if weights is None else sum(weights)
        steps = iter(weights or ())
        passed, step = 0.0, next(steps, 1.0)
        with self._lock:
            self._pace.step(label, passed, whole, step)
            self._label = label
        for number, item in enumerate(items, start=1):
            yield item
            passed, step = passed + step, next(steps, step)
            with self._lock:
                self._pace.step(label, passed, whole, step)
                self._label = label if count else f"{label}: {number}"
                self._show(COUNTED)

    def tell(self, words: str) -> None:
        """Shows words behind the step."""
        with self._lock:
            self._told = words

    @property
    def _title(self) -> str:
        return f"{self._pace.place}{self._pace.stage}"

    def _tick(self) -> None:
        """Shows that time passes, also within a step of minutes."""
        while not self._over.wait(FRAMES):
            with self._lock:
                self._show(QUIET_FRAMES if self._quiet or self._pace.stage == TIME else FRAMES)

    def _show(self, seconds: float) -> None:
        """Draws the bars or writes a line if so much time has passed since that was done."""
        is_terminal = self._console.is_terminal
        if not self._pace.stage or self._clock() - self._shown < (seconds if is_terminal else LINES):
            return
        self._shown = self._clock()
        if self._bars is not None:
            self._fill(self._bars)
            self._bars.refresh()
        else:
            self._line(f"{self._title}: {self._progress}")

    @property
    def _progress(self) -> str:
        """How far stage and run are, in words."""
        pace = self._pace
        parts = [" ".join(filter(None, (self._label, _percent(done(pace.stage_seconds, pace.stage_left)))))]
        parts += [self._told, left_in_words(pace.stage_left)]
        if pace.left is not None:
            parts += [f"run {_percent(done(pace.seconds, pace.left))}", left_in_words(pace.left)]
        return ", ".join(filter(None, (*parts, f"{minutes(pace.seconds)} passed")))

    def _end_stage(self, *, finished: bool) -> None:
        title, seconds = self._title, minutes(self._pace.stage_seconds)
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        if self._pace.stage and finished:
            if self._console.is_terminal:
                self._console.print(f"  {title}  {seconds}", markup=False, highlight=False)
            else:
                self._line(f"{title}: done in {seconds}")
        self._pace.leave()

    def _line(self, text: str) -> None:
        self._console.print(f"{self._now():%Y-%m-%d %H:%M:%S}  {text}", markup=False, highlight=False, soft_wrap=True)

    def _start_bars(self) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        columns = (
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(show_speed=False),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[passed]} passed"),
        )
        # The bars have no thread of their own, because what is timed is disturbed by one that draws often.
        self._bars = Progress(*columns, console=self._console, transient=True, auto_refresh=False)
        for _ in range(2):
            self._bars.add_task("", total=None, left="", passed="")
        self._fill(self._bars)
        self._bars.start()

    def _fill(self, bars: Bars) -> None:
        pace, label = self._pace, ", ".join(filter(None, (self._label, self._told)))
        label = f": {label}" if label else ""
        rows = ((f"{self._title}{label}", pace.stage_seconds, pace.stage_left), ("whole run", pace.seconds, pace.left))
        for task, (text, passed, left) in zip(bars.task_ids, rows, strict=True):
            share = done(passed, left)
            bars.update(
                task,
                description=text,
                total=None if share is None else 1,
                completed=share or 0,
                left=left_in_words(left),
                passed=minutes(passed),
            )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
