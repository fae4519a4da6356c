"""`kvslim compare`: puts artifacts side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvslim.cli import console
from kvslim.cli.options import Json
from kvslim.errors import UsageError


def compare(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="folders to put side by side")],
    html: Annotated[Path | None, typer.Option(help="write a page with tables and figures to this file")] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="baseline: earlier output of `kvslim compare --json`")
    ] = None,
    fail_on_regression: Annotated[
        bool, typer.Option("--fail-on-regression", help="exit code 3 when a measure is worse than the baseline")
    ] = False,
    as_json: Json = False,
) -> int:
    """Put artifacts side by side.

    Reads the measurements in their manifests and measures nothing itself. The JSON can be a baseline for later runs.
    """
    from kvslim.cli.baseline import read_artifacts, read_baseline, regression_verdict
    from kvslim.cli.inputs import check_target, write_text
    from kvslim.report.compare import compared, comparison_table, regressions, regressions_table

    check_target(html, "--html")
    if fail_on_regression and against is None:
        raise UsageError("no baseline is given", where="--fail-on-regression", fix="add --against baseline.json")
    manifests = read_artifacts(artifacts)
    comparison = compared(manifests)
    found = regressions(comparison, read_baseline(against)) if against else None
    if html:
        from kvslim.devices.profile import device_memory
        from kvslim.report.page import comparison_page

        write_text(html, comparison_page(comparison, manifests, found, device_memory()), "--html")
    if as_json:
        worse = None if found is None else [one.model_dump(mode="json") for one in found]
        console.print_json("compare", {**comparison.model_dump(mode="json"), "regressions": worse})
    else:
        console.print_tables(comparison_table(comparison), regressions_table(found or ()))
    return regression_verdict(found, str(against), fail_on_regression)
