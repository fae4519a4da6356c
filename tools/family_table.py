"""Prints the families that KVSlim knows, as a markdown table, from the registries of decoders and encoders."""

from __future__ import annotations

from kvslim.loading.architecture import ARCHITECTURES
from kvslim.loading.encoders import ENCODERS


def main() -> None:
    print("| family | `model_type` | of its own |\n|---|---|---|")
    for kind, row in [*ARCHITECTURES.items(), *ENCODERS.items()]:
        print(f"| {row.title} | `{kind}` | {row.note} |")


if __name__ == "__main__":
    main()
