"""The verbs that tell of KVSlim itself and of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvslim.cli import console
from kvslim.cli.options import Json
from kvslim.errors import UnsupportedError


def methods(as_json: Json = False) -> None:
    """List the methods that a recipe can name."""
    from kvslim.cli.catalogue import methods_json, methods_table

    if as_json:
        console.print_json("methods", {"methods": methods_json()})
    else:
        console.print_tables(*methods_table())


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


def schema(
    name: Annotated[str, typer.Argument(metavar="COMMAND", help="a command, or error")],
) -> None:
    """Print the JSON Schema of what a command prints with --json."""
    from kvslim.cli.schemas import schema_of

    console.print_text(f"{json.dumps(schema_of(name), indent=2)}\n")
