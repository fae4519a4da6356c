"""`kvslim eval`: scores an artifact on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvslim.cli import console
from kvslim.cli.failures import verdict
from kvslim.cli.options import Artifact, Json, Threads
from kvslim.cli.progress import Terminal
from kvslim.errors import UsageError


def evaluate(
    artifact: Artifact,
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="NAME,...", help="tasks of lm-evaluation-harness, or .jsonl files")
    ],
    include: Annotated[Path | None, typer.Option(metavar="FOLDER", help="a folder with your own task files")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="use this many items of each task; default: all")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="solved examples per item; default: as the task says")
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(min=0, max=1, help="gate: exit code 3 if the `acc` of a task is lower")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> int:
    """Score an artifact on tasks.

    Runs the tasks with lm-evaluation-harness (extra `eval`). A line of a .jsonl file is {"prompt", "completion"} or
    {"prompt", "choices", "answer"}.
    """
    from kvslim.export.manifest import read_manifest
    from kvslim.report.advice import likely_fix
    from kvslim.report.tables import gates_table, scores_table
    from kvslim.validation.tasks import accuracy_gates
    from kvslim.validation.tasks import evaluate as scores_of

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UsageError("no task is given", where="--tasks", fix="write --tasks lambada_openai,mine.jsonl")
    with console.libraries_apart(), Terminal() as progress:
        scores = scores_of(
            artifact,
            names,
            include=include,
            limit=limit,
            shots=shots,
            threads=threads,
            progress=progress,
        )
    gates = () if min_accuracy is None else accuracy_gates(scores, min_accuracy)
    passed = all(gate.passed for gate in gates)
    if as_json:
        shown = {name: task.model_dump(mode="json") for name, task in scores.items()}
        judged = [gate.model_dump(mode="json") for gate in gates]
        console.print_json("eval", {"passed": passed, "gates": judged, "tasks": shown})
    else:
        console.print_tables(scores_table(scores), gates_table(gates))
    likely = None if passed else likely_fix(read_manifest(artifact).recipe, gates)
    return verdict(passed, gates, str(artifact), likely, "set --min-accuracy to what the task needs")
