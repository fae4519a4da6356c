"""Prints a table of arm64 against x86, from what `make test-arm` found.

    python tools/arm_table.py [OUTCOMES]

OUTCOMES is pytest's JUnit report, by default build/arm/outcomes.xml.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

OUTCOMES = Path(__file__).resolve().parent.parent / "build" / "arm" / "outcomes.xml"
COLUMNS = {
    "apart": "arm64 against x86",
    "noise": "one token against many, x86",
    "cost": "inputs rounded against not, x86",
    "cost_there": "the same, arm64",
    "exact": "arm64 against x86, inputs not rounded",
    "continued": "x86 over arm64's cache, for each token",
}


def shown(number: str) -> str:
    """A largest difference of logits; nothing for what was not measured."""
    return "-" if number == "None" else f"{float(number):.0e}"


def main() -> None:
    path = Path(sys.argv[1]) if sys.argv[1:] else OUTCOMES
    if not path.is_file():
        sys.exit(f"error: no outcomes at {path}\n  fix: run `make test-arm`")
    recorded = [
        {entry.get("name", ""): entry.get("value", "") for entry in case.iter("property")}
        for case in ElementTree.parse(path).iter("testcase")
    ]
    names = [*COLUMNS.values(), "but for tokens on an edge"]
    print(f"| graph | {' | '.join(names)} |\n| ---{' | ---:' * len(names)} |")
    for found in recorded:
        if "graph" in found:
            numbers = [shown(found[key]) for key in COLUMNS]
            print(f"| {found['graph']} | {' | '.join(numbers)} | {found['edges'].replace('None', '-')} |")
    (size,) = (found["bundle_mib"] for found in recorded if "bundle_mib" in found)
    print(f"\nThe demo's bundle for linux-aarch64: {float(size):.1f} MiB.")


if __name__ == "__main__":
    main()
