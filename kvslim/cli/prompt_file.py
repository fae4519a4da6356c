"""`kvslim generate --file`: JSON lines in, JSON lines out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from kvslim.cli import console
from kvslim.cli.completions import Generation, Record, usage_of
from kvslim.errors import NotFoundError, UsageError
from kvslim.runtime.completion import Completer

STDIN = "-"


def complete_file(generation: Generation, file: str) -> int:
    """Completes the prompts of a file, one JSON object per line. A line that fails gives an `error`, the rest goes on.

    Each line starts with an empty cache, so that no answer depends on the lines before it.

    Args:
        generation: The opened artifact.
        file: The file; `-` for stdin.

    Returns:
        The exit code; not 0 if a line failed.

    Raises:
        NotFoundError: The file cannot be opened.
    """
    code = 0
    with _opened(file) as lines:
        completer = generation.completer()
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            completer.reset()
            try:
                record = _record(line)
                answer = _answer(completer, record, generation)
            except UsageError as error:
                code = error.exit_code
                _report(error, number, "stdin" if file == STDIN else file)
            else:
                console.print_json_line({**record, **answer})
    return code


def _report(error: UsageError, number: int, name: str) -> None:
    """Prints the error of a line as JSON on stdout and as text on stderr."""
    named = UsageError(error.message, where=f"{name}, line {number}", fix=error.fix)
    console.print_json_line({"line": number, "error": console.error_fields(named)})
    console.print_error(named)


@contextmanager
def _opened(file: str) -> Iterator[IO[bytes]]:
    """The open file, or stdin for `-`."""
    if file == STDIN:
        yield sys.stdin.buffer
        return
    try:
        stream = Path(file).open("rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise NotFoundError(f"cannot open: {error.strerror}", where=f"--file {file}", fix="give JSON lines") from error
    with stream:
        yield stream


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON: {error}", where="line", fix='write {"prompt": "..."} on one line') from error
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise UsageError(
            "a line must be an object with either prompt or messages",
            where="line",
            fix='write {"prompt": "..."} on one line',
        )
    return record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _answer(completer: Completer, record: Record, generation: Generation) -> dict[str, Any]:
    options, ids = generation.options, _ids(record, generation)
    text = "".join(completer.stream(ids, options.max_new_tokens, options.sampling))
    return {"completion": text, **usage_of(completer).model_dump(mode="json")}


def _ids(record: Record, generation: Generation) -> list[int]:
    if "messages" in record:
        return generation.encoder.chat(_conversation(record["messages"], generation))
    prompt = record["prompt"]
    if not isinstance(prompt, str):
        raise UsageError("prompt is not a text", where="line", fix='write {"prompt": "..."} on one line')
    return generation.ids(prompt)


def _conversation(messages: object, generation: Generation) -> list[dict[str, Any]]:
    """The messages of a line, after the system message of the options if they have none of their own."""
    if not (isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)):
        fix = 'write {"messages": [{"role": "user", "content": "..."}]}'
        raise UsageError("messages is not a list of role and content", where="line", fix=fix)
    has_system = any(message.get("role") == "system" for message in messages)
    return messages if has_system else [*generation.system_message(), *messages]
