"""Balanced truncation against plain key-PCA at equal rank, on the demo model's held-out stories, cache in float32.

python benchmarks/objective.py [--ranks 16,32,48]
"""

from __future__ import annotations

import argparse

from demo_quality import qualities, recipe_with


def main() -> None:
    """Prints a markdown table of mean KL by rank and objective."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="16,32,48")
    ranks = [int(text) for text in parser.parse_args().ranks.split(",")]
    recipes = {
        f"{rank} {objective}": recipe_with(
            "balanced",
            f"methods.kv_pca.rank={rank}",
            "methods.kv_pca.rank_ratio=null",
            f"methods.kv_pca.objective={objective}",
            methods=1,
        )
        for rank in ranks
        for objective in ("balanced", "key")
    }
    measured = qualities(recipes, documents=8, length=512)
    print("| rank | KL, balanced | KL, key | ratio |\n|---:|---:|---:|---:|")
    for rank in ranks:
        balanced, key = (measured[f"{rank} {objective}"].kl_mean for objective in ("balanced", "key"))
        print(f"| {rank} | {balanced:.2g} | {key:.2g} | {balanced / key:.2f} |")


if __name__ == "__main__":
    main()
