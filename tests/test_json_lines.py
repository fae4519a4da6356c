"""One file of JSON lines, read alike for calibration, for tasks and for prompts."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_writer import writer_artifact

from kvslim.calibrate.text_source import source_text
from kvslim.cli import app
from kvslim.errors import KvslimError, UsageError
from kvslim.validation.tasks import load_tasks, read_lines

ODD = "a\u2028b\u2029c\x85d é😀"  # Python splits lines at three of them, JSON at none
RECORD = {"prompt": ODD, "completion": "f"}
LINE = json.dumps(RECORD, ensure_ascii=False).encode()
PLAIN = b'{"prompt": "p", "completion": "c"}'
GOOD = {
    "as it is": (LINE, [RECORD]),
    "byte order mark": (codecs.BOM_UTF8 + LINE + b"\n" + LINE, [RECORD, RECORD]),
    "carriage returns": (LINE + b"\r\n\r\n" + LINE + b"\r\n", [RECORD, RECORD]),
    "blank lines and spaces": (b"\n  \t\n " + LINE + b" \n\n", [RECORD]),
    "escapes": (json.dumps(RECORD).encode(), [RECORD]),
}
BAD = {
    "nested too deeply": (b'{"prompt": ' + b"[" * 200_000, "nested too deeply"),
    "objects nested too deeply": (b'{"a":' * 100_000, "nested too deeply"),
    "half a character": (rb'{"prompt": "\udc80", "completion": "c"}', "not JSON"),
    "not a number": (b'{"prompt": "p", "completion": NaN}', "not JSON"),
    "more than a number": (b'{"prompt": "p", "completion": -1e999}', "not JSON"),
    "number of too many digits": (b'{"prompt": "p", "completion": ' + b"7" * 5000 + b"}", "not JSON"),
    "two on a line": (PLAIN + b" " + PLAIN, "not JSON"),
    "not UTF-8": (b'{"prompt": "\xe9", "completion": "c"}', "not UTF-8"),
    "UTF-16": (PLAIN.decode().encode("utf-16"), "not UTF-8"),
    "mark in the middle": (codecs.BOM_UTF8 + PLAIN, "not JSON"),
    "a list": (b'["p", "c"]', "must hold an object"),
    "a text": (b'"prompt"', "must hold an object"),
}
NAMES = ["t.json", "t.JSON", "t.jsonl.gz", "t.ndjson", "t.csv", "t.md", "t"]


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return writer_artifact(tmp_path)


@pytest.fixture
def answers(artifact: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], tuple[int, list[Any]]]:
    """Exit code and JSON of `kvslim generate --file`."""

    def of(path: Path) -> tuple[int, list[Any]]:
        code = app.run(["generate", str(artifact), "--file", str(path), "--max-new-tokens", "1"])
        return code, [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]

    return of


@pytest.mark.parametrize(("content", "records"), GOOD.values(), ids=GOOD)
@pytest.mark.parametrize("name", ["lines.jsonl", "LINES.JSONL"])
def test_file_means_the_same_to_every_reader(
    tmp_path: Path, answers: Callable[[Path], Any], content: bytes, records: list[Any], name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert source_text(str(path)) == "\n\n".join(record["prompt"] + record["completion"] for record in records)
    assert [line.model_dump() for line in read_lines(path)] == records
    code, found = answers(path)
    assert (code, [answer["prompt"] for answer in found]) == (0, [record["prompt"] for record in records])


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_bad_line_is_named_by_every_reader(
    tmp_path: Path, answers: Callable[[Path], Any], line: bytes, message: str
) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"\n".join([PLAIN, b"", line, PLAIN]))
    for read in (source_text, lambda name: read_lines(Path(name))):
        with pytest.raises(UsageError, match=message) as caught:
            read(str(path))
        assert caught.value.where == f"{path}, line 3"
    code, (first, *failed, last) = answers(path)
    assert code == UsageError.exit_code
    assert first["prompt"] == last["prompt"] == "p"
    assert all(message in answer["error"]["message"] for answer in failed)
    assert failed[0]["error"]["where"] == f"{path}, line 3"


def nested(depths: range) -> Iterator[bytes]:
    """Lines whose lists are nested about as deeply as Python goes."""
    return (b'{"prompt": "p", "deep": ' + b"[" * depth + b"]" * depth + b"}" for depth in depths)


def test_line_that_can_be_read_can_be_copied_to_its_answer(tmp_path: Path, answers: Callable[[Path], Any]) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"\n".join(nested(range(100, 1100, 20))))
    _, found = answers(path)
    assert "completion" in found[0]
    assert all("nested too deeply" in answer["error"]["message"] for answer in found if "error" in answer)


@pytest.mark.parametrize("name", NAMES)
def test_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(LINE)
    with pytest.raises(UsageError, match=r"named \.txt, or \.jsonl"):
        source_text(str(path))
    with pytest.raises(KvslimError, match=r"named \.jsonl"):
        load_tasks([str(path)])


@pytest.mark.parametrize("name", ["t.txt", "t.TXT"])
def test_text_has_no_byte_order_mark(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(codecs.BOM_UTF8 + ODD.encode())
    assert source_text(str(path)) == ODD
