"""A folder that completes text: a tiny decoder with a byte tokenizer."""

from __future__ import annotations

from pathlib import Path

from support.tiny_artifact import describe
from support.tiny_graph import write_tiny
from support.tiny_tokenizer import byte_tokenizer


def write_writer(folder: Path) -> Path:
    """Writes graph, tokenizer and generation config to an existing folder, which comes back."""
    write_tiny(folder / "model.onnx", vocab=256)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text("{}")
    return folder


def writer_artifact(parent: Path) -> Path:
    """An artifact that completes text, in a new folder of `parent`."""
    folder = parent / "artifact"
    folder.mkdir()
    write_writer(folder)
    describe(folder)
    return folder
