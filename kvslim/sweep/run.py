"""Makes the artifacts of a sweep beside each other, each in a process of Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from kvslim.errors import first_line
from kvslim.export.package import recover
from kvslim.progress import Progress
from kvslim.sweep.asked import Job
from kvslim.sweep.outcomes import Failure, Outcome, Outcomes, key_of, load_outcomes, store_outcomes
from kvslim.sweep.schedule import Schedule
from kvslim.unexpected import explained
from kvslim.workers.cluster import RETRIES, Cluster


def run_sweep(jobs: Sequence[Job], folder: Path, cluster: Cluster, progress: Progress) -> Outcomes:
    """Makes all artifacts that are not there yet.

    Args:
        jobs: What to make.
        folder: Where; what came of each is stored there after each.
        cluster: Does the jobs; it is joined if there are any.
        progress: Receives the progress.

    Raises:
        OutputError: The folder cannot be written, or holds something else.
        NotFoundError: As for `Cluster`.
    """
    outcomes = load_outcomes(folder, {job.name: job for job in jobs})
    store_outcomes(folder, outcomes)
    left = [job for job in jobs if job.name not in outcomes.jobs]
    try:
        with cluster if left else nullcontext():
            for job, outcome in progress.track(_ended(left, folder, cluster), "artifacts made", len(left)):
                outcomes = Outcomes(jobs={**outcomes.jobs, job.name: outcome})
                store_outcomes(folder, outcomes)
    finally:  # Ray has killed the processes of a sweep that is interrupted
        for job in jobs:
            recover((folder / job.name).absolute())
    return Outcomes(jobs={job.name: outcomes.jobs[job.name] for job in jobs})


def _ended(jobs: Sequence[Job], folder: Path, cluster: Cluster) -> Iterator[tuple[Job, Outcome]]:
    """Jobs and what came of them, as they end."""
    import ray

    schedule, running = Schedule(jobs), dict[ray.ObjectRef, Job]()
    while schedule.waiting or running:
        while len(running) < cluster.workers and (job := schedule.next()) is not None:
            running[cluster.start(make_artifact, job, (folder / job.name).absolute())] = job
        (ended, *_), _ = ray.wait(list(running))
        job = running.pop(ended)
        try:
            outcome = ray.get(ended)
        except ray.exceptions.RayError as error:
            outcome = Outcome(key=key_of(job), failure=_death(error))
        schedule.done(job, made=outcome.failure is None)
        yield job, outcome


def make_artifact(job: Job, out: Path) -> Outcome:
    """Makes one artifact, and tells what came of it; whatever goes wrong is told too."""
    from kvslim import pipeline

    start = time.monotonic()
    try:
        manifest = pipeline.compress(job.model, job.recipe, out, overwrite=True)
    except Exception as caught:
        error = explained(caught)
        failure = Failure(message=error.message, where=error.where, fix=error.fix, exit_code=error.exit_code)
        return Outcome(key=key_of(job), seconds=time.monotonic() - start, failure=failure)
    return Outcome(key=key_of(job), passed=manifest.passed, seconds=time.monotonic() - start)


def _death(error: Exception) -> Failure:
    fix = "take fewer workers: the system may have killed it for its memory"
    message = f"its process died {RETRIES + 1} times: {first_line(error)}"
    return Failure(message=message, where="--workers", fix=fix, exit_code=4)
