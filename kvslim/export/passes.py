"""Graph passes on onnx_ir: readable dimension names, no idle nodes, no traces of the exporter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import onnx_ir as ir
import onnxscript
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnxscript.rewriter import onnx_fusions

from kvslim.caches.shared import SHARED
from kvslim.contract import BATCH, LAST_POSITION, LENGTH, TOTAL, Axes
from kvslim.export.products import PRODUCTS
from kvslim.types import KVLayout


def name_dimensions(model: ir.Model, layout: KVLayout) -> None:
    """Gives inputs and outputs the field's dimension names; past and present differ, as onnxruntime requires."""
    shapes: dict[str, Axes] = {
        "input_ids": (BATCH, LENGTH),
        "attention_mask": (BATCH, TOTAL),
        "position_ids": (BATCH, LENGTH),
    }
    for tensor in layout.tensors:
        shapes[tensor.past] = tensor.past_axes(layout.layout)
        shapes[tensor.present] = tensor.present_axes(layout.layout)
    shapes |= layout.extra_inputs | layout.extra_outputs
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.name == "logits" and value.shape is not None:
            value.shape = ir.Shape([BATCH, 1, value.shape[-1]])
        elif value.name is not None and value.name.startswith(SHARED):
            kind, source, _ = value.name.removeprefix(SHARED).split(".")
            value.shape = ir.Shape(shapes[f"present.{source}.{kind}"])
        elif value.name is not None:
            value.shape = ir.Shape(shapes[value.name])


def share_tied_weights(model: ir.Model) -> None:
    """Makes one initializer of those that torch keeps in one memory, such as an embedding and the head tied to it."""
    first: dict[tuple[object, ...], ir.Value] = {}
    for value in list(model.graph.initializers.values()):
        raw = getattr(value.const_value, "raw", None)
        if isinstance(raw, torch.Tensor) and raw.numel() > 1:
            kept = first.setdefault((raw.data_ptr(), tuple(raw.shape), raw.stride()), value)
            if kept is not value:
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


def name_last_position(model: ir.Model) -> None:
    """Names the node that takes the last position for the head, by which a session that wants all finds it."""
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    node, products = logits.producer(), 0
    while node is not None and node.op_type != "Slice":
        products += node.op_type in PRODUCTS
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or products != 1:
        raise RuntimeError("the exporter left no node that takes the last position for the head")
    node.name = LAST_POSITION


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
