"""`kvslim generate --file`: JSON lines in, JSON lines out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from kvslim.cli import console
from kvslim.cli.completions import Generation, Record
from kvslim.errors import NotFoundError, UsageError
from kvslim.json_lines import numbered, parse_object, place
from kvslim.messages import read_messages
from kvslim.runtime.completion import Completer

STDIN = "-"
FIX = 'write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]} on one line'

Prompt = tuple[Record, list[int]]  # a line's object, and the token ids of its prompt


def complete_file(generation: Generation, file: str, batch: int) -> int:
    """Completes the prompts of a file, one JSON object per line. A line that fails gives an `error`, the rest goes on.

    Each line starts with an empty cache, so that no answer depends on the lines before it.

    Args:
        generation: The opened artifact.
        file: The file; `-` for stdin.
        batch: Lines to complete at once.

    Returns:
        The exit code; not 0 if a line failed.

    Raises:
        NotFoundError: The file cannot be opened.
        UsageError: The artifact's cache takes one prompt at a time.
    """
    code, name = 0, "stdin" if file == STDIN else file
    with _opened(file) as stream:
        completer, lines = generation.completer(batch=batch), numbered(stream)
        while group := list(islice(lines, batch)):
            prompts = {number: _prompt(line, generation, completer) for number, line in group}
            for number, answer in _answers(prompts, generation, completer):
                if isinstance(answer, UsageError):
                    code = answer.exit_code
                    _report(answer, number, name)
                else:
                    console.print_json_line(answer)
    return code


def _answers(
    prompts: Mapping[int, Prompt | UsageError], generation: Generation, completer: Completer
) -> Iterator[tuple[int, Record | UsageError]]:
    """What to print for each line, by its number: prompts that could be read are completed at once."""
    options = generation.options
    ids = [prompt[1] for prompt in prompts.values() if not isinstance(prompt, UsageError)]
    completed = iter(completer.complete(ids, generation.most, options.sampling, options.stops))
    for number, prompt in prompts.items():
        if isinstance(prompt, UsageError):
            yield number, prompt
        else:
            text, usage = next(completed)
            yield number, {**prompt[0], "completion": text, **usage.model_dump(mode="json")}


def _report(error: UsageError, number: int, name: str) -> None:
    """Prints the error of a line as JSON on stdout and as text on stderr."""
    named = UsageError(error.message, where=place(name, number), fix=error.fix)
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


def _prompt(line: bytes, generation: Generation, completer: Completer) -> Prompt | UsageError:
    """A line that can be completed, or what is wrong with it."""
    try:
        record = parse_object(line, "line", FIX)
        ids = _ids(record, generation)
        completer.check(ids)
    except UsageError as error:
        return error
    return record, ids


def _ids(record: Record, generation: Generation) -> list[int]:
    if ("prompt" in record) == ("messages" in record):
        raise UsageError("a line must have either prompt or messages", where="line", fix=FIX)
    if "messages" in record:
        return generation.encoder.chat(_conversation(record["messages"], generation))
    prompt = record["prompt"]
    if not isinstance(prompt, str):
        raise UsageError("prompt is not a text", where="line", fix=FIX)
    return generation.ids(prompt)


def _conversation(found: object, generation: Generation) -> list[dict[str, Any]]:
    """The messages of a line, after the system message of the options if they have none of their own."""
    messages = read_messages(found, "line")
    has_system = any(message["role"] == "system" for message in messages)
    return messages if has_system else [*generation.system_message(), *messages]
