"""Errors that a user can fix: what is wrong, where, and how to fix it. Each class has the exit code for CI."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar


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


def fault_of(fault: Mapping[str, Any], whole: str) -> str:
    """What pydantic finds wrong with plain data, behind its place there, or behind `whole` where that is all of it."""
    place = ".".join(str(part) for part in fault["loc"]) or whole
    return f"{place}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"
