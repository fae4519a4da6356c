"""What a text source holds: a text file, a file of JSON lines, or a data set of the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvslim.calibrate.conversations import Conversation, Piece, rendered
from kvslim.errors import NotFoundError, UnsupportedError, UsageError, first_line
from kvslim.json_lines import is_json_lines, read_objects
from kvslim.messages import flattened, read_messages
from kvslim.token_ids import start_of_text

Record = Sequence[Piece] | Conversation
HUB = "hub:"
COLUMNS = ("text", "messages", "prompt", "completion")
LINES = 'write one {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]} per line'
BETWEEN = Piece("\n\n", False)


def check_source(source: str, where: str) -> None:
    """Fails early when a text source cannot be read.

    Args:
        source: `self`, a .txt or .jsonl file, or `hub:DATASET[:SPLIT]`.
        where: The key that names it, for errors.

    Raises:
        NotFoundError: The file does not exist.
        UsageError: It is empty, not UTF-8, not JSONL, or named neither .txt nor .jsonl.
        UnsupportedError: A hub data set without the `hub` extra.
    """
    if source == "self":
        return
    if source.startswith(HUB):
        _datasets(where)
        return
    if not Path(source).is_file():
        fix = "give self, a .txt or .jsonl file, or hub:DATASET[:SPLIT]"
        raise NotFoundError(f"no text file {source!r}", where=where, fix=fix)
    _records(source)


def source_digest(source: str) -> str | None:
    """SHA-256 of a file's text, with what is said of its parts; None for a source that its name alone decides."""
    if source == "self" or source.startswith(HUB):
        return None
    return hashlib.sha256(json.dumps([_content(record) for record in _records(source)]).encode()).hexdigest()


def source_text(source: str) -> str:
    """The text of a file or a hub data set; of conversations, what is said, without any frame.

    Raises:
        KvslimError: As `check_source`.
    """
    return "".join(text for text, _ in _joined(map(_said, _records(source))))


def source_pieces(source: str, tokenizer: Any) -> list[Piece]:
    """The text of a file or a hub data set in order; conversations in the frame of the model's chat template.

    Args:
        source: As for `check_source`, but not `self`.
        tokenizer: A tokenizer of transformers.

    Raises:
        KvslimError: As `check_source`.
        UsageError: There are conversations, and the tokenizer has no chat template, or it refuses one.
    """
    records, start = _records(source), "".join(tokenizer.convert_ids_to_tokens(start_of_text(tokenizer).tolist()))
    return _joined(
        rendered(record, tokenizer, start) if isinstance(record, Conversation) else record for record in records
    )


def _joined(records: Iterable[Sequence[Piece]]) -> list[Piece]:
    """The pieces of all records, with an empty line between two."""
    return [piece for record in records for piece in (*record, BETWEEN)][:-1]


def _said(record: Record) -> Sequence[Piece]:
    """The pieces of a record; the messages of a conversation, each as a paragraph."""
    if not isinstance(record, Conversation):
        return record
    return [Piece("\n\n".join(message["content"] for message in record.messages if message["content"]), True)]


def _content(record: Record) -> object:
    """All that decides the text of a record, as plain data."""
    return record.messages if isinstance(record, Conversation) else record


def _records(source: str) -> list[Record]:
    if source.startswith(HUB):
        found = [_record(record, source) for record in _hub_rows(source)]
    elif is_json_lines(path := Path(source)):
        found = [_record(record, where) for where, record in read_objects(path, LINES)]
    else:
        found = [[Piece(_plain_text(path), True)]]
    if not any(text.strip() for record in found for text, _ in _said(record)):
        raise UsageError("the text is empty", where=source, fix="give some thousand words")
    return found


def _plain_text(path: Path) -> str:
    """A .txt file; any other name could hold markup or records, which nobody wants a model to be calibrated on."""
    if path.suffix.lower() != ".txt":
        raise UsageError(
            "a text is named .txt, or .jsonl if it is JSON lines",
            where=str(path),
            fix=f"rename it to .txt if all of it is text; for .jsonl {LINES}",
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 text: {error}", where=str(path), fix="save the text as UTF-8") from error


def _record(record: dict[str, Any], where: str) -> Record:
    """A line's text, its prompt and completion with whether they count, or its conversation."""
    if isinstance(record.get("text"), str):
        return [Piece(record["text"], True)]
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        return [Piece(record["prompt"], False), Piece(record["completion"], True)]
    if "messages" not in record:
        raise UsageError("no text in this line", where=where, fix=LINES)
    messages = read_messages(record["messages"], where)
    try:
        return Conversation(tuple(flattened(messages)), where)
    except UsageError as error:
        raise UsageError(error.message, where=f"{where}: {error.where}", fix=error.fix) from error


def _datasets(where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UnsupportedError(
            "hub data sets need the `hub` extra", where=where, fix="pip install 'kvslim[hub]'"
        ) from error
    return datasets


def _hub_rows(source: str) -> Iterator[dict[str, Any]]:
    name, _, split = source.removeprefix(HUB).partition(":")
    try:
        rows = _datasets(source).load_dataset(name, split=split or "train")
    except Exception as error:  # datasets raises many types for a missing set or no network
        message = f"cannot load data set {name!r}: {first_line(error)}"
        raise NotFoundError(message, where=source, fix="check its name, or give a text file") from error
    known = [column for column in COLUMNS if column in rows.column_names]
    if not known:
        message = f"data set {name!r} has no column text, messages, or prompt and completion"
        raise UsageError(message, where=source, fix="give a JSONL file instead")
    return iter(rows.select_columns(known))
