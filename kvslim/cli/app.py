"""The command line: each verb parses its options and calls one public function."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from kvslim import __version__
from kvslim.cli import console
from kvslim.cli.failures import READER_GONE, InterruptError, explained, usage_error, verdict
from kvslim.errors import ArtifactError, KvslimError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from kvslim.types import Report

app = typer.Typer(
    name="kvslim",
    help="Turns a Hugging Face model into an ONNX folder with a several times smaller KV cache, measured.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="demo, a model folder, a hub id, or id@revision")]
Artifact = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="a folder that `kvslim compress` wrote")]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", "-r", help="a shipped recipe or a file; default: balanced, for a budget small")
]
Ratio = Annotated[float | None, typer.Option("--kv-ratio", help="budget: cache so many times smaller than plain fp32")]
MibAt = Annotated[str | None, typer.Option("--kv-mib-at", metavar="TOKENS=MIB", help="budget: such as 16k=64")]
TimeRatio = Annotated[
    float | None, typer.Option("--time-ratio", help="budget: expected time per token over plain's, such as 0.7")
]
MaxKl = Annotated[float | None, typer.Option("--max-kl", help="budget: mean KL to plain, nats per token")]
MaxDrop = Annotated[float | None, typer.Option("--max-recall-drop", help="budget: recall lost, in points of 100")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a key of the recipe")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
GateLimits = Annotated[
    list[str] | None,
    typer.Option("--gate", metavar="NAME=LIMIT", help="set a gate beside or in place of the recipe's; repeatable"),
]
Junit = Annotated[Path | None, typer.Option(help="write the gates to this file as JUnit XML")]
WeightKind = Literal["fp32", "int8", "int4"]  # WeightType, whose import would slow down the help
Threads = Annotated[int | None, typer.Option(min=1, help="threads of one operator; default: onnxruntime's choice")]


def main() -> NoReturn:
    """The `kvslim` command."""
    if not console.debugging():
        warnings.simplefilter("ignore")
    console.accept_any_text()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command.

    Args:
        arguments: The command line without the program's name.

    Returns:
        The exit code: 0 ok, 1 bug, 2 usage, 3 gate, 4 unsupported, broken or out of memory, 5 not found, 130 Ctrl-C,
        141 when nobody reads the output any more.
    """
    as_json = "--json" in arguments
    try:
        code = app(arguments or ["--help"], prog_name="kvslim", standalone_mode=False)
        if code == InterruptError.exit_code:
            raise KeyboardInterrupt
        console.flush()
        return (code or 0) if arguments else UsageError.exit_code
    except KeyboardInterrupt:
        error: KvslimError = InterruptError(
            "interrupted", where="kvslim", fix="run it again; nothing half-written is left"
        )
    except (BrokenPipeError, SystemExit):  # the parser makes the one of the other
        console.abandon_stdout()
        return READER_GONE
    except typer.TyperException as caught:
        error = usage_error(caught)
    except BaseException as caught:  # a bug is one line too, and so is a panic, which Rust raises as no Exception
        error = explained(caught)
    return _told(error, as_json)


def _told(error: KvslimError, as_json: bool) -> int:
    """Prints an error, on stderr alone where stdout takes no more; returns its exit code."""
    try:
        console.print_error(error, as_json)
        console.flush()
    except OSError:
        console.abandon_stdout()
        console.print_error(error)
    return error.exit_code


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        console.print_text(f"{__version__}\n")
        raise typer.Exit


@app.command()
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
    from kvslim.cli.inputs import check_target, read_budget, read_plan, read_recipe

    check_target(junit, "--junit")
    typed = read_recipe(recipe, overrides or (), read_budget(kv_ratio, kv_mib_at, time_ratio, max_kl, max_recall_drop))
    decisions = read_plan(plan) if plan else None
    from kvslim import pipeline
    from kvslim.report.tables import gates_table, report_table

    with console.library_output_on_stderr():
        manifest = pipeline.compress(model, typed, out, plan=decisions, overwrite=force, progress=console.Terminal())
    report = manifest.report
    if report:
        _write_junit(junit, report, out)
    if as_json:
        block = report.model_dump(mode="json") if report else {"passed": manifest.passed}
        console.print_json("compress", {"artifact_folder": str(out), **block})
    elif report:
        console.print_tables(report_table(report), gates_table(report.gates))
    console.hint(f"written to {out}")
    return verdict(manifest.passed, report.gates if report else (), str(out))


@app.command()
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


@app.command()
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


@app.command()
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
    from kvslim.cli.inputs import check_target, read_gates

    check_target(junit, "--junit")
    limits = read_gates(gates or ())
    from kvslim import pipeline
    from kvslim.report.tables import gates_table, report_table

    with console.library_output_on_stderr():
        report = pipeline.validate(artifact, against=against, gates=limits, progress=console.Terminal())
    _write_junit(junit, report, artifact)
    if as_json:
        console.print_json("validate", report.model_dump(mode="json"))
    else:
        console.print_tables(report_table(report), gates_table(report.gates))
    return verdict(report.passed, report.gates, str(artifact))


@app.command("eval")
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


@app.command()
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


@app.command()
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


@app.command()
def generate(
    artifact: Artifact,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="the text to continue")] = None,
    file: Annotated[
        str | None, typer.Option(help='JSON lines, {"prompt": ...} or {"messages": [...]}; - for stdin')
    ] = None,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="converse; Ctrl-D ends")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt into the chat template")] = False,
    system: Annotated[str | None, typer.Option(help="the system message; goes with the chat template")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to write at most")] = 128,
    context: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="room in the cache, such as 16k; default: what is needed")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="sample from this many tokens; 0 for all")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="sample from the tokens that hold this share")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="seed of the sampling")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> int:
    """Continue a text, converse, or complete a file of prompts.

    Text is printed as it comes, and then on stderr what it took. Prompts of a file give one JSON object per line; a
    line that cannot be completed gives its error, and exit code 2 at the end.
    """
    from kvslim.cli.generating import Options
    from kvslim.cli.generating import generate as write
    from kvslim.cli.inputs import read_length
    from kvslim.runtime.generate import Sampling

    options = Options(
        chat=chat or system is not None,
        system=system,
        max_new_tokens=max_new_tokens,
        context=None if context is None else read_length(context, "--context"),
        sampling=Sampling(temperature, top_k, top_p, seed),
        threads=threads,
        as_json=as_json,
    )
    return write(artifact, prompt, file, interactive, options)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL|ARTIFACT", help="a model as for compress, or an artifact")],
    contexts: Annotated[str, typer.Option("--context", help="context lengths")] = "4k,16k",
    weights: Annotated[WeightKind | None, typer.Option(help="how a model's weights are stored; default: fp32")] = None,
    devices: Annotated[
        list[str] | None,
        typer.Option("--device", help="limits of a device: a name (docs/devices.md) or a .yaml; may be repeated"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how much memory the KV cache takes, and what devices allow.

    Told from the config, or the manifest and the graph; no weights are read.
    """
    from kvslim.cli.inputs import read_lengths
    from kvslim.cli.inspect import inspect as examine
    from kvslim.devices.profile import load_device
    from kvslim.report.limits import limits_table, stages_table
    from kvslim.report.tables import contexts_table, layers_table

    lengths = read_lengths(contexts, "--context")
    memory = examine(model, lengths, weights, [load_device(name) for name in devices or ()])
    if as_json:
        console.print_json("inspect", memory.model_dump(mode="json"))
        return
    console.print_tables(layers_table(memory), contexts_table(memory))
    console.print_text(f"weights: {memory.weights_mib:,.1f} MiB, {memory.weights}\n")
    console.print_tables(limits_table(memory.devices), stages_table(memory.devices))
    longest = max(lengths)
    if longest > memory.max_context:
        console.hint(f"hint: this model was made for {memory.max_context:,} positions, fewer than {longest:,}")


@app.command()
def verify(artifact: Artifact, as_json: Json = False) -> int:
    """Check the files of an artifact.

    Each is compared with its SHA-256; exit code 4 when one differs, is missing or was added.
    """
    from kvslim.export.manifest import verify as problems_of

    problems = problems_of(artifact)
    if as_json:
        console.print_json("verify", {"ok": not problems, "problems": problems})
    if problems:
        error = ArtifactError("; ".join(problems), where=str(artifact), fix="compress or download it again")
        console.print_error(error)
        return error.exit_code
    if not as_json:
        console.print_text(f"{artifact}: every file is as it was written\n")
    return 0


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods that a recipe can name."""
    from kvslim.cli.catalogue import methods_json, methods_table

    if as_json:
        console.print_json("methods", {"methods": methods_json()})
    else:
        console.print_tables(*methods_table())


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="print this recipe")] = None,
    as_json: Json = False,
) -> None:
    """List the shipped recipes, or print one."""
    from kvslim.cli.catalogue import recipe_text, recipes_json, recipes_table

    if as_json:
        console.print_json("recipes", {"recipes": recipes_json(name)})
    elif name:
        console.print_text(recipe_text(name))
    else:
        console.print_tables(recipes_table())


@app.command()
def doctor(
    measure: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="measure this machine, and write a file for --device")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that this machine can run KVSlim.

    Versions, kernels, memory and disk; exit code 4 when something is wrong.
    """
    from kvslim.cli.catalogue import checks_table, device_table
    from kvslim.cli.doctor import examine, measured

    device = None if measure is None else measured(measure)
    checks = examine()
    failed = [check for check in checks if not check.ok]
    if as_json:
        profile = None if device is None else device.model_dump(mode="json")
        listed = [check.model_dump(mode="json") for check in checks]
        console.print_json("doctor", {"ok": not failed, "checks": listed, "device": profile})
    else:
        console.print_tables(checks_table(checks), *([] if device is None else [device_table(device)]))
    if failed:
        names = ", ".join(check.name for check in failed)
        error = UnsupportedError(f"not fit: {names}", where="this machine", fix=failed[0].fix)
        console.print_error(error)
        raise typer.Exit(error.exit_code)


@app.command()
def schema(
    name: Annotated[str, typer.Argument(metavar="COMMAND", help="a command, or error")],
) -> None:
    """Print the JSON Schema of what a command prints with --json."""
    from kvslim.cli.schemas import schema_of

    console.print_text(f"{json.dumps(schema_of(name), indent=2)}\n")


def _write_junit(path: Path | None, report: Report, artifact: Path) -> None:
    """Writes the gates where a file for them was named; failed ones too."""
    if path:
        from kvslim.cli.inputs import write_text
        from kvslim.report.junit import junit_xml

        write_text(path, junit_xml(report, artifact.resolve().name), "--junit")


if __name__ == "__main__":
    main()
