"""Exit codes and the errors behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from kvslim.cli import console
from kvslim.cli.peers import hint
from kvslim.errors import GateError, KvslimError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvslim.measures import GateResult


SET_GATES = "set the gates to what the task needs (--gate)"
READER_GONE = 141  # what shells report for a process that SIGPIPE ended


class InterruptError(KvslimError):
    """The user pressed Ctrl-C (exit code 130)."""

    exit_code = 130


def verdict(passed: bool | None, gates: Sequence[GateResult], where: str, *fixes: str | None) -> int:
    """The exit code of an artifact. Failed gates are named on stderr, because stdout already holds the result.

    Args:
        passed: Whether all gates passed; None where none was checked.
        gates: What was checked.
        where: The artifact.
        fixes: What can be done about gates that failed: any of these.
    """
    if passed is not False:
        return 0
    failed = ", ".join(
        f"{gate.name} {_number(gate.value)} against {_number(gate.limit)}" for gate in gates if not gate.passed
    )
    message, fix = f"gate failed: {failed}", ", or ".join(filter(None, fixes))
    if not failed:  # all that fails a report without a gate
        message = "texts with the draft are not those that the model writes without it"
        fix = "compress with --draft none"
    error = GateError(message, where=where, fix=fix)
    console.print_error(error)
    return error.exit_code


def usage_error(caught: typer.TyperException) -> UsageError:
    """An error of the command line parser as a `UsageError`."""
    context: Any = getattr(caught, "ctx", None)
    command = context.command_path if context else "kvslim"
    message = caught.format_message() if hasattr(caught, "format_message") else str(caught)
    message = message.replace("Value error, ", "")  # typer's parser lets pydantic say what kind of error it is
    return UsageError(message, where=command, fix=hint(message) or f"see `{command} --help`")


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
