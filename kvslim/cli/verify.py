"""`kvslim verify`: checks the files of an artifact."""

from __future__ import annotations

from kvslim.cli import console
from kvslim.cli.options import Artifact, Json
from kvslim.errors import ArtifactError


def verify(artifact: Artifact, as_json: Json = False) -> int:
    """Check the files of an artifact.

    Compares each file with its SHA-256; exit code 4 if one differs, is missing or was added.
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
