"""Prints what each command's `--json` output is called and holds, from the types themselves, as a markdown table."""

from __future__ import annotations

from kvslim.cli.console import schema_id
from kvslim.cli.schemas import OUTPUTS, schema_of


def main() -> None:
    """Prints the table."""
    print("| `schema` | keys | |\n|---|---|---|")
    for name, kind in OUTPUTS.items():
        keys = ", ".join(f"`{key}`" for key in schema_of(name)["properties"] if key != "schema")
        summary = (kind.__doc__ or "").partition("\n")[0]
        print(f"| `{schema_id(name)}` | {keys} | {summary} |")


if __name__ == "__main__":
    main()
