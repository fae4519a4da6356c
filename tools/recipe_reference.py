"""Prints the recipe's keys with types, defaults and meaning, from the types themselves, as a markdown table."""

from __future__ import annotations

import json
from typing import Any, get_args

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
        parts = _parts(field.annotation)
        if parts:
            _rows(f"{prefix}{name}.", parts[0])
            continue
        default = "required" if field.is_required() else f"`{json.dumps(field.get_default())}`"
        print(f"| `{prefix}{name}` | {_type(properties[name])} | {default} | {field.description} |")


def _parts(annotation: Any) -> list[type[BaseModel]]:
    """The model that an annotation names, perhaps beside None; methods are keys of their own."""
    kinds = get_args(annotation) or (annotation,)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


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
