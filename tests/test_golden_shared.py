"""The promises on a model and a text that we did not make for the purpose: real prose."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvslim.measures import Report
from kvslim.pipeline import compress
from kvslim.recipe import load_recipe

pytestmark = pytest.mark.golden


def report_of(shared: Path, recipe: str, out: Path) -> Report:
    overrides = [
        f"calibration.source={shared / 'text' / 'calibration.txt'}",
        f"validation.source={shared / 'text' / 'heldout.txt'}",
        "validation.samples=6",
        "validation.recall_items=1",
        "validation.repeats=3",
        "validation.prompts=[16]",
        "validation.contexts=[16]",
        "weights=fp32",
    ]
    report = compress(str(shared / "models" / "books-llama"), load_recipe(recipe, overrides), out).report
    assert report is not None
    return report


@pytest.mark.parametrize(
    ("recipe", "most"),
    [
        ("lossless", 0.001),
        pytest.param("balanced", 0.01, marks=pytest.mark.thorough),
        pytest.param("small", 0.05, marks=pytest.mark.thorough),
    ],
)
def test_divergence_stays_small_on_held_out_prose(shared: Path, tmp_path: Path, recipe: str, most: float) -> None:
    report = report_of(shared, recipe, tmp_path / "out")
    assert report.artifact.kl_mean is not None
    assert report.floor.kl_mean is not None
    assert report.floor.kl_mean < report.artifact.kl_mean <= most
    assert 30 < (report.plain.perplexity or 0) < 70
