"""Prints how much worse each measure may get before `kvslim compare` calls it a regression, as a markdown table."""

from __future__ import annotations

from kvslim.report.compare import LATENCY, QUALITY, Tolerance
from kvslim.report.tables import METRICS


def main() -> None:
    """Prints the table."""
    print("| measure | | worse is | by more than |\n|---|---|---|---|")
    for name, tolerance in {**QUALITY, **LATENCY}.items():
        label = METRICS[name][0].split(", prompt")[0].split(", context")[0].split(", text")[0]
        factor = ", as a factor to plain" if name in LATENCY else ""
        print(f"| `{name}` | {label}{factor} | {'more' if tolerance.sign > 0 else 'less'} | {_words(tolerance)} |")


def _words(tolerance: Tolerance) -> str:
    parts = [f"{tolerance.relative:.1%}"] if tolerance.relative else []
    return " and ".join([*parts, *([f"{tolerance.absolute:g}"] if tolerance.absolute else [])])


if __name__ == "__main__":
    main()
