"""What a command shows of its progress: the time left, on a terminal and in a log."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import pytest
from rich.console import Console
from support.models import recipe_of

from kvslim import pipeline, stages
from kvslim.cli.pace import Pace, done, left_in_words, minutes
from kvslim.cli.progress import Terminal
from kvslim.loading.source import read_spec, resolve
from kvslim.methods import KvQuant
from kvslim.settings import Budget
from kvslim.weight_format import WeightFormat

T = TypeVar("T")
SHARES = {"load": 1.0, "other": 2.0, "last": 7.0}
START = datetime(2026, 11, 29, 7, 0, tzinfo=UTC)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def date(self) -> datetime:
        return START + timedelta(seconds=self.now)

    def ticks(self, count: int, seconds: float) -> Iterator[int]:
        """Items that take so many seconds each."""
        for item in range(count):
            self.now += seconds
            yield item


def pace_at(stage: str, clock: Clock, shares: dict[str, float] | None = None) -> Pace:
    pace = Pace(clock)
    pace.expect(SHARES if shares is None else shares)
    for name in SHARES:
        pace.enter(name)
        if name == stage:
            return pace
        clock.now += 3 * SHARES[name]
    raise KeyError(stage)


def planning() -> tuple[Clock, Pace]:
    clock = Clock()
    pace = Pace(clock)
    pace.enter(stages.PLAN)
    return clock, pace


def test_time_left_follows_from_earlier_stages_before_the_first_step() -> None:
    clock = Clock()
    pace = pace_at("last", clock)
    assert (pace.place, pace.stage_left, pace.left) == ("3/3 ", 21, 21)
    clock.now += 20
    assert (pace.stage_left, pace.left) == (1, 1)
    clock.now += 2  # later than expected: nothing is known any more
    assert (pace.stage_left, pace.left) == (None, None)


def test_time_left_follows_from_the_steps_of_a_stage_and_its_share() -> None:
    clock = Clock()
    pace = pace_at("other", clock)
    assert pace.left == pytest.approx(6 + 21)
    clock.now += 5
    pace.step("steps", 1, 4)
    assert pace.stage_left == 15
    assert pace.left == pytest.approx(15 + 7 * (3 + 20) / 3)


def test_time_left_counts_down_within_a_step_of_minutes_and_grows_when_it_takes_longer() -> None:
    clock = Clock()
    pace = pace_at("last", clock)
    for number in (1, 2):
        clock.now += 60
        pace.step("steps", number, 4)
    assert pace.stage_left == 120
    clock.now += 45
    assert pace.stage_left == 75
    clock.now += 75  # a step of two minutes so far: the next may take as long as the mean
    assert pace.stage_left == pytest.approx(80)
    clock.now += 120
    assert pace.stage_left == pytest.approx(120)


def test_time_left_counts_down_within_a_step_that_counts_for_several() -> None:
    clock = Clock()
    pace = pace_at("other", clock)
    clock.now += 5
    pace.step("steps", 1, 4, 3)
    clock.now += 14
    assert pace.stage_left == 1


def test_first_stage_tells_no_time_left_before_its_first_step() -> None:
    clock = Clock()
    pace = pace_at("load", clock)
    assert (pace.place, pace.stage_left, pace.left) == ("1/3 ", None, None)
    clock.now += 2
    pace.step("steps", 1, 2)
    assert (pace.stage_left, pace.left) == (2, 2 + 9 * 4)


def test_unexpected_stage_has_no_place_and_leaves_the_run_unknown() -> None:
    clock = Clock()
    pace = pace_at("other", clock, {})
    clock.now += 1
    pace.step("steps", 1, 2)
    assert (pace.place, pace.stage_left, pace.left) == ("", 1, None)


def test_parts_of_a_stage_share_its_time() -> None:
    clock, pace = planning()
    shares = stages.PARTS[stages.PLAN]
    clock.now += 10
    pace.step("layers to lose heads", 2, 2)  # where the planner would probe
    first = shares["layers probed"] / sum(shares.values())
    assert pace.stage_left == pytest.approx(10 / first - 10)
    pace.step("layers probed", 1, 2)  # less than what is done already
    assert pace.stage_left == pytest.approx(10 / first - 10)


def test_part_that_begins_may_take_its_share_before_the_time_left_grows() -> None:
    clock, pace = planning()
    shares = stages.PARTS[stages.PLAN]
    clock.now += 90
    pace.step("layers probed", 30, 30)
    pace.step("kinds of changes asked for recall", 0, 3)
    before = pace.stage_left
    assert before == pytest.approx(90 / shares["layers probed"] * sum(list(shares.values())[1:]))
    clock.now += 90 * shares["kinds of changes asked for recall"] / shares["layers probed"] / 3 - 1
    assert pace.stage_left == pytest.approx(before - (clock.now - 90))


def test_parts_that_are_passed_over_count_for_nothing() -> None:
    clock, pace = planning()
    shares = stages.PARTS[stages.PLAN]
    left = sum(list(shares.values())[list(shares).index("sizes planned") :])
    pace.step("sizes planned", 0, 6)  # what was probed is on the disk
    clock.now += 10
    pace.step("sizes planned", 1, 6)
    assert pace.stage_left == pytest.approx(10 * left / (shares["sizes planned"] / 6) - 10)


def test_time_left_counts_down_while_a_part_that_is_over_is_asked_once_more() -> None:
    clock, pace = planning()
    pace.step("kinds of changes asked for recall", 0, 1)
    clock.now += 60
    pace.step("sizes planned", 3, 6)
    clock.now += 2
    left = pace.stage_left
    pace.step("kinds of changes asked for recall", 0, 1)
    assert pace.stage_left == left


def test_labels_of_steps_are_those_that_planning_tells(tiny_llama: Path) -> None:
    heard = Listening()
    pipeline.plan(str(tiny_llama), recipe_of().within(Budget(kv_ratio=8, time_ratio=0.99)), progress=heard)
    assert [label for stage, label in heard.steps if stage == stages.PLAN and label in stages.PARTS[stage]] == [
        "layers probed",
        "kinds of changes asked for recall",
        "sizes planned",
        "layers refitted",
    ]


def test_labels_of_steps_are_those_that_methods_tell(tiny_llama: Path) -> None:
    heard = Listening()
    pipeline.plan(str(tiny_llama), RECIPES["methods"], progress=heard)
    told = [label for stage, label in heard.steps if stage == stages.DECIDE]
    assert "sizes priced" in told
    assert {*told} <= {*stages.PARTS[stages.DECIDE]}


def test_labels_of_steps_are_those_that_writing_text_and_recall_tell(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSLIM_CACHE", str(tmp_path / "cache"))
    heard = Listening()
    pipeline.compress(str(tiny_llama), RECIPES["methods"], tmp_path / "out", progress=heard)
    assert [label for stage, label in heard.steps if stage == stages.LOAD] == []
    for part in (stages.TEXT, stages.RECALL):
        assert [label for stage, label in heard.steps if stage == part] == [*stages.PARTS[part]]


def test_labels_of_steps_are_those_that_a_split_of_memory_tells(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSLIM_CACHE", str(tmp_path))
    heard = Listening()
    pipeline.plan(str(tiny_llama), RECIPES["memory"], progress=heard)
    assert [label for stage, label in heard.steps if stage == stages.PROBE_WEIGHTS] == ["matrices probed"]
    assert {label for stage, label in heard.steps if stage == stages.PROBE_CACHE} == {*stages.PARTS[stages.PROBE_CACHE]}


def test_search_for_a_plan_is_expected_to_take_longer_than_methods(tiny_llama: Path) -> None:
    spec = read_spec(resolve(str(tiny_llama)))
    searched, decided = (stages.expected("plan", spec, RECIPES[name]) for name in ("budget", "methods"))
    assert searched[stages.PLAN] > 2 * decided[stages.DECIDE]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (3600, "1:00:00"), (7384, "2:03:04")],
)
def test_minutes_count_whole_seconds(seconds: float, text: str) -> None:
    assert minutes(seconds) == text
    assert left_in_words(seconds) == f"{text} left"


def test_share_of_a_time_that_is_not_known_is_none() -> None:
    assert (left_in_words(None), done(5, None), done(0, 0.0), done(5, 15)) == ("", None, 0, 0.25)


def test_log_has_dated_lines_for_each_stage_and_every_15_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Terminal(clock=clock, now=clock.date)
    progress.expect({"load": 1, "last": 9})
    progress.stage("load")
    clock.now += 5
    progress.stage("last")
    assert list(progress.track(clock.ticks(10, 5.0), "windows", total=10)) == list(range(10))
    progress.stage("over")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "2026-11-29 07:00:00  1/2 load",
        "2026-11-29 07:00:05  1/2 load: done in 0:05",
        "2026-11-29 07:00:05  2/2 last",
        "2026-11-29 07:00:20  2/2 last: windows 30%, 0:35 left, run 36%, 0:35 left, 0:20 passed",
        "2026-11-29 07:00:35  2/2 last: windows 60%, 0:20 left, run 64%, 0:20 left, 0:35 passed",
        "2026-11-29 07:00:50  2/2 last: windows 90%, 0:05 left, run 91%, 0:05 left, 0:50 passed",
        "2026-11-29 07:00:55  2/2 last: done in 0:50",
        "2026-11-29 07:00:55  over",
    ]


def test_steps_count_for_as_much_as_they_weigh(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Terminal(clock=clock, now=clock.date)
    progress.stage("load")
    for seconds in progress.track((20.0, 140.0), "prompts", weights=(128, 896)):
        clock.now += seconds
    assert capsys.readouterr().err.splitlines() == [
        "2026-11-29 07:00:00  load",
        "2026-11-29 07:00:20  load: prompts 12%, 2:20 left, 0:20 passed",
        "2026-11-29 07:02:40  load: prompts 100%, 0:00 left, 2:40 passed",
    ]


def test_log_tells_the_number_done_when_no_total_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Terminal(clock=clock, now=clock.date)
    progress.stage("load")
    list(progress.track(clock.ticks(3, 10.0), "files"))
    assert capsys.readouterr().err.splitlines() == [
        "2026-11-29 07:00:00  load",
        "2026-11-29 07:00:20  load: files: 2, 0:20 passed",
    ]


def test_log_goes_on_within_one_long_step(capsys: pytest.CaptureFixture[str]) -> None:
    clock, seen = Clock(), ""
    with Terminal(clock=clock, now=clock.date) as progress:
        progress.stage("load")
        clock.now += 16
        until = time.monotonic() + 20
        while "0:16 passed" not in seen and time.monotonic() < until:
            time.sleep(0.05)
            seen += capsys.readouterr().err
    assert "2026-11-29 07:00:16  load: 0:16 passed" in seen


@pytest.mark.parametrize("fails", [False, True])
def test_terminal_ends_its_thread_and_its_last_stage(capsys: pytest.CaptureFixture[str], fails: bool) -> None:
    clock, before = Clock(), threading.active_count()
    try:
        with Terminal(clock=clock, now=clock.date) as progress:
            progress.stage("load")
            assert threading.active_count() == before + 1
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert threading.active_count() == before
    assert ("done in" in capsys.readouterr().err) is not fails


def test_bars_show_stage_run_and_elapsed_time_and_leave_a_line_per_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=110)
    monkeypatch.setattr("kvslim.cli.progress.stderr_console", lambda: console)
    clock = Clock()
    progress = Terminal(clock=clock)
    progress.expect({"load": 1.0, "last": 7.0})
    progress.stage("load")
    clock.now += 5
    progress.stage("last")
    assert list(progress.track(clock.ticks(4, 5.0), "windows", total=4)) == [0, 1, 2, 3]
    progress.stage("over")
    shown = screen.getvalue()
    for text in ("2/2 last: windows", "25%", "0:15 left", "100%", "whole run", "40%", "0:10 passed"):
        assert text in shown
    assert "  1/2 load  0:05\n" in shown
    assert "  2/2 last  0:20\n" in shown


class Listening:
    """Notes what a function expects, and what it does."""

    def __init__(self) -> None:
        self.expected: list[str] = []
        self.entered: list[str] = []
        self.steps: list[tuple[str, str]] = []  # of stages, by their labels

    def expect(self, stages: Mapping[str, float]) -> None:
        self.expected += stages

    def stage(self, name: str) -> None:
        self.entered.append(name)

    def track(
        self, items: Iterable[T], label: str, total: int | None = None, weights: Sequence[float] | None = None
    ) -> Iterator[T]:
        self.steps.append((self.entered[-1], label))
        yield from items


RECIPES = {
    "methods": recipe_of([KvQuant()]),
    "methods, plan given": recipe_of([KvQuant()]),
    "nothing": recipe_of(),
    "int8": recipe_of([KvQuant()], "int8"),
    "budget": recipe_of().within(Budget(kv_ratio=4)),
    "file": recipe_of([KvQuant()], WeightFormat(type="int4", file_mib=1)),
    "memory": recipe_of((), "int4").within(Budget(memory_mib=129, context=64)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_stages_come_as_they_are_expected(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, recipe = str(tiny_llama), RECIPES[name]
    plan = pipeline.plan(model, recipe).plan if "given" in name else None
    monkeypatch.setenv("KVSLIM_CACHE", str(tmp_path / "cache"))
    heard = Listening()
    pipeline.compress(model, recipe, tmp_path / "out", plan=plan, progress=heard)
    assert heard.entered == heard.expected
    again = Listening()
    pipeline.validate(tmp_path / "out", progress=again)
    known = {stages.TEXT, stages.PROBE_WEIGHTS, stages.PROBE_CACHE}  # from the first run
    assert again.entered == [stage for stage in again.expected if stage not in known]
