"""`kvslim recipes`: lists the shipped recipes, or prints one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvslim.cli import console
from kvslim.cli.options import Json
from kvslim.errors import NotFoundError, suggestion

if TYPE_CHECKING:
    from kvslim.report.tables import Table


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="print this recipe")] = None,
    as_json: Json = False,
) -> None:
    """List the shipped recipes, or print one."""
    path = None if name is None else _path(name)
    if as_json:
        console.print_json("recipes", {"recipes": _fields(name)})
    elif path:  # as it is written, with its comments
        console.print_text(path.read_text(encoding="utf-8"))
    else:
        console.print_tables(_table())


def _fields(name: str | None) -> dict[str, Any]:
    """A recipe in full, or every shipped one, by name."""
    from kvslim.recipe import load_recipe, shipped_recipes

    recipes = [load_recipe(known) for known in ([name] if name else shipped_recipes())]
    return {recipe.name: recipe.model_dump(mode="json") for recipe in recipes}


def _table() -> Table:
    """The shipped recipes with their methods."""
    from kvslim.recipe import load_recipe, shipped_recipes
    from kvslim.report.tables import Table

    recipes = [load_recipe(name) for name in shipped_recipes()]
    rows = (
        (recipe.name, ", ".join(method.name for method in recipe.methods), recipe.description) for recipe in recipes
    )
    return Table(("recipe", "methods", "what it is for"), tuple(rows), words=True)


def _path(name: str) -> Path:
    """The file of a shipped recipe."""
    from kvslim.recipe import shipped_recipes

    known = shipped_recipes()
    if name not in known:
        raise NotFoundError(f"no recipe {name!r}", where="NAME", fix=suggestion(name, known))
    return known[name]
