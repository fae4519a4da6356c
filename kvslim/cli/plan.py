"""`kvslim plan`: shows what compress would decide."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvslim.cli import console
from kvslim.cli.options import Json, MaxDrop, MaxKl, MibAt, Model, Overrides, Ratio, RecipeName, TimeRatio
from kvslim.cli.progress import COMPRESS, Terminal


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

    Calibrates, and predicts the size of the cache and its KL. With a budget, also shows the other sizes that the
    planner tried. Writes no graph.
    """
    from kvslim.cli.inputs import check_target, read_budget, read_recipe, write_text

    check_target(out, "--out")
    typed = read_recipe(recipe, overrides or (), read_budget(kv_ratio, kv_mib_at, time_ratio, max_kl, max_recall_drop))
    from kvslim import api
    from kvslim.kv_ratios import smaller
    from kvslim.report.tables import frontier_table, plan_table

    with console.libraries_apart():
        summary = api.plan(model, typed, progress=Terminal(COMPRESS))
    if out:
        write_text(out, summary.plan.model_dump_json(indent=2) + "\n", "--out")
    if as_json:
        console.print_json("plan", summary.model_dump(mode="json"))
        return
    slim, plain = summary.kv_bytes_per_token, summary.plain_kv_bytes_per_token
    console.print_tables(
        plan_table(summary.plan), frontier_table(summary.frontier or summary.alike, summary.peers, plain)
    )
    console.print_text(f"KV cache: {slim:,.0f} bytes per token, {smaller(slim, plain)}\n")
    console.print_text(f"KL to plain: {summary.kl:.2g} on held-out calibration text\n")
