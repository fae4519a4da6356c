"""`--set key.path=value`: changes of a recipe's data before it is read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import yaml

from kvslim.errors import UsageError, one_line, suggestion
from kvslim.settings import read_heal
from kvslim.yaml_file import YAML_ERRORS

EXAMPLE = "--set calibration.samples=32"


def overridden(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A recipe's data with overrides applied, the last one winning.

    Args:
        data: The recipe; it stays as it is.
        overrides: `key.path=value` each. A method's options are addressed by its name (`methods.kv_pca.rank=32`).

    Raises:
        UsageError: One of them is not of this form, or leads nowhere.
    """
    changed = copy.deepcopy(data)
    for override in overrides:
        _set(changed, override)
    return changed


def at_fault(data: dict[str, Any], overrides: Sequence[str], parse: Callable[[dict[str, Any]], object]) -> list[str]:
    """The overrides to blame for a recipe that cannot be read: each of those without which the rest can be.

    Args:
        data: The recipe, which can be read as it is.
        overrides: As for `overridden`.
        parse: Reads a recipe's data; it raises `UsageError` where it cannot.

    Returns:
        All of them if none is to blame alone, such as where two are wrong.
    """

    def is_read(overrides: Sequence[str]) -> bool:
        try:
            parse(overridden(data, overrides))
        except UsageError:
            return False
        return True

    blamed = [one for place, one in enumerate(overrides) if is_read([*overrides[:place], *overrides[place + 1 :]])]
    return blamed or list(overrides)


def _set(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys, where = path.split("."), f"--set {override}"
    if not equals or not all(keys):
        raise UsageError(f"cannot read {override!r}", where=where, fix=f"write {EXAMPLE}")
    target: Any = data
    for key in keys[:-1]:
        target = _method(target, key, where) if isinstance(target, list) else _nested(target, key)
        if not isinstance(target, dict | list):
            raise UsageError(f"{key!r} is a value, not a group of keys", where=where, fix="see docs/recipes.md")
    if isinstance(target, list):
        _method(target, keys[-1], where)
        fix = f"set one of its options, such as --set methods.{keys[-1]}.OPTION=VALUE; see `kvslim methods`"
        raise UsageError("this would replace a whole method", where=where, fix=fix)
    try:
        target[keys[-1]] = yaml.safe_load(text)
    except YAML_ERRORS as error:
        raise UsageError(f"cannot read {text!r}: {one_line(error)}", where=where, fix="correct the value") from error


def _nested(data: dict[str, Any], key: str) -> Any:
    if key == "weights" and isinstance(data.get(key), str):
        data[key] = {"type": data[key]}
    if key == "heal":
        with suppress(ValueError):  # of what is no budget, the recipe tells
            data[key] = read_heal(data.get(key) or {})
    return data.setdefault(key, [] if key == "methods" else {})


def _method(entries: list[Any], name: str, where: str) -> dict[str, Any]:
    """The options of a method among a recipe's; one that is listed by its name alone gets a group of them."""
    for index, entry in enumerate(entries):
        if entry == name:
            entries[index] = entry = {name: {}}
        if isinstance(entry, dict) and name in entry:
            entry[name] = entry[name] or {}
            found: dict[str, Any] = entry[name]
            return found
    names = [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]
    fix = suggestion(name, names) if names else "list it in the recipe's methods, without a budget"
    raise UsageError(f"this recipe has no method {name!r}", where=where, fix=fix)
