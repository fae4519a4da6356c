"""Exit codes and the errors behind them."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvslim.cli import console
from kvslim.cli.memory import MemoryLimitError
from kvslim.cli.peers import hint
from kvslim.errors import GateError, KvslimError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvslim.types import GateResult


READER_GONE = 141  # what shells report for a process that SIGPIPE ended
# torch, onnxruntime, safetensors and the library loader have no exception type for this, only these messages.
OUT_OF_MEMORY = (
    "bad_alloc",
    "bad allocation",
    "allocate memory",
    "enough memory",
    "start new thread",
    "failed to map segment",
)


class InterruptError(KvslimError):
    """The user pressed Ctrl-C (exit code 130)."""

    exit_code = 130


class FileAccessError(KvslimError):
    """The system refuses to read or write a file (exit code 2)."""

    exit_code = 2


def verdict(passed: bool | None, gates: Sequence[GateResult], where: str, passing: str | None = None) -> int:
    """The exit code of an artifact. Failed gates are named on stderr, because stdout already holds the result.

    Args:
        passed: Whether all gates passed; None where none was checked.
        gates: What was checked.
        where: The artifact.
        passing: The command that is expected to pass, where one is known.
    """
    if passed is not False:
        return 0
    failed = ", ".join(
        f"{gate.name} {_number(gate.value)} against {_number(gate.limit)}" for gate in gates if not gate.passed
    )
    milder = "use a milder recipe" if passing is None else f"run `{passing}`, the nearest size that is expected to pass"
    fix = f"{milder}, or set the gates to what the task needs (--gate); the artifact is kept and marked as failed"
    error = GateError(f"gate failed: {failed}", where=where, fix=fix)
    console.print_error(error)
    return error.exit_code


def usage_error(caught: typer.TyperException) -> UsageError:
    """An error of the command line parser as a `UsageError`."""
    context: Any = getattr(caught, "ctx", None)
    command = context.command_path if context else "kvslim"
    message = caught.format_message() if hasattr(caught, "format_message") else str(caught)
    return UsageError(message, where=command, fix=hint(message) or f"see `{command} --help`")


def explained(caught: BaseException) -> KvslimError:
    """Any exception as a `KvslimError`. Lack of memory and file errors are recognised however deep they were raised."""
    if any(_is_out_of_memory(error) for error in _chain(caught)):
        return _after(
            MemoryLimitError(
                "out of memory",
                where=_place(caught),
                fix="free memory, raise the limit (ulimit -v), or use a smaller model, context or batch",
            ),
            caught,
        )
    if isinstance(caught, KvslimError):
        return caught
    if isinstance(caught, ModuleNotFoundError):
        from kvslim.packages import missing_package

        return _after(missing_package(caught) or bug(caught), caught)
    if isinstance(caught, OSError) and caught.strerror:
        fix = "check that the file can be read or written, and that the disk has space"
        return _after(FileAccessError(caught.strerror, where=str(caught.filename or "the output"), fix=fix), caught)
    return bug(caught)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and the exceptions that it was raised from or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(
        error, KvslimError | ValueError
    ):  # a validation error quotes its input, which could contain these words
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def _place(caught: BaseException) -> str:
    if isinstance(caught, KvslimError):
        return caught.where
    frames = traceback.extract_tb(caught.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "kvslim"


def _after(error: KvslimError, caught: BaseException) -> KvslimError:
    error.__cause__ = caught
    return error


def bug(caught: BaseException) -> KvslimError:
    """An unexpected exception as an error of one line."""
    reason = str(caught).strip().partition("\n")[0]
    fix = "set KVSLIM_DEBUG=1 to see the traceback, and report it"
    return _after(KvslimError(f"{type(caught).__name__}: {reason}", where=_place(caught), fix=fix), caught)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
