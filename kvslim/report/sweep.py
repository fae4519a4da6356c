"""The table and the page of a sweep: what was made of each model, which of it is best, and what failed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from kvslim.kv_ratios import times
from kvslim.measures import Report
from kvslim.report.figure import reports
from kvslim.report.figures import figures
from kvslim.report.page import Head, Section, rendered
from kvslim.report.tables import NONE, Table
from kvslim.sweep.asked import Job
from kvslim.sweep.outcomes import Outcome, Outcomes
from kvslim.types import Manifest
from kvslim.validation.gates import time_ratio

HEADER = (
    "artifact",
    "KV bytes per token",
    "of plain",
    "KL",
    "recall lost",
    "time of plain",
    "files MiB",
    "front",
    "gates",
)
FRONT = (
    "On the front (*) is what no other artifact of the model beats or equals in bytes, KL, recall and time at once and "
    "beats in one of them."
)


def sweep_table(jobs: Sequence[Job], outcomes: Outcomes, made: Mapping[str, Manifest]) -> Table:
    """One row for each job.

    Args:
        jobs: What was asked for.
        outcomes: What came of it.
        made: The manifests of those that made an artifact.
    """
    best = {name for _, group in _by_model(jobs) for name in front(reports(_made_of(group, made)))}
    rows = (_row(job.name, outcomes.jobs[job.name], made.get(job.name), job.name in best) for job in jobs)
    return Table(HEADER, tuple(rows))


def sweep_page(jobs: Sequence[Job], outcomes: Outcomes, made: Mapping[str, Manifest]) -> str:
    """A page with the table, and figures for each model; arguments as for `sweep_table`."""
    failures = tuple(
        f"{name}: {outcome.failure.message} ({outcome.failure.where}; {outcome.failure.fix})"
        for name, outcome in outcomes.jobs.items()
        if outcome.failure
    )
    sections = [Section("All artifacts", FRONT, (sweep_table(jobs, outcomes, made),))]
    for model, group in _by_model(jobs):
        if of_model := _made_of(group, made):
            named = {name.partition("/")[2]: manifest for name, manifest in of_model.items()}
            sections.append(Section(model, figures=figures(named)))
    passed = all(outcome.exit_code == 0 for outcome in outcomes.jobs.values())
    return rendered(Head(f"Sweep of {len(jobs)} artifacts", passed=passed, failures=failures), sections)


def front(measured: Mapping[str, Report]) -> set[str]:
    """The names of those that no other dominates: none is as good in every measure and better in one."""
    points = {name: _losses(report) for name, report in measured.items()}
    return {
        name
        for name, mine in points.items()
        if not any(all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine for other in points.values())
    }


def _losses(report: Report) -> tuple[float, ...]:
    """Bytes, KL, recall lost and time: less is better. A KL that is no number is the worst."""
    artifact = report.artifact
    return (
        artifact.kv_bytes_per_token or 0.0,
        math.inf if artifact.kl_mean is None else artifact.kl_mean,
        _recall_lost(report) or 0.0,
        time_ratio(report.ratio) or 0.0,
    )


def _recall_lost(report: Report) -> float | None:
    before, after = report.plain.recall, report.artifact.recall
    return None if before is None or after is None else before - after


def _row(name: str, outcome: Outcome, manifest: Manifest | None, best: bool) -> tuple[str, ...]:
    if outcome.failure is not None or manifest is None or manifest.report is None:
        message = outcome.failure.message if outcome.failure else NONE
        return name, *(NONE,) * (len(HEADER) - 2), f"FAILED: {message}" if outcome.failure else message
    report = manifest.report
    plain, slim = report.plain.kv_bytes_per_token or 0.0, report.artifact.kv_bytes_per_token or 0.0
    lost, time = _recall_lost(report), time_ratio(report.ratio)
    return (
        name,
        f"{slim:,.0f}",
        f"1/{times(plain / slim).removesuffix('x')}" if slim else NONE,
        NONE if report.artifact.kl_mean is None else f"{report.artifact.kl_mean:.2g}",
        NONE if lost is None else f"{100 * lost:.1f} points",
        NONE if time is None else f"{time:.2f}",
        NONE if report.artifact.file_mib is None else f"{report.artifact.file_mib:.1f}",
        "*" if best else "",
        "passed" if outcome.passed else "FAILED" if outcome.passed is False else NONE,
    )


def _made_of(jobs: Sequence[Job], made: Mapping[str, Manifest]) -> dict[str, Manifest]:
    return {job.name: made[job.name] for job in jobs if job.name in made}


def _by_model(jobs: Sequence[Job]) -> Iterator[tuple[str, list[Job]]]:
    for model, group in groupby(jobs, key=lambda job: job.model):
        yield model, list(group)
