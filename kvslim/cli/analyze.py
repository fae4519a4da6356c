"""`kvslim analyze`: shows which layers and heads a task needs least."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvslim.cli import console
from kvslim.cli.options import Json, Model, Overrides, RayAddress, TargetContext, WeightWord, WorkerCount
from kvslim.cli.progress import Terminal

if TYPE_CHECKING:
    from kvslim.planning.analyze import Analysis


def analyze(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            "--calibration",
            "--data",
            "-d",
            metavar="SOURCE",
            help="text of your task: self, a .txt or .jsonl file, or hub:DATASET[:SPLIT]",
        ),
    ] = "self",
    svg: Annotated[
        Path | None, typer.Option(help="draw a heat map: parts by their KL, heads by what they contribute")
    ] = None,
    weights: WeightWord = None,
    context: TargetContext = None,
    overrides: Overrides = None,
    workers: WorkerCount = None,
    ray: RayAddress = None,
    as_json: Json = False,
) -> None:
    """Show which layers and heads a task needs least.

    Measures KL on the task's text with parts left out: the attention of each layer, its feed-forward part, both, and
    each kv head. Then says what the words mean, and what follows.
    Writes no graph.
    """
    from kvslim.cli.inputs import check_target, read_recipe, read_words, write_text

    check_target(svg, "--svg")
    typed = read_recipe("lossless", overrides or (), None, words=read_words(weights, data, context))
    from kvslim import api
    from kvslim.report.analysis import heads_table, parts_table, words
    from kvslim.report.heatmap import analysis_panels, heatmap

    with console.libraries_apart(), Terminal() as progress:
        analysis = api.analyze(model, typed, progress=progress, workers=workers, ray=ray)
    if svg:
        title = f"KL without each part, and what each query head contributes: {model}, {analysis.source}"
        write_text(svg, heatmap(title, analysis_panels(analysis)), "--svg")
    if as_json:
        console.print_json("analyze", analysis.model_dump(mode="json"))
    else:
        console.print_tables(parts_table(analysis), heads_table(analysis))
        lines = [*words(), "", "What follows:", *_followings(model, data, analysis), ""]
        console.print_text("\n".join(lines))


def _followings(model: str, data: str, analysis: Analysis) -> Iterator[str]:
    """Sentences, with what to type for the removals, and for all kinds of savings weighed against each other."""
    from kvslim.report.analysis import TOLERABLE, conclusions, spare, without

    text = [] if data == "self" else ["--calibration", data]
    first, *others = (f"- {sentence}" for sentence in conclusions(analysis))
    yield first
    if found := spare(analysis, TOLERABLE):
        settings = ["--set", f"methods={without(analysis, found)}", "--set", f"gates.max_kl={TOLERABLE}"]
        judged = ["--validation", data] if text else []
        yield f"  kvslim compress {shlex.join([model, '-r', 'lossless', '-o', 'OUT', *text, *judged, *settings])}"
    yield from others
    yield "- The planner weighs all of these against fewer bits and ranks, by measurement:"
    yield f"  kvslim plan {shlex.join([model, '--kv-ratio', '8', *text])}"
