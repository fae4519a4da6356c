"""Batches in plain onnxruntime: the code of docs/clients.md gives each prompt what it gives alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.padding import alone, printed
from support.tiny_graph import write_last_only
from support.tiny_tokenizer import byte_tokenizer

GRAPHS = {"plain": {}, "an integer cache": {"int8": True}, "learned positions": {"positions": 64}}


@pytest.mark.parametrize("name", GRAPHS)
def test_rows_padded_as_the_page_says_give_what_they_give_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    write_last_only(tmp_path / "model.onnx", vocab=256, **GRAPHS[name])
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text("{}")
    assert printed(tmp_path, tmp_path / "batch.py", monkeypatch, capsys) == alone(tmp_path)
