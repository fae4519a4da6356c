"""`kvslim validate`: measures an artifact again."""

from __future__ import annotations

from typing import Annotated

import typer

from kvslim.cli import console
from kvslim.cli.failures import SET_GATES, verdict
from kvslim.cli.options import Artifact, GateLimits, HeldOut, Json, Junit, TargetContext
from kvslim.cli.progress import Terminal


def validate(
    artifact: Artifact,
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="default: the model it was made from")] = None,
    context: TargetContext = None,
    validation: HeldOut = None,
    gates: GateLimits = None,
    junit: Junit = None,
    as_json: Json = False,
) -> int:
    """Measure an artifact again.

    On other text or at another context where that is given. Exit code 3 if a gate fails, either of its recipe or of
    --gate.
    """
    from kvslim.cli.inputs import check_target, read_gates, write_junit
    from kvslim.cli.lengths import read_length

    check_target(junit, "--junit")
    limits = read_gates(gates or ())
    tokens = None if context is None else read_length(context, "--context")
    from kvslim import api
    from kvslim.export.manifest import read_manifest
    from kvslim.report.advice import likely_fix
    from kvslim.report.draft import draft_note
    from kvslim.report.tables import gates_table, report_table, timing_note

    with console.libraries_apart(), Terminal() as progress:
        report = api.validate(
            artifact, against=against, context=tokens, validation=validation, gates=limits, progress=progress
        )
    write_junit(junit, report, artifact)
    if as_json:
        console.print_json("validate", report.model_dump(mode="json"))
    else:
        console.print_tables(report_table(report), gates_table(report.gates))
    for note in filter(None, (timing_note(report), draft_note(report.speculation))):
        console.hint(note)
    likely = None if report.passed else likely_fix(read_manifest(artifact).recipe, report.gates)
    return verdict(report.passed, report.gates, str(artifact), likely, SET_GATES)
