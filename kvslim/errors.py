"""Errors that a user can fix: what is wrong, where, and how to fix it. Each class has the exit code for CI."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

# Words for what pydantic says of Python's types, by its own names of faults.
FAULTS = {
    "extra_forbidden": "no such key",
    "missing": "must be given",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be keys with values",
    "model_type": "must be keys with values",
}


class KvslimError(Exception):
    """An expected failure, described in three lines: what is wrong, where, and how to fix it.

    Args:
        message: What is wrong.
        where: The file, option or layer that is wrong.
        fix: What the user can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, where: str, fix: str) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.fix = fix

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, which knows no arguments by name: a worker's error is raised again in another process."""
        return partial(type(self), where=self.where, fix=self.fix), (self.message,)


class UsageError(KvslimError):
    """A wrong option, recipe, plan or calibration source (exit code 2)."""

    exit_code = 2


class OutputError(KvslimError):
    """The output cannot be written: no permission, no space, or a folder that is not an artifact (exit code 2)."""

    exit_code = 2


class GateError(KvslimError):
    """A gate of the recipe failed; the artifact is kept and marked (exit code 3)."""

    exit_code = 3


class UnsupportedError(KvslimError):
    """A model family, method or runtime that KVSlim does not support (exit code 4)."""

    exit_code = 4


class ModelError(KvslimError):
    """A model whose files are broken: config, weights or tokenizer (exit code 4)."""

    exit_code = 4


class ArtifactError(KvslimError):
    """An artifact folder with missing, extra or changed files (exit code 4)."""

    exit_code = 4


class NotFoundError(KvslimError):
    """A model, file or artifact that does not exist (exit code 5)."""

    exit_code = 5


def suggestion(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """A hint for an unknown name: the closest known one, or else all of them, or `otherwise` if they are many."""
    names = sorted(known)
    close = difflib.get_close_matches(name.lower(), names, n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise or f"known: {', '.join(names)}"


def one_line(error: Exception) -> str:
    """A library's message without its line breaks."""
    return " ".join(str(error).split())


def first_line(error: Exception) -> str:
    """The first line of a library's message, whose rest would not help; the error's type where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def fault_of(fault: Mapping[str, Any], whole: str) -> str:
    """What pydantic finds wrong with plain data, behind its place there, or behind `whole` where that is all of it."""
    place = ".".join(str(part) for part in fault["loc"]) or whole
    return f"{place}: {words_of(fault)}"


def words_of(fault: Mapping[str, Any]) -> str:
    """What pydantic finds wrong, with the value that it was given; without it where the words name what they mean."""
    kind = fault["type"]
    if kind == "value_error":  # what a validator of ours raised
        return str(fault["ctx"]["error"])
    if kind in FAULTS:
        return FAULTS[kind]
    return f"{fault['msg'][:1].lower()}{fault['msg'][1:]} (got {reprlib.repr(fault['input'])})"
