"""The verbs that make an artifact, or tell what making it would decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvslim.cli import console
from kvslim.cli.failures import verdict
from kvslim.cli.options import Json, Junit, MaxDrop, MaxKl, MibAt, Model, Overrides, Ratio, RecipeName, TimeRatio


def compress(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="the folder to make")],
    recipe: RecipeName = None,
    kv_ratio: Ratio = None,
    kv_mib_at: MibAt = None,
    time_ratio: TimeRatio = None,
    max_kl: MaxKl = None,
    max_recall_drop: MaxDrop = None,
    plan: Annotated[Path | None, typer.Option(help="use these decisions (see `kvslim plan`)")] = None,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="replace the artifact that is there")] = False,
    junit: Junit = None,
    as_json: Json = False,
) -> int:
    """Make an artifact from a model.

    It is measured against the plain export; exit code 3 when a gate of the recipe fails. With a budget the planner
    picks methods, ranks and bits, and the budget's limits are the gates.
    """
    from kvslim.cli.inputs import check_target, read_budget, read_plan, read_recipe, write_junit

    check_target(junit, "--junit")
    typed = read_recipe(recipe, overrides or (), read_budget(kv_ratio, kv_mib_at, time_ratio, max_kl, max_recall_drop))
    decisions = read_plan(plan) if plan else None
    from kvslim import pipeline
    from kvslim.report.tables import gates_table, report_table

    with console.library_output_on_stderr():
        manifest = pipeline.compress(model, typed, out, plan=decisions, overwrite=force, progress=console.Terminal())
    report = manifest.report
    if report:
        write_junit(junit, report, out)
    if as_json:
        block = report.model_dump(mode="json") if report else {"passed": manifest.passed}
        console.print_json("compress", {"artifact_folder": str(out), **block})
    elif report:
        console.print_tables(report_table(report), gates_table(report.gates))
    console.hint(f"written to {out}")
    return verdict(manifest.passed, report.gates if report else (), str(out))


def plan(
    model: Model,
    recipe: RecipeName = None,
    kv_ratio: Ratio = None,
    kv_mib_at: MibAt = None,
    time_ratio: TimeRatio = None,
    max_kl: MaxKl = None,
    max_recall_drop: MaxDrop = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="write the plan to this JSON file")] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show what compress would decide.

    Calibrates, and predicts the bytes of the cache and its KL; with a budget, shows the sizes it saw. Writes no graph.
    """
    from kvslim.cli.inputs import check_target, read_budget, read_recipe, write_text

    check_target(out, "--out")
    typed = read_recipe(recipe, overrides or (), read_budget(kv_ratio, kv_mib_at, time_ratio, max_kl, max_recall_drop))
    from kvslim import pipeline
    from kvslim.report.tables import frontier_table, plan_table

    with console.library_output_on_stderr():
        summary = pipeline.plan(model, typed, progress=console.Terminal())
    if out:
        write_text(out, summary.plan.model_dump_json(indent=2) + "\n", "--out")
    if as_json:
        console.print_json("plan", summary.model_dump(mode="json"))
        return
    console.print_tables(plan_table(summary.plan), frontier_table(summary.frontier))
    slim, plain = summary.kv_bytes_per_token, summary.plain_kv_bytes_per_token
    console.print_text(f"KV cache: {slim:,.0f} bytes per token, {slim / plain:.3g} of plain fp32 ({plain:,.0f})\n")
    console.print_text(f"KL to plain: {summary.kl:.2g} on held-out calibration text\n")


def analyze(
    model: Model,
    data: Annotated[
        str, typer.Option("--data", "-d", metavar="SOURCE", help="text of the task: self, .txt, .jsonl, or hub:DATASET")
    ] = "self",
    svg: Annotated[Path | None, typer.Option(help="draw parts by their KL, heads by what they add")] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show which layers and heads a task needs least.

    Measures KL on the task's text without each layer's attention, feed-forward part and both, and without each kv head.
    Writes no graph.
    """
    from kvslim.cli.inputs import check_target, read_recipe, write_text

    check_target(svg, "--svg")
    settings = [f"calibration.source={json.dumps(data)}", *(overrides or ())]
    typed = read_recipe("lossless", settings, None)
    from kvslim import pipeline
    from kvslim.report.heatmap import analysis_panels, heatmap
    from kvslim.report.tables import heads_table, parts_table

    with console.library_output_on_stderr():
        analysis = pipeline.analyze(model, typed, progress=console.Terminal())
    if svg:
        title = f"KL without each part, and what each query head adds: {model}, {analysis.source}"
        write_text(svg, heatmap(title, analysis_panels(analysis)), "--svg")
    if as_json:
        console.print_json("analyze", analysis.model_dump(mode="json"))
    else:
        console.print_tables(parts_table(analysis), heads_table(analysis))
