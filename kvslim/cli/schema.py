"""`kvslim schema`: prints the JSON Schema of what a command prints."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from kvslim.cli import console


def schema(
    name: Annotated[str, typer.Argument(metavar="COMMAND", help="a command, or error")],
) -> None:
    """Print the JSON Schema of what a command prints with --json."""
    from kvslim.cli.schemas import schema_of

    console.print_text(f"{json.dumps(schema_of(name), indent=2)}\n")
