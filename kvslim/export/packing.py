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
from kvslim.weights.rows import QuantisedRows


@dataclass(frozen=True)
class _Projection:
    """`x @ W^T (+ b)` in a graph: the product, its weight [size, in], and the bias addition where there is one."""

    product: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    output: ir.Value
    size: int


def pack_projections(model: ir.Model, rows: QuantisedRows | None = None) -> None:
    """Packs the products of each value with several constant matrices, and hands packed attention inputs on whole.

    Args:
        model: The graph; edited.
        rows: What the rows of its matrices will be stored as, where they are quantised; what is stored in another form
            stays apart.
    """
    graph = model.graph
    order = {node: index for index, node in enumerate(graph)}
    values = [output for node in graph for output in node.outputs]
    for value in values:
        found = [_projection(user) for user, index in value.uses() if index == 0]
        projections = sorted((p for p in found if p is not None), key=lambda p: order[p.product])
        for siblings in _alike(projections, rows):
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


def _alike(projections: list[_Projection], rows: QuantisedRows | None) -> list[list[_Projection]]:
    """Projections by what reads them: attention takes its three packed only if they are packed by themselves."""
    groups: dict[tuple[object, bool], list[_Projection]] = {}
    for projection in projections if len(projections) > 1 else ():
        form = None if rows is None else rows.form(tensor_of(projection.weight).numpy())
        key = (form, _feeds_attention(projection.output))
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
    if any(sibling.bias is not None for sibling in siblings):
        bias = _concatenated(graph, f"{siblings[0].product.name}.bias", [_bias_or_zeros(one) for one in siblings])
        nodes.append(ir.node("Add", [nodes[0].outputs[0], bias], name=f"{name}.add"))
    parts = _parts(siblings)
    outputs = nodes[-1].outputs
    if len(parts) > 1:
        sizes = ir.Value(name=f"{name}.sizes", const_value=ir.tensor(np.array([*parts.values()], dtype=np.int64)))
        graph.register_initializer(sizes)
        operands = [outputs[0], sizes]
        nodes.append(ir.node("Split", operands, {"axis": -1}, num_outputs=len(parts), name=f"{name}.split"))
        outputs = nodes[-1].outputs
    for node in nodes:
        for index, output in enumerate(node.outputs):
            output.name, output.dtype = f"{node.name}.{index}", ir.DataType.FLOAT
    graph.insert_before(first, nodes)
    for part, output in zip(parts, outputs, strict=True):
        output.shape = part.shape
        part.replace_all_uses_with(output)


def _parts(siblings: list[_Projection]) -> dict[ir.Value, int]:
    """What is read of the packed product, with its size: first ones that are only read joined again are one part."""
    outputs, sizes = [sibling.output for sibling in siblings], [sibling.size for sibling in siblings]
    users = [user for user, place in outputs[0].uses() if user.op_type == "Concat" and place == 0]
    joined = users[0] if len(users) == 1 else None
    count = 0 if joined is None else len(joined.inputs)
    if joined is None or joined.attributes.get_int("axis", 0) not in (-1, 2) or list(joined.inputs) != outputs[:count]:
        return dict(zip(outputs, sizes, strict=True))
    if any(len(part.uses()) > 1 for part in outputs[:count]):
        return dict(zip(outputs, sizes, strict=True))
    return {joined.outputs[0]: sum(sizes[:count]), **dict(zip(outputs[count:], sizes[count:], strict=True))}


def _bias_or_zeros(projection: _Projection) -> ir.Value:
    if projection.bias is not None:
        return projection.bias
    return ir.Value(const_value=ir.tensor(np.zeros(projection.size, np.float32)))


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
