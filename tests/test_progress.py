from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from kvslim.cli.progress import COMPRESS, VALIDATE, Run, Terminal, minutes, time_left

SHARES = {"load": 1.0, "plan": 2.0, "validate": 7.0}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def ticks(self, count: int, seconds: float) -> Iterator[int]:
        """Items that take so many seconds each."""
        for item in range(count):
            self.now += seconds
            yield item


def test_run_is_done_by_the_shares_of_its_stages_when_one_is_left_out() -> None:
    clock = Clock()
    run = Run(SHARES, clock)
    assert (run.done, run.left()) == (0, "")
    run.enter("load")
    run.within = 0.5
    assert run.done == pytest.approx(0.05)
    run.enter("validate")
    assert run.done == pytest.approx(0.3)
    clock.now = 60
    assert run.left() == "2:20 left"
    run.enter("a stage of another command")
    assert (run.done, run.left()) == (0, "")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "60:00")])
def test_minutes_count_whole_seconds(seconds: float, text: str) -> None:
    assert minutes(seconds) == text
    assert time_left(seconds, 0.5) == f"{text} left"


def test_log_has_a_line_per_stage_and_every_ten_seconds_when_not_on_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    progress = Terminal(SHARES, clock)
    progress.stage("validate")
    assert list(progress.track(clock.ticks(10, 4.0), "windows", total=10)) == list(range(10))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "• validate",
        "  windows: 30%, 0:28 left, run 51%, 0:12 left, 0:12 passed",
        "  windows: 60%, 0:16 left, run 72%, 0:09 left, 0:24 passed",
        "  windows: 90%, 0:04 left, run 93%, 0:03 left, 0:36 passed",
    ]


def test_log_tells_the_number_done_when_no_total_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Terminal(clock=clock)
    progress.stage("load")
    list(progress.track(clock.ticks(3, 6.0), "files"))
    assert capsys.readouterr().err.splitlines() == ["• load", "  files: 2, 0:12 passed"]


def test_bars_show_the_stage_and_the_run_when_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr("kvslim.cli.progress.stderr_console", lambda: console)
    clock = Clock()
    progress = Terminal(SHARES, clock)
    progress.stage("validate")
    assert list(progress.track(clock.ticks(4, 5.0), "windows", total=4)) == [0, 1, 2, 3]
    shown = screen.getvalue()
    for text in ("windows", "25%", "0:15 left", "100%", "whole run", "48%", "0:06 left"):
        assert text in shown


def test_shares_name_the_stages_of_both_commands() -> None:
    assert list(VALIDATE) == [stage for stage in COMPRESS if stage in VALIDATE]
    assert {"load", "held-out text", "validate: recall"} < VALIDATE.keys() < COMPRESS.keys()
