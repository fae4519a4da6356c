"""`kvslim methods`: lists the methods that a recipe can name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvslim.cli import console
from kvslim.cli.options import Json

if TYPE_CHECKING:
    from kvslim.methods import Method
    from kvslim.report.tables import Table


def methods(as_json: Json = False) -> None:
    """List the methods that a recipe can name."""
    from kvslim.methods import METHODS

    known = dict(sorted(METHODS.items()))
    if as_json:
        console.print_json("methods", {"methods": _fields(known)})
    else:
        console.print_tables(*_tables(known))


def _fields(known: dict[str, type[Method]]) -> dict[str, Any]:
    """Every method with its summary and the schema of its options."""
    return {
        name: {"summary": method.summary, "options": method.model_json_schema().get("properties", {})}
        for name, method in known.items()
    }


def _tables(known: dict[str, type[Method]]) -> tuple[Table, Table]:
    """The methods, and their options with defaults."""
    from kvslim.report.tables import Table

    rows = tuple((name, method.summary) for name, method in known.items())
    options = tuple(
        (f"{name}.{option}", str(field.get_default()), field.description or "")
        for name, method in known.items()
        for option, field in method.model_fields.items()
    )
    return Table(("method", "what it does"), rows, words=True), Table(("option", "default", ""), options, words=True)
