"""What `kvslim compare` reads, and its exit code when something is worse than the baseline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from kvslim.cli import console
from kvslim.errors import GateError, NotFoundError, UsageError, fault_of
from kvslim.export.manifest import read_manifest
from kvslim.report.compare import Comparison, Regression
from kvslim.types import Manifest


def read_artifacts(folders: Sequence[Path]) -> dict[str, Manifest]:
    """The manifests by folder name, or by path if two folders have the same name.

    Raises:
        NotFoundError, ArtifactError: A manifest cannot be read.
    """
    names = [folder.resolve().name for folder in folders]
    unique = len(set(names)) == len(names)
    return {name if unique else str(folder): read_manifest(folder) for name, folder in zip(names, folders, strict=True)}


def read_baseline(path: Path) -> Comparison:
    """A comparison from a JSON file, as `kvslim compare --json` prints it.

    Raises:
        NotFoundError: There is no such file.
        UsageError: It is not JSON, or not a comparison.
    """
    where, fix = f"--against {path}", "write one with `kvslim compare ARTIFACT... --json > baseline.json`"
    if not path.is_file():
        raise NotFoundError("no such baseline", where=where, fix=fix)
    try:
        data = json.loads(path.read_bytes())
        return Comparison.model_validate({"artifacts": data.get("artifacts")} if isinstance(data, dict) else data)
    except ValidationError as error:
        raise UsageError(fault_of(error.errors()[0], "baseline"), where=where, fix=fix) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"this is not JSON: {error}", where=where, fix=fix) from error


def regression_verdict(found: Sequence[Regression] | None, baseline: str, fails: bool) -> int:
    """The exit code of a comparison. Regressions are named on stderr, because stdout already holds the result."""
    if found is None:
        return 0
    if not found:
        console.hint(f"nothing is worse than the baseline {baseline}")
        return 0
    named = ", ".join(f"{one.artifact}: {one.measure}" for one in found)
    error = GateError(
        f"worse than the baseline: {named}", where=baseline, fix="find out what changed, or write a new baseline"
    )
    if fails:
        console.print_error(error)
        return error.exit_code
    console.hint(error.message)
    return 0
