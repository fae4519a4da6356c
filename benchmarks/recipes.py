"""The demo model under each shipped recipe, next to its plain export, as `kvslim compress` measures it.

python benchmarks/recipes.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from kvslim.pipeline import compress
from kvslim.recipe import load_recipe
from kvslim.report.tables import measures_table
from kvslim.types import Measures

RECIPES = ("lossless", "balanced", "small")


def main() -> None:
    """Prints a markdown table with one column per recipe."""
    columns: dict[str, Measures] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in RECIPES:
            report = compress("demo", load_recipe(name), Path(folder) / name).report
            if report is not None:
                columns.setdefault("plain", report.plain)
                columns[f"`{name}`"] = report.artifact
                columns["floor"] = report.floor
    columns["floor"] = columns.pop("floor")
    print(measures_table(columns).markdown(), end="")


if __name__ == "__main__":
    main()
