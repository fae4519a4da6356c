"""Which nodes of a graph read a large constant matrix, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kvslim.weights.choice import SMALLEST_MATRIX

PRODUCTS = ("FusedMatMul", "Gemm", "MatMul")
SHAPERS = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Matrix:
    """A large constant matrix as a node reads it.

    Attributes:
        source: The constant.
        transposed: Whether it is stored as [outputs, inputs], as an embedding is.
    """

    source: ir.Value
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        rows, columns = tensor_of(self.source).shape.numpy()
        return (rows, columns) if self.transposed else (columns, rows)

    def load(self) -> npt.NDArray[np.float32]:
        """The numbers [outputs, inputs]; a matrix that is made on demand is made now and not kept."""
        array: npt.NDArray[np.float32] = tensor_of(self.source).numpy()
        return array if self.transposed else array.T


def constant_products(graph: ir.Graph) -> dict[ir.Node, Matrix]:
    """MatMul, Gemm and FusedMatMul nodes over a large constant matrix, in the graph's order."""
    return {node: matrix for node in graph if (matrix := _factor(node)) is not None}


def embedding_lookups(graph: ir.Graph) -> dict[ir.Node, Matrix]:
    """Gather nodes that look tokens up in a large constant table.

    Tables of learned positions or of segments, which are small, are not among them.
    """
    lookups = [node for node in graph if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0]
    return {
        node: Matrix(table, True)
        for node in lookups
        if _is_large_matrix(table := node.inputs[0]) and _origin(node.inputs[1]) == "input_ids"
    }


def bias_of(node: ir.Node, outputs: int) -> tuple[ir.Value | None, ir.Node]:
    """A product's constant bias [outputs], and the node that adds it: itself, or an Add that alone reads it."""
    if (own := _third(node)) is not None:
        return own, node
    if factor_of(node) != 1.0:
        return None, node
    uses = list(node.outputs[0].uses())
    if len(uses) == 1 and not node.outputs[0].is_graph_output() and uses[0].node.op_type == "Add":
        other = uses[0].node.inputs[1 - uses[0].idx]
        if _is_bias(other, outputs):
            return other, uses[0].node
    return None, node


def factor_of(node: ir.Node) -> float:
    """What a FusedMatMul multiplies its product by."""
    return node.attributes.get_float("alpha", 1.0) if node.op_type == "FusedMatMul" else 1.0


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    """The tensor of a value that is known to be constant."""
    if value.const_value is None:
        raise ValueError(f"{value.name} is not constant")
    return value.const_value


def _factor(node: ir.Node) -> Matrix | None:
    if node.op_type not in PRODUCTS or not _is_large_matrix(source := node.inputs[1]):
        return None
    scaled = node.op_type == "Gemm" and any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))
    turned = any(node.attributes.get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB"))
    matrix, bias = Matrix(source, bool(node.attributes.get_int("transB", 0))), _third(node)
    fits = not scaled and not turned and (bias is None or _is_bias(bias, matrix.shape[0]))
    return matrix if fits else None


def _is_large_matrix(value: ir.Value | None) -> TypeGuard[ir.Value]:
    tensor = None if value is None else value.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2:
        return False
    return tensor.size >= SMALLEST_MATRIX


def _third(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _is_bias(value: ir.Value | None, outputs: int) -> bool:
    tensor = None if value is None else value.const_value
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and tensor.shape.numpy() == (outputs,)


def _origin(value: ir.Value | None) -> str | None:
    """Name of the value that this one is but another shape or integer type of."""
    while value is not None and (node := value.producer()) is not None and node.op_type in SHAPERS:
        value = node.inputs[0]
    return None if value is None else value.name
