"""What `kvslim compare` reads and prints, and how it tells of regressions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from kvslim.cli import console
from kvslim.cli.inputs import write_text
from kvslim.devices.profile import device_memory
from kvslim.errors import GateError, NotFoundError, UsageError
from kvslim.export.manifest import read_manifest
from kvslim.report.compare import (
    Comparison,
    Regression,
    compared,
    comparison_table,
    regressions,
    regressions_table,
)
from kvslim.types import Manifest


def compare(folders: Sequence[Path], html: Path | None, against: Path | None, fails: bool, as_json: bool) -> int:
    """Prints artifacts side by side, and writes their page.

    Args:
        folders: The artifacts.
        html: The page to write.
        against: The baseline to compare with.
        fails: Whether a regression is an error.
        as_json: Whether to print JSON in place of tables.

    Returns:
        The exit code.

    Raises:
        KvslimError: An artifact or the baseline cannot be read, or the page cannot be written.
    """
    manifests = read_artifacts(folders)
    comparison = compared(manifests)
    found = regressions(comparison, read_baseline(against)) if against else None
    if html:
        from kvslim.report.page import comparison_page

        write_text(html, comparison_page(comparison, manifests, found, device_memory()), "--html")
    if as_json:
        worse = None if found is None else [one.model_dump(mode="json") for one in found]
        console.print_json("compare", {**comparison.model_dump(mode="json"), "regressions": worse})
    else:
        console.print_tables(comparison_table(comparison), regressions_table(found or ()))
    return told(found, str(against), fails)


def read_artifacts(folders: Sequence[Path]) -> dict[str, Manifest]:
    """The manifests by the names of their folders, or by their paths where two have one name.

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
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"]) or "baseline"
        raise UsageError(f"{place}: {fault['msg']}", where=where, fix=fix) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"this is not JSON: {error}", where=where, fix=fix) from error


def told(found: Sequence[Regression] | None, baseline: str, fails: bool) -> int:
    """The exit code of a comparison; regressions are named on stderr, as stdout has the result already."""
    if found is None:
        return 0
    if not found:
        console.hint(f"nothing is worse than in {baseline}")
        return 0
    named = ", ".join(f"{one.artifact}: {one.measure}" for one in found)
    error = GateError(
        f"worse than the baseline: {named}", where=baseline, fix="see what changed, or write a new baseline"
    )
    if fails:
        console.print_error(error)
        return error.exit_code
    console.hint(error.message)
    return 0
