"""How much text benchmarks calibrate and validate on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.subjects import Source
from kvslim.recipe import Recipe, parse_recipe

Text = Mapping[str, Mapping[str, Any]]
LENGTH = 512
FULL = {
    "calibration": {"samples": 64, "length": LENGTH, "context": LENGTH},
    "validation": {"samples": 24, "length": LENGTH, "recall_items": 100, "recall_distance": 320},
}
USUAL = {
    "calibration": {"samples": 16, "length": LENGTH, "context": LENGTH},
    "validation": {"samples": 8, "length": LENGTH},
}  # as much as a recipe takes by default
BRIEF = {
    "calibration": {"samples": 4, "length": 48, "context": 48},
    "validation": {"samples": 2, "length": 48, "recall_items": 2, "recall_distance": 16},
}
LITTLE = {"calibration": {"samples": 2, "length": 64}}  # for graphs whose time or memory alone counts


def recipe_of(source: Source, text: Text, **settings: Any) -> Recipe:
    """A recipe that calibrates and validates on a source's texts."""
    sources = {"calibration": source.calibration, "validation": source.validation}
    parts = {part: {**text.get(part, {}), "source": path} for part, path in sources.items()}
    return parse_recipe({"name": "benchmark", **parts, **settings}, where="benchmark")
