"""Packs matrix products that read one input into one product: query, key and value; gate and up.

One product of three matrices runs faster than three at one token per step. The packed matrix is computed when it is
read, so that packing takes no memory before the graph is saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from kvslim.export.products import bias_of, tensor_of


@dataclass(frozen=True)
class _Projection:
    """`x @ W^T (+ b)` in a graph: the product, its weight [size, in], and the bias addition where there is one."""

    product: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    output: ir.Value
    size: int


def pack_projections(model: ir.Model) -> None:
    """Packs the products of each value with several constant matrices, and hands packed attention inputs on whole."""
    graph = model.graph
    order = {node: index for index, node in enumerate(graph)}
    values = [output for node in graph for output in node.outputs]
    for value in values:
        found = [_projection(user) for user, index in value.uses() if index == 0]
        projections = sorted((p for p in found if p is not None), key=lambda p: order[p.product])
        for siblings in _alike(projections):
            if len(siblings) > 1:
                _pack(graph, value, siblings)
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            _read_packed(node)
    RemoveUnusedNodesPass()(model)


def _projection(node: ir.Node) -> _Projection | None:
    if node.op_type != "FusedMatMul" or node.attributes.get_int("transB", 0) != 1:
        return None
    weight = node.inputs[1]
    if weight is None or weight.const_value is None or node.outputs[0].is_graph_output():
        return None
    size = int(weight.const_value.shape.numpy()[0])
    bias, last = bias_of(node, size)
    return _Projection(node, weight, bias, last.outputs[0], size)


def _alike(projections: list[_Projection]) -> list[list[_Projection]]:
    """Projections by what reads them: attention takes its three packed only if they are packed by themselves."""
    groups: dict[tuple[bool, bool], list[_Projection]] = {}
    for projection in projections:
        key = (projection.bias is None, _feeds_attention(projection.output))
        groups.setdefault(key, []).append(projection)
    return list(groups.values())


def _feeds_attention(value: ir.Value) -> bool:
    """Whether an attention reads a value, with no product with a matrix of weights between."""
    users = {user for user, _ in value.uses() if user.op_type != "FusedMatMul"}
    return any(
        user.op_type == "GroupQueryAttention" or any(_feeds_attention(output) for output in user.outputs)
        for user in users
    )


def _pack(graph: ir.Graph, value: ir.Value, siblings: list[_Projection]) -> None:
    first = siblings[0].product
    name = f"{siblings[0].weight.name}.packed"
    weight = _concatenated(graph, name, [sibling.weight for sibling in siblings])
    attributes = {"transB": 1}
    nodes = [ir.node("FusedMatMul", [value, weight], attributes=attributes, domain="com.microsoft", name=f"{name}.mul")]
    biases = [sibling.bias for sibling in siblings if sibling.bias is not None]
    if biases:
        bias = _concatenated(graph, f"{siblings[0].product.name}.bias", biases)
        nodes.append(ir.node("Add", [nodes[0].outputs[0], bias], name=f"{name}.add"))
    sizes = np.array([sibling.size for sibling in siblings], dtype=np.int64)
    split_sizes = ir.Value(name=f"{name}.sizes", const_value=ir.tensor(sizes))
    graph.register_initializer(split_sizes)
    split = ir.node(
        "Split",
        [nodes[-1].outputs[0], split_sizes],
        attributes={"axis": -1},
        num_outputs=len(siblings),
        name=f"{name}.split",
    )
    nodes.append(split)
    for node in nodes:
        for index, output in enumerate(node.outputs):
            output.name, output.dtype = f"{node.name}.{index}", ir.DataType.FLOAT
    graph.insert_before(first, nodes)
    for sibling, output in zip(siblings, split.outputs, strict=True):
        output.shape = sibling.output.shape
        sibling.output.replace_all_uses_with(output)


def _concatenated(graph: ir.Graph, name: str, parts: list[ir.Value]) -> ir.Value:
    """A new constant: the parts one below the other."""
    tensors = [tensor_of(part) for part in parts]
    shapes = [tensor.shape.numpy() for tensor in tensors]
    shape = ir.Shape((sum(rows for rows, *_ in shapes), *shapes[0][1:]))
    lazy = ir.LazyTensor(
        lambda: ir.tensor(np.concatenate([tensor.numpy() for tensor in tensors])),
        dtype=ir.DataType.FLOAT,
        shape=shape,
        name=name,
    )
    value = ir.Value(name=name, const_value=lazy, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    graph.register_initializer(value)
    return value


def _read_packed(attention: ir.Node) -> None:
    """Lets an attention whose query, key and value are one split in order read what is split."""
    parts = attention.inputs[:3]
    split = None if parts[0] is None else parts[0].producer()
    if split is not None and split.op_type == "Split" and list(parts) == list(split.outputs):
        for index, value in enumerate((split.inputs[0], None, None)):
            attention.replace_input_with(index, value)
