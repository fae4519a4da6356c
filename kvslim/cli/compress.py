"""`kvslim compress`: compresses a model into an artifact."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kvslim.cli import console
from kvslim.cli.failures import SET_GATES, verdict
from kvslim.cli.options import (
    Calibration,
    DeviceName,
    DraftWord,
    FileMib,
    FileRatio,
    GateLimits,
    Healing,
    HeldOut,
    Json,
    Junit,
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


def compress(
    ran: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="the folder to write")],
    recipe: RecipeName = None,
    weights: WeightWord = None,
    draft: DraftWord = None,
    file_mib: FileMib = None,
    file_ratio: FileRatio = None,
    context: TargetContext = None,
    calibration: Calibration = None,
    validation: HeldOut = None,
    kv_ratio: Ratio = None,
    kv_mib_at: MibAt = None,
    memory_mib: MemoryAt = None,
    time_ratio: TimeRatio = None,
    max_kl: MaxKl = None,
    max_recall_drop: MaxDrop = None,
    device: DeviceName = None,
    tokens_per_second: Speed = None,
    heal: Healing = None,
    gates: GateLimits = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option(help="decisions of `kvslim plan -o`, or an edits.safetensors; several of one plan are merged"),
    ] = None,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing artifact")] = False,
    junit: Junit = None,
    workers: WorkerCount = None,
    ray: RayAddress = None,
    as_json: Json = False,
) -> int:
    """Compress a model into an artifact: an ONNX folder.

    A model is a Hugging Face folder, a GGUF file, or a LoRA folder whose base model is there (docs/files.md).

    The artifact is compared with the plain export; exit code 3 if a gate fails. With a budget, the planner picks
    methods, ranks and bits. Its limits are gates too, beside those of the recipe, or in their place.
    """
    from kvslim.cli.asked import asked_for
    from kvslim.cli.inputs import (
        check_target,
        read_budget,
        read_gates,
        read_plans,
        read_recipe,
        read_words,
        write_junit,
    )
    from kvslim.cli.outcome import outcome, passing

    check_target(junit, "--junit")
    budget = read_budget(kv_ratio, kv_mib_at, time_ratio, max_kl, max_recall_drop, memory_mib)
    words = read_words(weights, calibration, context, validation, file_mib, file_ratio, heal, draft)
    limits = read_gates(gates or ())
    decisions = read_plans(plan or ())
    read = partial(read_recipe, recipe, overrides or (), gates=limits, words=words)
    asked = asked_for(model, read, budget, device, tokens_per_second)
    from kvslim import api
    from kvslim.report.draft import draft_note, fallback_note
    from kvslim.report.healing import healing_note
    from kvslim.report.matrices import rounded_again
    from kvslim.report.tables import gates_table, report_table, timing_note

    with console.libraries_apart(), Terminal() as progress:
        manifest = api.compress(
            model,
            asked.recipe,
            out,
            plan=decisions,
            overwrite=force,
            progress=progress,
            workers=workers,
            ray=ray,
        )
    report, reached = manifest.report, asked.reached(manifest.plan)
    if report:
        write_junit(junit, report, out)
    if as_json:
        block = report.model_dump(mode="json") if report else {"passed": manifest.passed}
        devices = [each.model_dump(mode="json") for each in reached]
        console.print_json("compress", {"artifact_folder": str(out), **block, "devices": devices})
    elif report:
        console.print_tables(report_table(report), gates_table(report.gates))
    notes = (timing_note(report), draft_note(report.speculation)) if report else ()
    for note in filter(None, (fallback_note(manifest), rounded_again(manifest), *notes, healing_note(manifest))):
        console.hint(note)
    for line in outcome(manifest, out, progress.seconds, asked.room, reached):
        console.hint(line)
    others = f"{SET_GATES}; the artifact is kept and marked as failed"
    return verdict(manifest.passed, report.gates if report else (), str(out), passing(manifest, ran), others)
