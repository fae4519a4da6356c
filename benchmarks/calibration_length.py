"""Calibrating short and deploying long: KL at 2,048 tokens by calibration length, with and without RoPE-aware moments.

    python benchmarks/calibration_length.py [--recipe balanced]

The same number of calibration tokens in every row. "As seen" averages over the calibration length alone.
"""

from __future__ import annotations

import argparse

from demo_quality import qualities, recipe_with

LENGTH = 2048
TOKENS = 32768


def main() -> None:
    """Prints a markdown table of mean KL by calibration length and target context."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="balanced")
    name = parser.parse_args().recipe
    rows = {"2,048 tokens": (LENGTH, LENGTH), "256 tokens": (256, LENGTH), "256 tokens, as seen": (256, 256)}
    recipes = {
        row: recipe_with(
            name,
            f"calibration.length={length}",
            f"calibration.samples={TOKENS // length}",
            f"calibration.context={context}",
        )
        for row, (length, context) in rows.items()
    }
    measured = qualities(recipes, documents=4, length=LENGTH)
    reference = measured["2,048 tokens"].kl_mean
    print("| calibrated at | KL | against 2,048 |\n|---|---:|---:|")
    for row, quality in measured.items():
        print(f"| {row} | {quality.kl_mean:.2g} | {quality.kl_mean / reference:.2f} |")


if __name__ == "__main__":
    main()
