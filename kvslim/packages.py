"""The packages that KVSlim asks for, and the fewer that a machine needs that only runs artifacts."""

from __future__ import annotations

from importlib import metadata, resources
from typing import TYPE_CHECKING

from kvslim.errors import UnsupportedError

if TYPE_CHECKING:
    from packaging.requirements import Requirement


def required() -> list[Requirement]:
    """What an install with all verbs consists of.

    Raises:
        importlib.metadata.PackageNotFoundError: KVSlim itself is not installed.
    """
    from packaging.requirements import Requirement

    asked = [Requirement(text) for text in metadata.requires("kvslim") or []]
    return [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]


def small_install() -> tuple[str, ...]:
    """The packages of the small install, as `name==version`."""
    text = (resources.files("kvslim.bundle") / "requirements.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if not line.startswith("#"))


def beyond_small() -> list[Requirement]:
    """What the small install leaves out of `required`."""
    small = {pin.partition("==")[0] for pin in small_install()}
    return [one for one in required() if one.name not in small]


def is_installed(name: str) -> bool:
    """Whether a package is there, without importing it."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def missing_package(caught: ModuleNotFoundError) -> UnsupportedError | None:
    """An error about all packages that the small install leaves out; None where none of them is missing."""
    try:
        missing = [one.name for one in beyond_small() if not is_installed(one.name)]
    except metadata.PackageNotFoundError:
        return None
    if not missing:
        return None
    return UnsupportedError(
        f"this needs packages that the small install leaves out: {', '.join(missing)}",
        where=f"import {caught.name}",
        fix="pip install kvslim, or do it on a machine that compresses (docs/boards.md)",
    )
