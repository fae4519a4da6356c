"""The file of a sweep: models, and what is to be made of each of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from kvslim.contract import Frozen
from kvslim.errors import NotFoundError, UsageError, fault_of, suggestion
from kvslim.recipe import Recipe, load_recipe
from kvslim.settings import Budget
from kvslim.yaml_file import read_yaml

EXAMPLE = "models: [demo]\nrecipes: [lossless]\nbudgets: [{kv_ratio: 8}]\n"


class Sweep(Frozen):
    """What a sweep is to make: every recipe and every budget of every model."""

    models: tuple[str, ...] = Field(min_length=1, description="as for `kvslim compress`")
    recipes: tuple[str, ...] = Field((), description="shipped recipes, or recipe files")
    budgets: tuple[Budget, ...] = Field((), description="limits for the planner, with what `small` asks of quality")
    set: tuple[str, ...] = Field((), description="changes of every recipe, such as calibration.samples=8")

    @model_validator(mode="after")
    def _makes_something(self) -> Sweep:
        if not self.recipes and not self.budgets:
            raise ValueError("give recipes or budgets")
        return self


class Job(Frozen):
    """One artifact to make.

    Attributes:
        name: Its folder within the sweep's, unique.
        model: As for `kvslim compress`.
        recipe: What to make of it.
    """

    name: str
    model: str
    recipe: Recipe


def read_sweep(path: Path) -> Sweep:
    """A sweep from its file.

    Raises:
        NotFoundError: There is no such file.
        UsageError: It is not YAML, or a key or value is wrong.
    """
    if not path.is_file():
        raise NotFoundError("no such sweep file", where=str(path), fix="write one as docs/scale.md shows")
    try:
        return Sweep.model_validate(read_yaml(path))
    except ValidationError as error:
        fault = error.errors()[0]
        raise UsageError(fault_of(fault, "sweep"), where=str(path), fix=_fix(fault)) from error


def _fix(fault: Any) -> str:
    example = f"write it like: {EXAMPLE.strip()!r}"
    if fault["type"] != "extra_forbidden":
        return example
    *above, key = fault["loc"]
    return suggestion(key, Budget.model_fields if above else Sweep.model_fields)


def jobs_of(sweep: Sweep) -> list[Job]:
    """The artifacts to make, model by model.

    Raises:
        NotFoundError, UsageError: As `load_recipe`; or two would have the same name.
    """
    recipes = list(_recipes(sweep))
    found = [
        Job(name=f"{_slug(model)}/{name}", model=model, recipe=recipe)
        for model in sweep.models
        for name, recipe in recipes
    ]
    name, count = Counter(job.name for job in found).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{count} jobs are called {name}", where="sweep", fix="give models and recipes other names")
    return found


def _recipes(sweep: Sweep) -> Iterator[tuple[str, Recipe]]:
    for name in sweep.recipes:
        yield _slug(name.removesuffix(".yaml")), _loaded(name, sweep)
    for budget in sweep.budgets:
        name = "-".join(f"{limit}-{value:g}" for limit, value in budget.model_dump(exclude_none=True).items())
        yield name, _loaded("small", sweep).unsized(name).within(budget)


def _loaded(name: str, sweep: Sweep) -> Recipe:
    """A recipe with what the sweep changes; what is wrong is told as the file has it, which knows no options."""
    try:
        return load_recipe(name, sweep.set)
    except (UsageError, NotFoundError) as error:
        where = f"sweep: {error.where.removeprefix('--')}"
        raise type(error)(error.message, where=where, fix=error.fix) from error


def _slug(name: str) -> str:
    """A folder's name for a model or recipe: the last part of a path, with nothing unusual in it."""
    return re.sub(r"[^\w.+-]+", "-", Path(name).name).strip("-.") or "model"
