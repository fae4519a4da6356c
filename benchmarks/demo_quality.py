"""The demo model's quality under given recipes: shared by the benchmarks beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kvslim.demo.world import heldout_text
from kvslim.load.source import read_spec, resolve
from kvslim.pipeline import decide
from kvslim.progress import Silent
from kvslim.recipe import Recipe, load_recipe
from kvslim.runtime.session import DecodeSession
from kvslim.types import Plan
from kvslim.validate.quality import Quality, measure_quality
from kvslim.workshop import Workshop


def recipe_with(name: str, *overrides: str, methods: int | None = None) -> Recipe:
    """A shipped recipe with overrides and, if given, its first `methods` methods alone."""
    recipe = load_recipe(name, overrides)
    return recipe.model_copy(update={"methods": recipe.methods[:methods]})


def qualities(recipes: Mapping[str, Recipe], documents: int, length: int) -> dict[str, Quality]:
    """Each recipe's quality on held-out stories, through the cache in chunks of 16, against the plain export."""
    with tempfile.TemporaryDirectory() as folder:
        plain = _open(next(iter(recipes.values())))
        tokenizer = plain.tokenizer
        windows = np.stack([tokenizer(text).input_ids[:length] for text in heldout_text(documents, words=length)])
        teacher = _session(plain, Plan.identity(plain.spec), Path(folder) / "plain", length)
        return {
            name: measure_quality(teacher, _slim(recipe, Path(folder) / str(index), length), windows)
            for index, (name, recipe) in enumerate(recipes.items())
        }


def _open(recipe: Recipe) -> Workshop:
    snapshot = resolve("demo")
    return Workshop(snapshot, read_spec(snapshot), recipe, Silent())


def _slim(recipe: Recipe, folder: Path, length: int) -> DecodeSession:
    workshop = _open(recipe)
    statistics = workshop.statistics()
    plan = decide(recipe, workshop.spec, statistics)
    workshop.install(workshop.codes(statistics, plan))
    return _session(workshop, plan, folder, length)


def _session(workshop: Workshop, plan: Plan, folder: Path, length: int) -> DecodeSession:
    folder.mkdir()
    workshop.export(plan, folder)
    return DecodeSession(folder, capacity=length, all_positions=True)
