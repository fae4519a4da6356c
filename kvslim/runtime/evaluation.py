"""Changes to a stored graph that an evaluation asks for: logits of all positions, and float32 activations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import onnx
from google.protobuf.message import DecodeError

from kvslim.export.speculative import give_all_positions

FLOAT_ACTIVATIONS = 1  # MatMulNBits' accuracy_level


class ChangedGraph(NamedTuple):
    """A graph in memory, and the folder that its weights lie in."""

    model: bytes
    folder: Path


def changed_graph(path: Path, all_positions: bool, float_activations: bool) -> ChangedGraph | None:
    """The graph with what an evaluation asks for; None where that is how it is stored, or it cannot be read.

    Args:
        path: The `.onnx` file.
        all_positions: Whether to add an input that says which positions get logits.
        float_activations: Whether products with quantised weights are to read float32.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        return None  # onnxruntime tells what is wrong with it
    changed = [all_positions and give_all_positions(model.graph), float_activations and _keep_activations(model.graph)]
    if not any(changed):
        return None
    folder = _follow_links(model.graph, path)
    return ChangedGraph(model.SerializeToString(), folder)


def _keep_activations(graph: onnx.GraphProto) -> bool:
    """Lets products with quantised weights read float32; False where there are none."""
    levels = [
        attribute
        for node in graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]
    for level in levels:
        level.i = FLOAT_ACTIVATIONS
    return bool(levels)


def _follow_links(graph: onnx.GraphProto, path: Path) -> Path:
    """Names the data files of a graph as they are called behind links, and returns the folder that they lie in.

    In a hub cache each file of a folder is a link to one that is called by its hash, in another folder. onnxruntime
    reads weights beside a graph's file, and beside the file that it links to; those of a graph in memory must have
    their real names in one folder.
    """
    entries = [entry for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"]
    files = {entry.value: (path.parent / entry.value).resolve() for entry in entries}
    here = path.parent.resolve()
    folder = here if all(file.is_relative_to(here) for file in files.values()) else path.resolve().parent
    for entry in entries:
        entry.value = os.path.relpath(files[entry.value], folder)
    return folder
