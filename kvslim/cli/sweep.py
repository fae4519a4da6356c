"""`kvslim sweep`: many artifacts of many models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvslim.cli import console
from kvslim.cli.options import Json, RayAddress, WorkerCount
from kvslim.cli.progress import Terminal


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="a .yaml file with models, recipes and budgets")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the folder for all artifacts")],
    workers: WorkerCount = None,
    ray: RayAddress = None,
    as_json: Json = False,
) -> int:
    """Make every recipe and every budget of several models.

    Artifacts are made beside each other by workers. What was made before is kept, so the same command goes on where an
    earlier one was stopped, and tries again what failed. Ends with a table and with sweep.html.

    Exit code 3 if a gate fails, and that of the error if an artifact cannot be made.
    """
    from kvslim.cli.inputs import write_text
    from kvslim.export.manifest import read_manifest
    from kvslim.report.sweep import sweep_page, sweep_table
    from kvslim.sweep.asked import jobs_of, read_sweep
    from kvslim.sweep.run import run_sweep
    from kvslim.workers.cluster import Cluster

    jobs = jobs_of(read_sweep(file))
    with console.libraries_apart(), Terminal() as progress:
        outcomes = run_sweep(jobs, out, Cluster(workers, ray), progress)
    made = {name: read_manifest(out / name) for name, outcome in outcomes.jobs.items() if outcome.failure is None}
    write_text(out / "sweep.html", sweep_page(jobs, outcomes, made), "-o")
    if as_json:
        console.print_json("sweep", outcomes.model_dump(mode="json"))
    else:
        console.print_tables(sweep_table(jobs, outcomes, made))
        console.hint(f"next: open {out}/sweep.html")
    return outcomes.exit_code
