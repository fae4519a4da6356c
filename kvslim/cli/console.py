"""What the command line prints: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvslim.errors import KvslimError

if TYPE_CHECKING:
    from rich.console import Console

    from kvslim.report.tables import Table

PIPE_WIDTH = 160
SCHEMA_VERSION = 2  # goes up when a key is removed or changes its meaning; new keys do not change it


@contextlib.contextmanager
def libraries_apart() -> Iterator[None]:
    """Keeps libraries out of stdout, which belongs to the result, and from stdin: a question would wait for ever."""
    typed = sys.stdin
    with Path(os.devnull).open(encoding="utf-8") as nothing, contextlib.redirect_stdout(sys.stderr):
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = typed


def print_json(name: str, value: dict[str, Any], on_a_line: bool = False) -> None:
    """Prints the one JSON object of a command with `--json`, under the name and version of its schema."""
    named, indent = {"schema": schema_id(name), **value}, None if on_a_line else 2
    sys.stdout.write(json.dumps(named, indent=indent, ensure_ascii=_needs_ascii(), allow_nan=False) + "\n")


def schema_id(name: str) -> str:
    """The value of the key `schema`, such as `kvslim.compress/2`."""
    return f"kvslim.{name}/{SCHEMA_VERSION}"


def print_json_line(value: Any) -> None:
    """Prints one object of JSON lines without delay."""
    print_text(json.dumps(value, ensure_ascii=_needs_ascii(), allow_nan=False) + "\n")


def _needs_ascii() -> bool:
    """Whether stdout lacks characters that JSON may have."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") != "utf8"


def print_tables(*tables: Table) -> None:
    """Prints the tables that have rows."""
    console = _console(stderr=False)
    for table in tables:
        if table.rows:
            console.print(table.rich(), highlight=False)


def print_text(text: str) -> None:
    """Prints a piece of a result unchanged and without delay, so that a reader can follow."""
    sys.stdout.write(text)
    sys.stdout.flush()


def accept_any_text() -> None:
    """Accepts names and prompts that are not valid Unicode, so that they lead to an error message, not a crash.

    A stream that was closed before the start holds nothing, or takes anything.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 (until the process ends)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def flush() -> None:
    """Flushes stdout, so that a full disk or a closed pipe raises while the error can still be reported."""
    sys.stdout.flush()


def abandon_stdout() -> None:
    """Drops the rest of the output; Python would try to write it again at exit, and fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def hint(text: str) -> None:
    """Prints a line that is not part of the result, on stderr."""
    sys.stderr.write(f"{text}\n")


def mark(text: str) -> None:
    """Prints a prompt sign on stderr."""
    sys.stderr.write(text)
    sys.stderr.flush()


def error_fields(error: KvslimError) -> dict[str, Any]:
    """An error as JSON."""
    return {"message": error.message, "where": error.where, "fix": error.fix, "exit_code": error.exit_code}


def print_error(error: KvslimError, as_json: bool = False, on_a_line: bool = False) -> None:
    """Prints what is wrong, where, and how to fix it; with `as_json` as the one JSON object too."""
    if as_json:
        print_json("error", {"error": error_fields(error)}, on_a_line)
    hint(f"error: {_line(error.message)}\n  where: {_line(error.where)}\n  fix: {_line(error.fix)}")
    if debugging():
        traceback.print_exception(error)


def debugging() -> bool:
    """Whether KVSLIM_DEBUG=1 asks for tracebacks and warnings."""
    return os.environ.get("KVSLIM_DEBUG") == "1"


def stderr_console() -> Console:
    """A console for what is not part of the result."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # Rich assumes that a pipe is 80 columns wide, and would cut tables that a script or a log needs in full.
    return Console(file=stream, width=None if stream.isatty() else PIPE_WIDTH, soft_wrap=False)


def _line(text: str) -> str:
    return " ".join(text.split())
