"""`kvslim doctor`: checks that this machine can run KVSlim."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvslim.cli import console
from kvslim.cli.options import Json
from kvslim.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from kvslim.cli.machine import Check
    from kvslim.devices.profile import Device
    from kvslim.report.tables import Table


def doctor(
    measure: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="measure this machine and write a file for `kvslim inspect --device`"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that this machine can run KVSlim.

    Checks versions, kernels, memory and disk; exit code 4 if something is wrong.
    """
    from kvslim.cli.machine import examine

    device = None if measure is None else _measured(measure)
    checks = examine()
    failed = [check for check in checks if not check.ok]
    if as_json:
        profile = None if device is None else device.model_dump(mode="json")
        listed = [check.model_dump(mode="json") for check in checks]
        console.print_json("doctor", {"ok": not failed, "checks": listed, "device": profile})
    else:
        console.print_tables(_checks_table(checks), *([] if device is None else [_device_table(device)]))
    if failed:
        names = ", ".join(check.name for check in failed)
        error = UnsupportedError(f"failed checks: {names}", where="this machine", fix=failed[0].fix)
        console.print_error(error)
        raise typer.Exit(error.exit_code)


def _measured(path: Path) -> Device:
    """This machine's profile, written to a file that `kvslim inspect --device` reads."""
    from kvslim.cli.inputs import check_target, write_text
    from kvslim.devices.profile import SUFFIXES, device_text

    check_target(path, "--measure")
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"{path.name!r} is not a YAML file", where="--measure", fix=f"write --measure {path.stem}.yaml"
        )
    # Imported only now: it loads onnxruntime, and a wrong file name should be refused at once.
    from kvslim.devices.measure import measure_device

    device = measure_device()
    write_text(path, device_text(device), "--measure")
    return device


def _checks_table(checks: Sequence[Check]) -> Table:
    """The findings, with advice only if something is wrong or may be slow."""
    from kvslim.report.tables import Table

    rows = tuple((check.name, "ok" if check.ok else "FAILED", check.found, check.fix) for check in checks)
    return Table(("check", "", "found", "advice"), rows, words=True)


def _device_table(device: Device) -> Table:
    """A device's numbers with their sources."""
    from kvslim.report.tables import Table

    numbers = {name: value for name, value in device if name not in {"name", "kernels"}} | device.kernels
    rows = tuple((name, f"{value.value:g}", value.source) for name, value in numbers.items())
    return Table((device.name, "", "source"), rows, words=True)
