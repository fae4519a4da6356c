"""From an encoder in torch to an ONNX graph: tokens in, hidden states and masked-token logits out."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

from kvslim.contract import BATCH, LENGTH, ModelSpec
from kvslim.export.lowering import quick_lowering
from kvslim.export.matching import quick_matching
from kvslim.export.passes import drop_idle_reshapes, strip_traces
from kvslim.export.quiet import quiet
from kvslim.loading.encoders import ENCODERS, encoder_inputs

OPSET = 23
HIDDEN, LOGITS = "last_hidden_state", "logits"


def build_encoder_graph(model: Any, spec: ModelSpec) -> ir.Model:
    """The ONNX graph of an encoder, its weights in memory.

    Args:
        model: The prepared encoder, with a masked-token head if `spec.task` says so.
        spec: Its shape.

    Returns:
        A graph from `encoder_inputs(spec)`, int64 [batch, length] each, to `last_hidden_state` [batch, length, hidden]
        and, with a masked-token head, `logits` [batch, length, vocab].
    """
    inputs, outputs = encoder_inputs(spec), [HIDDEN, *([LOGITS] if spec.task == "fill-mask" else [])]
    tokens = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    # torch.export takes sizes 0 and 1 for constants, and one tensor given twice for one input.
    samples = tuple(torch.ones(2, 3, dtype=torch.long) for _ in inputs)
    with torch.inference_mode(False), torch.no_grad(), quiet(), quick_lowering(), quick_matching():
        program = torch.export.export(
            _Encoder(model, spec), samples, dynamic_shapes={"tokens": (tokens,) * len(inputs)}, strict=False
        )
        exported = torch.onnx.export(
            program, input_names=inputs, output_names=outputs, opset_version=OPSET, verbose=False
        )
        if exported is None:
            raise RuntimeError("torch.onnx.export returned nothing")
        _simplify(exported.model)
    return exported.model


class _Encoder(nn.Module):
    """The graph's inputs and outputs around a model; logits come first from the model, last from the graph."""

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        super().__init__()
        self.model, self.names, self.spec = model, encoder_inputs(spec), spec

    def forward(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        arguments = dict(zip(self.names, tokens, strict=True))
        if ENCODERS[self.spec.model_type].offset_positions:
            mask = arguments["attention_mask"]
            arguments["position_ids"] = mask.cumsum(1) * mask + self.model.config.pad_token_id
        if self.spec.task == "feature-extraction":
            return (self.model(**arguments).last_hidden_state,)
        output = self.model(**arguments, output_hidden_states=True)
        return output.hidden_states[-1], output.logits


def _simplify(model: ir.Model) -> None:
    fuse_for_onnxruntime(model, "cpu")
    drop_idle_reshapes(model)
    merge_biases(model)
    strip_traces(model)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        sizes = () if value.shape is None else value.shape[2:]
        value.shape = ir.Shape([BATCH, LENGTH, *sizes])


def merge_biases(model: ir.Model) -> None:
    """Adds the biases of packed projections at once, before the split, where the product's kernel can take them in."""
    graph = model.graph
    for split in [node for node in graph if node.op_type == "Split"]:
        adds = [_only_user(value) for value in split.outputs]
        biases = [_bias(add) for add in adds]
        source = split.inputs[0]
        if source is None or any(bias is None for bias in biases):
            continue
        bias = ir.val(f"{split.name}.bias", const_value=ir.tensor(np.concatenate(biases)))  # type: ignore[arg-type]
        graph.register_initializer(bias)
        biased = ir.node("Add", [source, bias], name=f"{split.name}.biased")
        biased.outputs[0].type = source.type
        graph.insert_before(split, biased)
        split.replace_input_with(0, biased.outputs[0])
        for add, value in zip(adds, split.outputs, strict=True):
            assert add is not None  # it has a bias
            add.outputs[0].replace_all_uses_with(value)
    RemoveUnusedNodesPass()(model)


def _only_user(value: ir.Value) -> ir.Node | None:
    users = [usage.node for usage in value.uses()]
    return users[0] if len(users) == 1 else None


def _bias(node: ir.Node | None) -> np.ndarray | None:
    """The constant vector that an Add adds, if it does."""
    if node is None or node.op_type != "Add":
        return None
    constants = [value.const_value.numpy() for value in node.inputs if value is not None and value.const_value]
    return constants[0] if len(constants) == 1 and constants[0].ndim == 1 else None
