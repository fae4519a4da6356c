"""The graph for speculative decoding, beside an artifact's own: it gives logits of several positions, over any rows.

It is the same graph over the same file of weights, for KVSlim's runtime alone. Other clients want `model.onnx`, whose
logits are those of the last position.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

from kvslim.contract import FIRST_LOGITS, LAST_POSITION
from kvslim.export.manifest import GRAPH, SPECULATIVE_GRAPH

POSITIONS, PLACE_OF_POSITIONS, ROTATES = "position_ids", 9, "do_rotary"


def write_speculative_graph(folder: Path) -> None:
    """Writes `speculative.onnx` beside `model.onnx`."""
    model = onnx.load(folder / GRAPH, load_external_data=False)
    give_all_positions(model.graph)
    _take_positions(model.graph)
    onnx.save(model, folder / SPECULATIVE_GRAPH)


def give_all_positions(graph: onnx.GraphProto) -> bool:
    """Adds an input that says which positions get logits, by default all; False where all do anyway."""
    found = [node for node in graph.node if node.name == LAST_POSITION]
    if not found:
        return False
    (last,) = found
    last.input[1] = FIRST_LOGITS
    graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.int64), FIRST_LOGITS))
    graph.input.append(onnx.helper.make_tensor_value_info(FIRST_LOGITS, onnx.TensorProto.INT64, [1]))
    logits = next(value for value in graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "logits_length"
    return True


def _take_positions(graph: onnx.GraphProto) -> None:
    """Lets the operators that rotate read the positions, which they else count from the rows of the cache.

    A draft reads a few rows of a long text, and its tokens stand where they stand in that text.
    """
    rotating = [node for node in _attentions(graph) if _rotates(node)]
    if not rotating:
        return
    for node in rotating:
        node.input.extend([""] * (PLACE_OF_POSITIONS + 1 - len(node.input)))
        node.input[PLACE_OF_POSITIONS] = POSITIONS
    if all(value.name != POSITIONS for value in graph.input):
        ids = next(value for value in graph.input if value.name == "input_ids")
        axes = [axis.dim_param or axis.dim_value for axis in ids.type.tensor_type.shape.dim]
        graph.input.append(onnx.helper.make_tensor_value_info(POSITIONS, onnx.TensorProto.INT64, axes))


def _attentions(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The fused attention operators, also those in branches."""
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _attentions(attribute.g)


def _rotates(node: onnx.NodeProto) -> bool:
    return any(attribute.name == ROTATES and attribute.i for attribute in node.attribute)
