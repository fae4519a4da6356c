"""What `kvslim methods`, `kvslim recipes` and `kvslim doctor` list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvslim.cli.doctor import Check
from kvslim.devices.profile import Device
from kvslim.errors import NotFoundError, suggestion
from kvslim.methods import METHODS
from kvslim.recipe import load_recipe, shipped_recipes
from kvslim.report.tables import Table


def methods_json() -> dict[str, Any]:
    """Every method with its summary and the schema of its options."""
    return {
        name: {"summary": method.summary, "options": method.model_json_schema().get("properties", {})}
        for name, method in sorted(METHODS.items())
    }


def methods_table() -> tuple[Table, Table]:
    """The methods, and their options with defaults."""
    rows = tuple((name, method.summary) for name, method in sorted(METHODS.items()))
    options = tuple(
        (f"{name}.{option}", str(field.get_default()), field.description or "")
        for name, method in sorted(METHODS.items())
        for option, field in method.model_fields.items()
    )
    return Table(("method", "what it does"), rows, words=True), Table(("option", "default", ""), options, words=True)


def recipes_json(name: str | None = None) -> dict[str, Any]:
    """A recipe in full, or every shipped one, by name.

    Raises:
        NotFoundError: There is none of that name.
    """
    recipes = [load_recipe(known) for known in ([name] if name else shipped_recipes())]
    return {recipe.name: recipe.model_dump(mode="json") for recipe in recipes}


def recipes_table() -> Table:
    """The shipped recipes with their methods."""
    recipes = [load_recipe(name) for name in shipped_recipes()]
    rows = (
        (recipe.name, ", ".join(method.name for method in recipe.methods), recipe.description) for recipe in recipes
    )
    return Table(("recipe", "methods", "what it is for"), tuple(rows), words=True)


def recipe_text(name: str) -> str:
    """A shipped recipe as it is written.

    Raises:
        NotFoundError: There is none of that name.
    """
    known = shipped_recipes()
    if name not in known:
        raise NotFoundError(f"no recipe {name!r}", where="NAME", fix=suggestion(name, known))
    return known[name].read_text(encoding="utf-8")


def checks_table(checks: Sequence[Check]) -> Table:
    """The doctor's findings; advice only where something is wrong or may be slow."""
    rows = tuple((check.name, "ok" if check.ok else "FAILED", check.found, check.fix) for check in checks)
    return Table(("check", "", "found", "advice"), rows, words=True)


def device_table(device: Device) -> Table:
    """A device's numbers with their sources."""
    rows = tuple((name, f"{value.value:g}", value.source) for name, value in device if name != "name")
    return Table((device.name, "", "source"), rows, words=True)
