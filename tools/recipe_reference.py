"""Prints the recipe's keys with types, defaults and meaning, from the types themselves, as a markdown table."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from kvslim.methods import METHODS
from kvslim.recipe import Recipe


def main() -> None:
    """Prints the table."""
    print("| key | type | default | meaning |\n|---|---|---|---|")
    _rows("", Recipe)
    for name, method in sorted(METHODS.items()):
        _rows(f"methods.{name}.", method)


def _rows(prefix: str, model: type[BaseModel]) -> None:
    properties = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            _rows(f"{prefix}{name}.", annotation)
            continue
        default = "required" if field.is_required() else f"`{json.dumps(field.get_default())}`"
        print(f"| `{prefix}{name}` | {_type(properties[name])} | {default} | {field.description} |")


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if values := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        return ", ".join(f"`{value}`" for value in values)
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    return str(schema.get("type", "method"))


if __name__ == "__main__":
    main()
