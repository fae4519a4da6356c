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
    splits: list[ir.Node] = []
    for value in values:
        found = [_projection(user) for user, index in value.uses() if index == 0]
        projections = sorted((p for p in found if p is not None), key=lambda p: order[p.product])
        for siblings in _alike(projections, rows):
            if len(siblings) > 1:
                splits.append(_pack(graph, value, siblings))
    for split in splits:
        _split_less(graph, split)
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


def _pack(graph: ir.Graph, value: ir.Value, siblings: list[_Projection]) -> ir.Node:
    """Replaces projections by one; the node that splits what it gives."""
    first = siblings[0].product
    name = f"{siblings[0].weight.name}.packed"
    weight = _concatenated(graph, name, [sibling.weight for sibling in siblings])
    attributes = {"transB": 1}
    nodes = [ir.node("FusedMatMul", [value, weight], attributes=attributes, domain="com.microsoft", name=f"{name}.mul")]
    if any(sibling.bias is not None for sibling in siblings):
        bias = _concatenated(graph, f"{siblings[0].product.name}.bias", [_bias_or_zeros(one) for one in siblings])
        nodes.append(ir.node("Add", [nodes[0].outputs[0], bias], name=f"{name}.add"))
    for node in nodes:
        node.outputs[0].name, node.outputs[0].dtype = f"{node.name}.0", ir.DataType.FLOAT
    split = _split(graph, nodes[-1].outputs[0], [sibling.size for sibling in siblings], name)
    graph.insert_before(first, [*nodes, split])
    for sibling, output in zip(siblings, split.outputs, strict=True):
        output.shape = sibling.output.shape
        sibling.output.replace_all_uses_with(output)
    return split


def _split(graph: ir.Graph, value: ir.Value, sizes: list[int], name: str) -> ir.Node:
    """A node that cuts the last axis of a value into parts."""
    constant = ir.Value(name=f"{name}.sizes", const_value=ir.tensor(np.array(sizes, dtype=np.int64)))
    graph.register_initializer(constant)
    node = ir.node("Split", [value, constant], {"axis": -1}, num_outputs=len(sizes), name=f"{name}.split")
    for index, output in enumerate(node.outputs):
        output.name, output.dtype = f"{node.name}.{index}", ir.DataType.FLOAT
    return node


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


def _split_less(graph: ir.Graph, split: ir.Node) -> None:
    """Where neighbours among the parts are joined again, takes them out whole."""
    outputs, whole = list(split.outputs), split.inputs[0]
    found = [user for user, index in outputs[0].uses() if user.op_type == "Concat" and index == 0]
    joined = found[0] if len(found) == 1 else None
    if whole is None or joined is None or joined.attributes.get_int("axis", 0) not in (-1, 2):
        return
    count = len(joined.inputs)
    if list(joined.inputs) != outputs[:count] or any(len(part.uses()) > 1 for part in outputs[:count]):
        return
    if count == len(outputs):
        joined.outputs[0].replace_all_uses_with(whole)
        return
    sizes = [int(size) for size in tensor_of(_sizes(split)).numpy()]
    fewer = _split(graph, whole, [sum(sizes[:count]), *sizes[count:]], f"{split.name}.fewer")
    graph.insert_before(split, fewer)
    for old, new in zip([joined.outputs[0], *outputs[count:]], fewer.outputs, strict=True):
        new.shape = old.shape
        old.replace_all_uses_with(new)


def _sizes(split: ir.Node) -> ir.Value:
    sizes = split.inputs[1]
    assert sizes is not None
    return sizes


def _read_packed(attention: ir.Node) -> None:
    """Lets an attention whose query, key and value are one split in order read what is split."""
    parts = attention.inputs[:3]
    split = None if parts[0] is None else parts[0].producer()
    if split is not None and split.op_type == "Split" and list(parts) == list(split.outputs):
        for index, value in enumerate((split.inputs[0], None, None)):
            attention.replace_input_with(index, value)
