"""Graph passes on onnx_ir: readable dimension names, and matrix products in the form that the quantiser knows."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

from kvslim.types import KVLayout

BATCH, LENGTH, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


def name_dimensions(model: ir.Model, layout: KVLayout) -> None:
    """Gives inputs and outputs the field's dimension names; past and present differ, as onnxruntime requires."""
    shapes: dict[str, tuple[str | int, ...]] = {
        "input_ids": (BATCH, LENGTH),
        "attention_mask": (BATCH, TOTAL),
        "position_ids": (BATCH, LENGTH),
    }
    for tensor in layout.tensors:
        shapes[tensor.past] = (BATCH, tensor.heads, PAST, tensor.dim)
        shapes[tensor.present] = (BATCH, tensor.heads, TOTAL, tensor.dim)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.name == "logits" and value.shape is not None:
            value.shape = ir.Shape([BATCH, LENGTH, value.shape[-1]])
        elif value.name is not None:
            value.shape = ir.Shape(shapes[value.name])


def drop_idle_reshapes(model: ir.Model) -> None:
    """Drops reshapes of reshapes that come back to the shape they started from.

    Modelling code splits and merges heads around attention; the fused operators read merged heads, so both steps idle,
    and at one token per step an idle node costs as much as a busy one.
    """
    for node in list(model.graph):
        inner = node.inputs[0].producer() if node.op_type == "Reshape" and node.inputs[0] is not None else None
        if inner is None or inner.op_type != "Reshape" or inner.inputs[0] is None:
            continue
        start, end = inner.inputs[0], node.outputs[0]
        if start.shape is not None and start.shape == end.shape and not end.is_graph_output():
            end.replace_all_uses_with(start)
    RemoveUnusedNodesPass()(model)


def strip_traces(model: ir.Model) -> None:
    """Drops what the exporter notes for its own debugging: source lines, paths, and shapes with names of its own."""
    ClearMetadataAndDocStringPass()(model)
    outputs = set(model.graph.outputs)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value not in outputs:
                value.shape = None


def plain_matmuls(model: ir.Model) -> None:
    """Turns Gemm and FusedMatMul over a constant weight into MatMul (and Add).

    The weight quantiser reads MatMul alone; without this a tied output head or a Conv1D would silently stay float32.
    """
    for node in list(model.graph):
        if node.op_type in ("Gemm", "FusedMatMul") and _weight(node) is not None and _is_product(node):
            _replace(model.graph, node)


def _weight(node: ir.Node) -> np.ndarray | None:
    value = node.inputs[1]
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _is_product(node: ir.Node) -> bool:
    unit = {"alpha": 1.0, "beta": 1.0}
    scaled = any(name in node.attributes and node.attributes.get_float(name) != one for name, one in unit.items())
    others = ("transA", "transBatchA", "transBatchB")
    return not scaled and not any(node.attributes.get_int(name, 0) for name in others)


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    source, weight = node.inputs[1], _weight(node)
    if source is None or weight is None:
        return
    if node.attributes.get_int("transB", 0):
        source = _initializer(graph, f"{source.name}.transposed", np.ascontiguousarray(weight.T))
    product = ir.node("MatMul", [node.inputs[0], source], name=f"{node.name}.matmul")
    nodes = [product]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        nodes.append(ir.node("Add", [product.outputs[0], node.inputs[2]], name=f"{node.name}.bias"))
    old, new = node.outputs[0], nodes[-1].outputs[0]
    for made in nodes:
        made.outputs[0].name, made.outputs[0].type, made.outputs[0].shape = f"{made.name}.out", old.type, old.shape
    graph.insert_before(node, nodes)
    name, is_output = old.name, old.is_graph_output()
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if is_output:
        new.name = name


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array), type=ir.TensorType(ir.DataType.FLOAT))
    value.shape = ir.Shape(array.shape)
    graph.register_initializer(value)
    return value
