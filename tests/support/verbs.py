"""Verbs of the command line, run in this process."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from kvslim.cli import app

Run = Callable[..., tuple[int, str, str]]


def runner(capsys: pytest.CaptureFixture[str], *verb: str) -> Run:
    """Runs a command that begins with a verb, if one is given; returns exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = app.run([*verb, *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def give_stdin(monkeypatch: pytest.MonkeyPatch, stdin: str | bytes) -> None:
    """Has stdin hold this and no more."""
    typed = io.BytesIO(stdin.encode() if isinstance(stdin, str) else stdin)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, encoding="utf-8", errors="surrogateescape"))
