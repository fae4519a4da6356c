"""`kvslim analyze`: shows which layers and heads a task needs least."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvslim.cli import console
from kvslim.cli.options import Json, Model, Overrides
from kvslim.cli.progress import Terminal


def analyze(
    model: Model,
    data: Annotated[
        str, typer.Option("--data", "-d", metavar="SOURCE", help="text of the task: self, .txt, .jsonl, or hub:DATASET")
    ] = "self",
    svg: Annotated[
        Path | None, typer.Option(help="draw a heat map: parts by their KL, heads by what they contribute")
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show which layers and heads a task needs least.

    Measures KL on the task's text with parts left out: the attention of each layer, its feed-forward part, both, and
    each kv head.
    Writes no graph.
    """
    from kvslim.cli.inputs import check_target, read_recipe, write_text

    check_target(svg, "--svg")
    settings = [f"calibration.source={json.dumps(data)}", *(overrides or ())]
    typed = read_recipe("lossless", settings, None)
    from kvslim import api
    from kvslim.report.heatmap import analysis_panels, heatmap
    from kvslim.report.tables import heads_table, parts_table

    with console.libraries_apart(), Terminal() as progress:
        analysis = api.analyze(model, typed, progress=progress)
    if svg:
        title = f"KL without each part, and what each query head contributes: {model}, {analysis.source}"
        write_text(svg, heatmap(title, analysis_panels(analysis)), "--svg")
    if as_json:
        console.print_json("analyze", analysis.model_dump(mode="json"))
    else:
        console.print_tables(parts_table(analysis), heads_table(analysis))
