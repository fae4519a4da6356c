"""JSON lines, read in one way for calibration text, tasks and prompts: UTF-8, one object on each line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kvslim.errors import NotFoundError, UsageError

SUFFIX = ".jsonl"


def is_json_lines(path: Path) -> bool:
    """Whether a file's name says that it has JSON lines."""
    return path.suffix.lower() == SUFFIX


def read_objects(path: Path, fix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file, each with the place where it stands.

    Args:
        path: The file.
        fix: What a line should hold, for errors.

    Raises:
        NotFoundError: The file cannot be opened.
        UsageError: As `parse_object`.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise NotFoundError(f"cannot open: {error.strerror}", where=str(path), fix="give a .jsonl file") from error
    for number, line in numbered(lines):
        where = place(path, number)
        yield where, parse_object(line, where, fix)


def numbered(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1; a byte order mark before the first is left out.

    Lines must be split at line feeds alone: strings of JSON can hold all other characters at which Python splits.
    """
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            yield number, text


def place(name: object, number: int) -> str:
    """How errors name a line."""
    return f"{name}, line {number}"


def parse_object(line: bytes, where: str, fix: str) -> dict[str, Any]:
    """The object on a line.

    Args:
        line: The line.
        where: Where it stands.
        fix: What it should hold.

    Raises:
        UsageError: The line is not UTF-8 or not JSON, or holds something else than an object; half of a surrogate pair
            is no text, and NaN and infinity are no numbers.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 text: {error}", where=where, fix="save it as UTF-8") from error
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError as error:
        raise UsageError("not JSON that can be read: nested too deeply", where=where, fix=fix) from error
    except ValueError as error:
        raise UsageError(f"not JSON: {error}", where=where, fix=fix) from error
    if not isinstance(found, dict):
        raise UsageError("a line must hold an object", where=where, fix=fix)
    return found
