"""Sweeps: what is made, what is shared, what is kept when a run is stopped, and how one ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.models import SHORT
from support.paths import ROOT

from kvslim.errors import GateError, NotFoundError, OutputError, UsageError
from kvslim.progress import Silent
from kvslim.sweep.asked import Job, Sweep, jobs_of, read_sweep
from kvslim.sweep.outcomes import Outcome, Outcomes, key_of, load_outcomes, store_outcomes
from kvslim.sweep.run import run_sweep
from kvslim.sweep.schedule import Schedule
from kvslim.workers.cluster import Cluster


def sweep_of(**asked: Any) -> Sweep:
    return Sweep.model_validate({"models": ["a", "b"], "recipes": ["lossless"], "budgets": [{"kv_ratio": 8}], **asked})


def test_every_recipe_and_budget_of_every_model_is_a_job() -> None:
    jobs = jobs_of(sweep_of(models=["a", "org/b"], set=["calibration.samples=5"]))
    assert [job.name for job in jobs] == ["a/lossless", "a/kv_ratio-8", "b/lossless", "b/kv_ratio-8"]
    assert [job.model for job in jobs] == ["a", "a", "org/b", "org/b"]
    budgeted = jobs[1].recipe
    assert budgeted.budget is not None
    assert (budgeted.budget.kv_ratio, budgeted.gates.max_kv_ratio) == (8, 0.125)
    assert all(job.recipe.calibration.samples == 5 for job in jobs)


def test_jobs_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="2 jobs are called b/lossless"):
        jobs_of(sweep_of(models=["a/b", "c/b"]))


def refusal_of(text: str, path: Path) -> UsageError:
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_sweep(path)
    return caught.value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: []\nrecipes: [lossless]", "models: "),
        ("models: [demo]", "give recipes or budgets"),
        ("models: [demo]\nrecipe: [lossless]", "recipe: no such key"),
        ("models: demo\nrecipes: [lossless]", "models: must be a list"),
        ("models: [demo]\nbudgets: [{kv_ratio: 0.5}]", "budgets.0.kv_ratio"),
        ("models: [demo]\nbudgets: [{}]", "budgets.0: give kv_ratio"),
        ("models: [demo]\nbudgets: [8]", "budgets.0: must be keys with values"),
        ("models: [", "expected"),
        ("- demo", "sweep: "),
    ],
)
def test_wrong_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    refusal = refusal_of(text, tmp_path / "sweep.yaml")
    assert message in refusal.message
    assert refusal.where == str(tmp_path / "sweep.yaml")


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("models: [demo]\nrecipe: [lossless]", "did you mean 'recipes'?"),
        ("models: [demo]\nbudgets: [{kv_rato: 8}]", "did you mean 'kv_ratio'?"),
    ],
)
def test_key_that_is_meant_is_named(text: str, fix: str, tmp_path: Path) -> None:
    assert refusal_of(text, tmp_path / "sweep.yaml").fix == fix


@pytest.mark.parametrize(
    ("asked", "where"),
    [({"recipes": ["none"]}, "sweep: recipe"), ({"set": ["seed"]}, "sweep: set seed")],
)
def test_wrong_recipe_is_told_as_the_file_has_it(asked: dict[str, Any], where: str) -> None:
    with pytest.raises((UsageError, NotFoundError)) as caught:
        jobs_of(sweep_of(**asked))
    assert caught.value.where == where


def test_sweep_that_is_made_needs_no_cluster(tmp_path: Path) -> None:
    jobs = jobs_of(sweep_of(models=["a"]))
    outcomes = Outcomes(jobs={job.name: made(tmp_path, job) for job in jobs})
    store_outcomes(tmp_path, outcomes)
    assert run_sweep(jobs, tmp_path, Cluster(2, "127.0.0.1:1"), Silent()) == outcomes


def test_what_a_killed_process_left_goes_when_a_sweep_ends(tmp_path: Path) -> None:
    left = tmp_path / "a" / "lossless.partial-1"
    left.mkdir(parents=True)
    store_outcomes(tmp_path, Outcomes())
    with pytest.raises(NotFoundError, match="no Ray cluster"):
        run_sweep(jobs_of(sweep_of(models=["a"])), tmp_path, Cluster(2, "127.0.0.1:1"), Silent())
    assert not left.exists()


def test_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such sweep file"):
        read_sweep(tmp_path / "none.yaml")


def names(jobs: Sequence[Job]) -> list[str]:
    return [job.name for job in jobs]


def started(schedule: Schedule) -> list[Job]:
    """All that may start now."""
    found = []
    while (job := schedule.next()) is not None:
        found.append(job)
    return found


def test_what_jobs_share_is_made_by_the_first_of_them() -> None:
    budgets = [{"kv_ratio": 8}, {"kv_ratio": 16}, {"kv_ratio": 8, "time_ratio": 0.9}]
    schedule = Schedule(jobs_of(sweep_of(budgets=budgets)))
    first = started(schedule)
    assert names(first) == ["a/lossless", "b/lossless"]
    schedule.done(first[0], made=True)
    second = started(schedule)
    assert names(second) == ["a/kv_ratio-8", "a/kv_ratio-8-time_ratio-0.9"]  # other layers are probed for time
    schedule.done(second[0], made=True)
    assert names(started(schedule)) == ["a/kv_ratio-16"]


def test_what_a_failed_job_did_not_make_is_made_by_the_next() -> None:
    schedule = Schedule(jobs_of(sweep_of(models=["a"], budgets=[{"kv_ratio": 8}, {"kv_ratio": 16}])))
    (first,) = started(schedule)
    schedule.done(first, made=False)
    assert names(started(schedule)) == ["a/kv_ratio-8"]


def made(folder: Path, job: Job, **changes: Any) -> Outcome:
    (folder / job.name).mkdir(parents=True)
    (folder / job.name / "kvslim.json").touch()
    return Outcome(key=key_of(job), passed=True).model_copy(update=changes)


def test_outcomes_are_kept_while_they_are_asked_for(tmp_path: Path) -> None:
    jobs = {job.name: job for job in jobs_of(sweep_of())}
    first, second, third, last = jobs
    found = {
        first: made(tmp_path, jobs[first]),
        second: made(tmp_path, jobs[second], key="of another recipe"),
        third: made(tmp_path, jobs[third], passed=False),
        last: Outcome(key=key_of(jobs[last]), passed=True),  # its folder is gone
    }
    store_outcomes(tmp_path, Outcomes(jobs=found))
    assert list(load_outcomes(tmp_path, jobs).jobs) == [first, third]


def test_artifact_is_made_again_when_its_text_has_changed(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One text.")
    job = jobs_of(sweep_of())[0]
    calibration = job.recipe.calibration.model_copy(update={"source": str(text)})
    job = job.model_copy(update={"recipe": job.recipe.model_copy(update={"calibration": calibration})})
    store_outcomes(tmp_path / "out", Outcomes(jobs={job.name: made(tmp_path / "out", job)}))
    assert list(load_outcomes(tmp_path / "out", {job.name: job}).jobs) == [job.name]
    for change in (lambda: text.write_text("Another text."), text.unlink):
        change()
        assert not load_outcomes(tmp_path / "out", {job.name: job}).jobs


def test_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    with pytest.raises(OutputError, match="holds no sweep"):
        load_outcomes(tmp_path, {})


def swept(file: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """A sweep in a process of its own, as Ray starts once in a process."""
    code = f"import sys; from kvslim.cli.app import run; sys.exit(run({['sweep', str(file), '-o', str(out), *more]!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


@pytest.mark.slow
def test_sweep_that_is_killed_goes_on_and_lists_what_failed(tiny_llama: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "sweep.yaml", tmp_path / "out"
    asked = {"models": [str(tiny_llama), str(tmp_path / "gone")], "recipes": ["lossless"], "budgets": [{"kv_ratio": 6}]}
    file.write_text(yaml.safe_dump({**asked, "set": list(SHORT)}))
    name = f"{tiny_llama.name}/lossless"
    first = swept(file, out, "--workers", "2")
    while first.poll() is None and name not in recorded(out):
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    kept = (out / name / "kvslim.json").stat().st_mtime_ns
    second = swept(file, out, "--workers", "2", "--json")
    printed, told = second.communicate(timeout=280)
    assert second.returncode == NotFoundError.exit_code, told
    found = json.loads(printed)["jobs"]
    assert [job.partition("/")[2] for job in found] == ["lossless", "kv_ratio-6"] * 2
    failures = [outcome["failure"] for outcome in found.values()]
    assert [failure is None for failure in failures] == [True, True, False, False]
    assert "is not a model folder" in failures[2]["message"]
    page = (out / "sweep.html").read_text()
    assert "is not a model folder" in page
    assert "KL against bytes" in page
    assert (out / name / "kvslim.json").stat().st_mtime_ns == kept
    assert recorded(out) == found


def recorded(out: Path) -> dict[str, Any]:
    file = out / "sweep.json"
    jobs: dict[str, Any] = json.loads(file.read_text())["jobs"] if file.is_file() else {}
    return jobs


def test_failed_gate_decides_the_exit_code() -> None:
    passed, failed = Outcome(key="a", passed=True), Outcome(key="b", passed=False)
    assert Outcomes(jobs={"a": passed}).exit_code == 0
    assert Outcomes(jobs={"a": passed, "b": failed}).exit_code == GateError.exit_code
