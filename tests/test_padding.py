"""Batches in plain onnxruntime: the code of docs/clients.md gives each prompt what it gives alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from support.padding import alone, printed
from support.tiny_graph import write_tiny
from support.tiny_tokenizer import byte_tokenizer

GRAPHS = {"plain": {}, "an integer cache": {"int8": True}, "learned positions": {"positions": 64}}


def write_artifact(folder: Path, **options: int) -> None:
    """A tiny decoder that gives logits of the last position, as artifacts do, and its tokenizer."""
    graph = folder / "model.onnx"
    model = onnx.load(write_tiny(graph, vocab=256, **options))
    (head,) = [node for node in model.graph.node if node.output[0] == "logits"]
    head.output[0] = "all_logits"
    for name, value in {"start": -1, "end": np.iinfo(np.int64).max, "along": 1}.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
    model.graph.node.append(helper.make_node("Slice", ["all_logits", "start", "end", "along"], ["logits"]))
    logits = next(value for value in model.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, graph)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text("{}")


@pytest.mark.parametrize("name", GRAPHS)
def test_rows_padded_as_the_page_says_give_what_they_give_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    write_artifact(tmp_path, **GRAPHS[name])
    assert printed(tmp_path, tmp_path / "batch.py", monkeypatch, capsys) == alone(tmp_path)
