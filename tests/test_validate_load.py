"""Timings of a busy machine are called uncertain."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.tiny_report import manifest

from kvslim.cli import app
from kvslim.report.bench import uncertain_timings
from kvslim.validation import load
from kvslim.validation.bench import BenchResult, Timing
from kvslim.validation.load import LoadWatch, doubt

STEADY = {"at a context of 128": np.array([10.0, 10.2, 9.9, 10.1])}


def test_steady_times_of_an_idle_machine_are_trusted() -> None:
    assert doubt(STEADY, busy_cores=0.3, cores=2) is None


def test_other_programs_make_times_uncertain() -> None:
    assert doubt(STEADY, busy_cores=1.26, cores=2) == "the machine was busy, other programs used 1.3 of its 2 cores"


def test_turns_that_differ_make_times_uncertain() -> None:
    times = STEADY | {"for a prompt of 512": np.array([10.0, 14.0, 10.0, 18.0])}
    assert doubt(times, busy_cores=0.0, cores=2) == (
        "the machine was busy or uneven, turns differ by 42% for a prompt of 512"
    )


def test_watch_counts_other_processes_and_not_its_own() -> None:
    spin = "import time; end = time.perf_counter() + 20\nwhile time.perf_counter() < end: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as other:
        time.sleep(0.3)
        watch, start = LoadWatch(), time.process_time()
        while time.process_time() < start + 0.5:
            pass
        found = watch.busy_cores()
        other.kill()
    assert found > 0.2


def test_watch_leaves_out_what_this_process_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = iter([load._Clock(10.0, 100.0, 5.0), load._Clock(12.0, 104.0, 8.0)])
    monkeypatch.setattr(load._Clock, "now", lambda: next(clocks))
    assert LoadWatch().busy_cores() == 0.5


@pytest.mark.parametrize("busy", [True, False])
def test_validate_says_that_timings_are_uncertain(
    busy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvslim.pipeline.validate", lambda *_, **__: manifest(busy=busy).report)
    assert app.run(["validate", str(tmp_path)]) == 0
    assert ("timings uncertain: the machine was busy" in capsys.readouterr().err) is busy


def test_bench_names_the_points_that_are_uncertain() -> None:
    timings = tuple(
        Timing(
            metric="tpot_ms",
            tokens=tokens,
            threads=None,
            batch=1,
            median_ms=2,
            first_quartile_ms=1,
            third_quartile_ms=3,
            tokens_per_second=500,
            ratio=1,
            joules_per_token=None,
            uncertain=reason,
        )
        for tokens, reason in ((128, None), (512, "the machine was busy"), (1024, "the machine was busy"))
    )
    result = BenchResult(kv_bytes_per_token=8, file_mib=1, peak_rss_mib=2, timings=timings)
    assert uncertain_timings({"a": result}) == (
        "timings uncertain: the machine was busy "
        "(Time per token, ms, context of 512; Time per token, ms, context of 1024)",
    )
    trusted = result.model_copy(update={"timings": timings[:1]})
    assert uncertain_timings({"a": trusted}) == ()
