"""Graph passes on onnx_ir: readable dimension names, and matrix products in the form that the quantiser knows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import onnxscript
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnxscript.rewriter import onnx_fusions

from kvslim.types import NUM_LOGITS, KVLayout

BATCH, LENGTH, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
CAPACITY = "max_sequence_length"


def name_dimensions(model: ir.Model, layout: KVLayout) -> None:
    """Gives inputs and outputs the field's dimension names; past and present differ, as onnxruntime requires."""
    shapes: dict[str, tuple[str | int, ...]] = {
        "input_ids": (BATCH, LENGTH),
        "attention_mask": (BATCH, TOTAL),
        "position_ids": (BATCH, LENGTH),
        NUM_LOGITS: (1,),
    }
    for tensor in layout.tensors:
        rows = tensor.rows(0)
        past: str | int
        past, present = (PAST, TOTAL) if tensor.window is None else (rows, rows)
        if layout.layout == "attention24":
            past = present = CAPACITY
        shapes[tensor.past] = (BATCH, tensor.heads, past, tensor.dim)
        shapes[tensor.present] = (BATCH, tensor.heads, present, tensor.dim)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.name == "logits" and value.shape is not None:
            value.shape = ir.Shape([BATCH, LENGTH, value.shape[-1]])
        elif value.name is not None:
            value.shape = ir.Shape(shapes[value.name])


def share_tied_weights(model: ir.Model) -> None:
    """Makes one initializer of those that torch keeps in one memory, such as an embedding and the head tied to it."""
    first: dict[tuple[int, tuple[int, ...]], ir.Value] = {}
    for value in list(model.graph.initializers.values()):
        raw = getattr(value.const_value, "raw", None)
        if isinstance(raw, torch.Tensor) and raw.numel() > 1:
            kept = first.setdefault((raw.data_ptr(), tuple(raw.stride())), value)
            if kept is not value and kept.const_value.shape == value.const_value.shape:  # type: ignore[union-attr]
                value.replace_all_uses_with(kept)


@contextlib.contextmanager
def hidden_weights(model: ir.Model) -> Iterator[None]:
    """Within the block the matrices of a graph are inputs without a value, so that no pass copies or folds them."""
    graph = model.graph
    hidden = {value: value.const_value for value in graph.initializers.values() if _is_matrix(value)}
    for value in hidden:
        del graph.initializers[str(value.name)]
        value.const_value = None
        graph.inputs.append(value)
    try:
        yield
    finally:
        for value, tensor in hidden.items():
            graph.inputs.remove(value)
            value.const_value = tensor
            if value.uses():
                graph.register_initializer(value)


def _is_matrix(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 2 and value.dtype == ir.DataType.FLOAT


def optimise(model: ir.Model) -> None:
    """onnxscript's constant folding and clean-up."""
    onnxscript.optimizer.optimize_ir(model)
    onnx_fusions.fuse(model)


def drop_idle_rotations(model: ir.Model) -> None:
    """Drops rotations by nothing, x * 1 + y * 0: what the model's own RoPE is once the slim attention does it."""
    for node in list(model.graph):
        if node.op_type != "Add":
            continue
        factors = [_scaled_by(value) for value in node.inputs]
        kept = [states for states, factor in factors if factor == 1 and states is not None]
        if len(kept) == 1 and {factor for _, factor in factors} == {0, 1}:
            node.outputs[0].replace_all_uses_with(kept[0])
    RemoveUnusedNodesPass()(model)


def _scaled_by(value: ir.Value | None) -> tuple[ir.Value | None, float | None]:
    """x and c of `x * c` with a constant whose entries all equal c."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Mul":
        return value, None
    for states, factor in (node.inputs, reversed(node.inputs)):
        constant = None if factor is None or factor.const_value is None else factor.const_value.numpy()
        if constant is not None and (constant == constant.flat[0]).all():
            return states, float(constant.flat[0])
    return value, None


def give_default(model: ir.Model, name: str, default: np.ndarray) -> None:
    """Gives a graph input the value it has when the caller passes none."""
    value = next(value for value in model.graph.inputs if value.name == name)
    value.const_value = ir.tensor(default, name=name)
    model.graph.register_initializer(value)


def drop_unused_inputs(model: ir.Model) -> None:
    """Drops graph inputs that nothing reads, such as positions where the fused operator counts them itself."""
    for value in list(model.graph.inputs):
        if not value.uses():
            model.graph.inputs.remove(value)


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
