"""The verbs that measure artifacts, or set what was measured side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvslim.cli import console
from kvslim.cli.failures import verdict
from kvslim.cli.options import Artifact, GateLimits, Json, Junit, Threads
from kvslim.errors import UsageError


def validate(
    artifact: Artifact,
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="default: the model it was made from")] = None,
    gates: GateLimits = None,
    junit: Junit = None,
    as_json: Json = False,
) -> int:
    """Measure an artifact again.

    Exit code 3 when a gate fails: one of its recipe, or of --gate.
    """
    from kvslim.cli.inputs import check_target, read_gates, write_junit

    check_target(junit, "--junit")
    limits = read_gates(gates or ())
    from kvslim import pipeline
    from kvslim.report.tables import gates_table, report_table

    with console.library_output_on_stderr():
        report = pipeline.validate(artifact, against=against, gates=limits, progress=console.Terminal())
    write_junit(junit, report, artifact)
    if as_json:
        console.print_json("validate", report.model_dump(mode="json"))
    else:
        console.print_tables(report_table(report), gates_table(report.gates))
    return verdict(report.passed, report.gates, str(artifact))


def evaluate(
    artifact: Artifact,
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="NAME,...", help="tasks of lm-evaluation-harness, or .jsonl files")
    ],
    include: Annotated[Path | None, typer.Option(metavar="FOLDER", help="a folder with task files of your own")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="use so many items of each task; default: all")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="solved examples per item; default: the task's own")] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(min=0, max=1, help="a gate: exit code 3 when a task's `acc` is below")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> int:
    """Score an artifact on tasks.

    Runs them through lm-evaluation-harness (extra `eval`). A line of a .jsonl file is {"prompt", "completion"} or
    {"prompt", "choices", "answer"}.
    """
    from kvslim.report.tables import gates_table, scores_table
    from kvslim.validate.tasks import accuracy_gates
    from kvslim.validate.tasks import evaluate as scores_of

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UsageError("no task is named", where="--tasks", fix="write --tasks lambada_openai,mine.jsonl")
    with console.library_output_on_stderr():
        scores = scores_of(
            artifact,
            names,
            include=include,
            limit=limit,
            shots=shots,
            threads=threads,
            progress=console.Terminal(),
        )
    gates = () if min_accuracy is None else accuracy_gates(scores, min_accuracy)
    passed = all(gate.passed for gate in gates)
    if as_json:
        shown = {name: task.model_dump(mode="json") for name, task in scores.items()}
        judged = [gate.model_dump(mode="json") for gate in gates]
        console.print_json("eval", {"passed": passed, "gates": judged, "tasks": shown})
    else:
        console.print_tables(scores_table(scores), gates_table(gates))
    return verdict(passed, gates, str(artifact))


def compare(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="folders to put side by side")],
    html: Annotated[Path | None, typer.Option(help="write a page with tables and figures to this file")] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="baseline: what `kvslim compare --json` printed before")
    ] = None,
    fail_on_regression: Annotated[
        bool, typer.Option("--fail-on-regression", help="exit code 3 when a measure is worse than the baseline")
    ] = False,
    as_json: Json = False,
) -> int:
    """Put artifacts side by side.

    Reads what their manifests say was measured; measures nothing itself. The printed JSON is a baseline for later.
    """
    from kvslim.cli.comparing import compare as side_by_side
    from kvslim.cli.inputs import check_target

    check_target(html, "--html")
    if fail_on_regression and against is None:
        raise UsageError("there is no baseline", where="--fail-on-regression", fix="add --against baseline.json")
    return side_by_side(artifacts, html, against, fail_on_regression, as_json)


def bench(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="folders to time, interleaved")],
    contexts: Annotated[str, typer.Option("--context", help="contexts for time per token")] = "128,1k",
    prompts: Annotated[str, typer.Option("--prompt", help="prompt lengths for time to first token")] = "128,512",
    threads: Annotated[
        str | None, typer.Option(metavar="N,...", help="threads of one operator; default: onnxruntime's choice")
    ] = None,
    batches: Annotated[str, typer.Option("--batch", metavar="N,...", help="sequences side by side")] = "1",
    repeats: Annotated[int, typer.Option(min=3, help="timings per point of the grid")] = 16,
    csv: Annotated[Path | None, typer.Option(help="write one row per timing to this file")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write the tables to this file")] = None,
    as_json: Json = False,
) -> None:
    """Time artifacts against each other, over a grid of lengths, threads and batches.

    All of them take turns in one run, so that a busy machine slows all alike.
    """
    from kvslim.cli.inputs import check_target, read_grid, write_text

    for path, option in ((csv, "--csv"), (markdown, "--markdown")):
        check_target(path, option)
    grid = read_grid(prompts, contexts, threads, batches, repeats)
    from kvslim import pipeline
    from kvslim.report.bench import bench_csv, costs_table, timings_table

    with console.library_output_on_stderr():
        results = pipeline.bench(artifacts, grid)
    tables = costs_table(results), timings_table(results)
    if csv:
        write_text(csv, bench_csv(results), "--csv")
    if markdown:
        write_text(markdown, "\n".join(table.markdown() for table in tables), "--markdown")
    if as_json:
        columns = {name: result.model_dump(mode="json") for name, result in results.items()}
        console.print_json("bench", {"artifacts": columns})
    else:
        console.print_tables(*tables)
