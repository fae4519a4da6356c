"""What onnxruntime would change in a graph each time it opens it, done once when the graph is written.

After a pass that changed anything onnxruntime checks the whole graph again, with all branches, and repeats the passes
of that level. For the branches of an integer cache that takes a quarter of the time of opening.
"""

from __future__ import annotations

import onnx_ir as ir
import onnxscript
from onnx_ir.passes.common import (
    DeduplicateInitializersPass,
    LiftSubgraphInitializersToMainGraphPass,
    RemoveUnusedNodesPass,
)

from kvslim.weights.choice import SMALLEST_MATRIX

DOMAIN = "com.microsoft"


def as_opened(model: ir.Model) -> None:
    """Computes small constants, shares equal ones, and fuses SiLU, as onnxruntime does; the graph holds all constants.

    Large constants that are read in two shapes keep their reshape, which `share_storage` replaces.

    Args:
        model: The graph; edited.
    """
    onnxscript.optimizer.fold_constants(
        model, input_size_limit=SMALLEST_MATRIX, output_size_limit=SMALLEST_MATRIX, should_fold=_is_joined
    )
    # transformers.js's browser build cannot read external data of a branch's own constants.
    LiftSubgraphInitializersToMainGraphPass()(model)
    DeduplicateInitializersPass()(model)
    _fuse_silu(model)
    RemoveUnusedNodesPass()(model)


def _is_joined(node: ir.Node) -> bool | None:
    """Whether a node joins constants, which takes no more memory whatever their size."""
    return True if node.op_type == "Concat" else None


def _fuse_silu(model: ir.Model) -> None:
    """Makes one node of x * sigmoid(x)."""
    for node in list(model.graph):
        gate = _gate(node)
        if gate is not None:
            model.opset_imports.setdefault(DOMAIN, 1)
            fused = ir.node("QuickGelu", [gate], {"alpha": 1.0}, domain=DOMAIN, name=node.name)
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], [fused], node.outputs, fused.outputs)


def _gate(node: ir.Node) -> ir.Value | None:
    """The x of a node that computes x * sigmoid(x)."""
    if node.op_type != "Mul":
        return None
    for value, other in (node.inputs, reversed(node.inputs)):
        sigmoid = None if other is None else other.producer()
        if sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.inputs[0] is value:
            return value
    return None
