"""Exit codes and the errors behind them."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvslim.cli import console
from kvslim.errors import GateError, KvslimError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvslim.types import GateResult


class InterruptError(KvslimError):
    """The user pressed Ctrl-C (exit code 130)."""

    exit_code = 130


def verdict(passed: bool | None, gates: Sequence[GateResult], where: str) -> int:
    """The exit code of an artifact; failed gates are told on stderr, as stdout has the result already."""
    if passed is not False:
        return 0
    failed = ", ".join(
        f"{gate.name} {_number(gate.value)} against {_number(gate.limit)}" for gate in gates if not gate.passed
    )
    fix = "use a gentler recipe, or set the gates to what the task needs; the artifact is kept and marked"
    error = GateError(f"gate failed: {failed}", where=where, fix=fix)
    console.print_error(error)
    return error.exit_code


def usage_error(caught: typer.TyperException) -> UsageError:
    """What the parser of the command line refused, as an error of ours."""
    context: Any = getattr(caught, "ctx", None)
    command = context.command_path if context else "kvslim"
    message = caught.format_message() if hasattr(caught, "format_message") else str(caught)
    return UsageError(message, where=command, fix=f"see `{command} --help`")


def bug(caught: Exception) -> KvslimError:
    """An exception that nobody expected, in one line."""
    frame = traceback.extract_tb(caught.__traceback__)[-1]
    reason = str(caught).strip().partition("\n")[0]
    fix = "set KVSLIM_DEBUG=1 for the traceback, and report it"
    error = KvslimError(
        f"{type(caught).__name__}: {reason}", where=f"{Path(frame.filename).name}:{frame.lineno}", fix=fix
    )
    error.__cause__ = caught
    return error


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
