"""`kvslim compress`: compresses a model into an artifact."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from kvslim.cli import console
from kvslim.cli.failures import verdict
from kvslim.cli.options import Json, Junit, MaxDrop, MaxKl, MibAt, Model, Overrides, Ratio, RecipeName, TimeRatio
from kvslim.cli.progress import COMPRESS, Terminal


def compress(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="the folder to write")],
    recipe: RecipeName = None,
    kv_ratio: Ratio = None,
    kv_mib_at: MibAt = None,
    time_ratio: TimeRatio = None,
    max_kl: MaxKl = None,
    max_recall_drop: MaxDrop = None,
    plan: Annotated[Path | None, typer.Option(help="use the decisions in this file (see `kvslim plan -o`)")] = None,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing artifact")] = False,
    junit: Junit = None,
    as_json: Json = False,
) -> int:
    """Compress a model into an artifact: an ONNX folder.

    A model is a Hugging Face folder, a GGUF file, or a LoRA folder whose base model is there (docs/files.md).

    The artifact is compared with the plain export; exit code 3 if a gate of the recipe fails. With a budget, the
    planner picks methods, ranks and bits, and the limits of the budget are the gates.
    """
    from kvslim.cli.inputs import check_target, read_budget, read_plan, read_recipe, write_junit

    check_target(junit, "--junit")
    typed = read_recipe(recipe, overrides or (), read_budget(kv_ratio, kv_mib_at, time_ratio, max_kl, max_recall_drop))
    decisions = read_plan(plan) if plan else None
    from kvslim import api
    from kvslim.report.advice import passing_budget
    from kvslim.report.tables import gates_table, report_table, timing_note

    with console.libraries_apart():
        manifest = api.compress(model, typed, out, plan=decisions, overwrite=force, progress=Terminal(COMPRESS))
    report = manifest.report
    if report:
        write_junit(junit, report, out)
    if as_json:
        block = report.model_dump(mode="json") if report else {"passed": manifest.passed}
        console.print_json("compress", {"artifact_folder": str(out), **block})
    elif report:
        console.print_tables(report_table(report), gates_table(report.gates))
    if report and (note := timing_note(report)):
        console.hint(note)
    console.hint(f"written to {out}")
    budget = passing_budget(manifest)
    passing = None if budget is None else f"kvslim compress {shlex.join([model, '-o', str(out)])} --force {budget}"
    return verdict(manifest.passed, report.gates if report else (), str(out), passing)
