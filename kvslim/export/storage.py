"""One place in the data file for a constant that a graph reads in two shapes."""

from __future__ import annotations

import math
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def share_storage(path: Path) -> None:
    """Turns each reshape of a stored constant into a second constant at the same place of the data file.

    onnxruntime maps both from the file; the reshape it would fold into a copy in memory, once more as large.

    Args:
        path: A graph whose constants lie in a data file beside it; rewritten.
    """
    model = ir.load(path)
    for node in list(model.graph):
        if node.op_type == "Reshape" and (alias := _alias(node)) is not None:
            node.outputs[0].replace_all_uses_with(alias)
            model.graph.remove(node, safe=True)
            model.graph.register_initializer(alias)
    RemoveUnusedNodesPass()(model)
    ir.save(model, path)


def _alias(node: ir.Node) -> ir.Value | None:
    source, target = node.inputs[0], node.inputs[1]
    stored = None if source is None else source.const_value
    if not isinstance(stored, ir.ExternalTensor) or target is None or target.const_value is None:
        return None
    wanted = [int(size) for size in target.const_value.numpy()]
    if math.prod(wanted) != stored.size:  # a 0 or -1 among the sizes, which nothing of ours writes
        return None
    shape, name = ir.Shape(wanted), str(node.outputs[0].name)
    tensor = ir.ExternalTensor(
        stored.location, stored.offset, stored.length, stored.dtype, shape=shape, name=name, base_dir=stored.base_dir
    )
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(stored.dtype), shape=shape)
