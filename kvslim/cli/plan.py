"""`kvslim plan`: shows what compress would decide."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kvslim.cli import console
from kvslim.cli.options import (
    Calibration,
    DeviceName,
    FileMib,
    FileRatio,
    Json,
    MaxDrop,
    MaxKl,
    MemoryAt,
    MibAt,
    Model,
    Overrides,
    Ratio,
    RayAddress,
    RecipeName,
    Speed,
    TargetContext,
    TimeRatio,
    WeightWord,
    WorkerCount,
)
from kvslim.cli.progress import Terminal


def plan(
    model: Model,
    recipe: RecipeName = None,
    weights: WeightWord = None,
    file_mib: FileMib = None,
    file_ratio: FileRatio = None,
    context: TargetContext = None,
    calibration: Calibration = None,
    kv_ratio: Ratio = None,
    kv_mib_at: MibAt = None,
    memory_mib: MemoryAt = None,
    time_ratio: TimeRatio = None,
    max_kl: MaxKl = None,
    max_recall_drop: MaxDrop = None,
    device: DeviceName = None,
    tokens_per_second: Speed = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="write the plan to this JSON file")] = None,
    overrides: Overrides = None,
    workers: WorkerCount = None,
    ray: RayAddress = None,
    as_json: Json = False,
) -> None:
    """Show what compress would decide.

    Calibrates, and predicts the size of the cache and its KL. With a budget, also shows the other sizes that the
    planner tried. Writes no graph.
    """
    from kvslim.cli.asked import asked_for
    from kvslim.cli.inputs import check_target, read_budget, read_recipe, read_words, write_text
    from kvslim.cli.outcome import expectations

    check_target(out, "--out")
    budget = read_budget(kv_ratio, kv_mib_at, time_ratio, max_kl, max_recall_drop, memory_mib)
    words = read_words(weights, calibration, context, None, file_mib, file_ratio)
    read = partial(read_recipe, recipe, overrides or (), words=words)
    asked = asked_for(model, read, budget, device, tokens_per_second)
    from kvslim import api
    from kvslim.kv_ratios import smaller
    from kvslim.report.reach import reach_line
    from kvslim.report.tables import frontier_table, plan_table

    with console.libraries_apart(), Terminal() as progress:
        summary = api.plan(model, asked.recipe, progress=progress, workers=workers, ray=ray)
    if out:
        write_text(out, summary.plan.model_dump_json(indent=2) + "\n", "--out")
    reached = asked.reached(summary.plan)
    if as_json:
        devices = [each.model_dump(mode="json") for each in reached]
        console.print_json("plan", {**summary.model_dump(mode="json"), "devices": devices})
        return
    slim, plain = summary.kv_bytes_per_token, summary.plain_kv_bytes_per_token
    console.print_tables(
        plan_table(summary.plan), frontier_table(summary.frontier or summary.alike, summary.peers, plain)
    )
    console.print_text(f"KV cache: {slim:,.0f} bytes per token, {smaller(slim, plain)}\n")
    console.print_text(f"KL to plain: {summary.kl:.2g} on held-out calibration text\n")
    for line in expectations(summary, asked.recipe):
        console.print_text(f"{line}\n")
    if asked.room:
        console.print_text(f"{reach_line(asked.room.device, reached)}\n")
