"""From a prepared torch model to an ONNX graph with onnxruntime's fused operators and its cache as inputs."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

from kvslim.export.packing import pack_projections
from kvslim.export.passes import (
    drop_idle_reshapes,
    drop_idle_rotations,
    drop_unused_inputs,
    hidden_weights,
    name_dimensions,
    name_last_position,
    optimise,
    share_tied_weights,
    strip_traces,
)
from kvslim.export.quiet import quiet
from kvslim.export.storage import share_storage
from kvslim.load.architecture import Architecture
from kvslim.transform.attention import PassThroughCache, SlimAttention
from kvslim.transform.operators import ExportStep
from kvslim.transform.surgery import slim_modules
from kvslim.types import INPUTS, RINGS, SHARED, KVLayout, KVTensor, Layout

OPSETS: dict[Layout, int] = {"gqa": 21, "attention24": 24}
TORCH_TYPES = {"float32": torch.float32, "int8": torch.int8, "int4": torch.uint8}


class _Decoder(nn.Module):
    """The graph: tokens, mask, positions and past cache in; logits of the last position and present cache out."""

    def __init__(self, model: Any, architecture: Architecture, layout: KVLayout) -> None:
        super().__init__()
        self.model, self.layout = model, layout
        self.slims = slim_modules(model, architecture)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, ...]],
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        rows = past[0][0].shape[2]
        shared: dict[object, Tensor] = {}
        caches = {tensors[0].layer: tensors for tensors in _by_layer(self.layout)}
        pasts = dict(zip(caches, past, strict=True))
        for layer, slim in enumerate(self.slims):
            windowed = layer in caches and caches[layer][0].window is not None
            slim.step = ExportStep(
                self.layout.layout, windowed, pasts.get(layer, ()), rows, attention_mask, position_ids, shared
            )
        head = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][:, -1:],))
        try:
            output = self.model(
                input_ids=input_ids, position_ids=position_ids, past_key_values=PassThroughCache(past), use_cache=True
            )
        finally:
            head.remove()
        own, borrowed = (
            [slim.step.present for slim in slims if slim.step and slim.step.present]
            for slims in ([self.slims[layer] for layer in caches], self._borrowers)
        )
        return output.logits, [*own, *borrowed]

    @property
    def _borrowers(self) -> list[SlimAttention]:
        return [slim for slim in self.slims if slim.borrowed is not None]

    def shared_names(self) -> list[str]:
        """What the present caches are called that the operators of layers without a cache give of their donors'."""
        return [
            f"{SHARED}{kind}.{slim.borrowed.layer}.{layer}"
            for layer, slim in enumerate(self.slims)
            if slim.borrowed is not None and self.layout.layout == "gqa"
            for kind in ("key", "value")
        ]


def build_graph(model: Any, architecture: Architecture, layout: KVLayout) -> ir.Model:
    """The ONNX graph of a prepared model.

    Args:
        model: The model with its slim attention and codes installed.
        architecture: Where its parts live.
        layout: The cache that the codes give.

    Returns:
        A graph with the inputs and outputs that `layout` names; its weights stay where the model has them, and what
        is computed from them (a transposed or packed matrix) is computed when it is read.
    """
    decoder = _Decoder(model, architecture, layout)
    try:
        with torch.inference_mode(False), torch.no_grad(), quiet():
            graph = _exported(decoder, layout)
            share_tied_weights(graph)
            with hidden_weights(graph):
                optimise(graph)
                drop_idle_rotations(graph)
                fuse_for_onnxruntime(graph, "cpu")
                drop_idle_reshapes(graph)
            pack_projections(graph)
            name_last_position(graph)
            drop_unused_inputs(graph)
            strip_traces(graph)
            name_dimensions(graph, layout)
            _name_rings(graph, layout)
        return graph
    finally:
        for slim in decoder.slims:
            slim.step, slim.hidden = None, None
            if slim.lent is not None:
                slim.lent.states = None


def _exported(decoder: _Decoder, layout: KVLayout) -> ir.Model:
    """The graph as the exporter leaves it."""
    batch, length, past_length = 2, 3, 5  # torch.export takes sizes 0 and 1 for constants
    past = [tuple(_sample(tensor, batch, past_length) for tensor in tensors) for tensors in _by_layer(layout)]
    ids = torch.zeros(batch, length, dtype=torch.long)
    mask = torch.ones(batch, past_length + length, dtype=torch.long)
    positions = torch.arange(past_length, past_length + length).repeat(batch, 1)
    arguments = (ids, mask, positions, past)
    program = torch.export.export(decoder, arguments, dynamic_shapes=_dynamic_dims(layout), strict=False)
    exported = torch.onnx.export(
        program,
        input_names=[*INPUTS, *(tensor.past for tensor in layout.tensors)],
        output_names=["logits", *(tensor.present for tensor in layout.tensors), *decoder.shared_names()],
        opset_version=OPSETS[layout.layout],
        optimize=False,
        verbose=False,
    )
    if exported is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    return exported.model


def _by_layer(layout: KVLayout) -> list[tuple[KVTensor, ...]]:
    """The KV inputs of each layer, in order."""
    return [tuple(tensors) for _, tensors in groupby(layout.tensors, key=lambda tensor: tensor.layer)]


def _sample(tensor: KVTensor, batch: int, rows: int) -> Tensor:
    """A cache input to trace with."""
    if tensor.is_packed:
        return torch.zeros(batch, rows, tensor.heads, tensor.columns, dtype=torch.uint8)
    return torch.zeros(batch, tensor.heads, tensor.rows(rows), tensor.columns, dtype=TORCH_TYPES[tensor.dtype])


def _dynamic_dims(layout: KVLayout) -> dict[str, Any]:
    dynamic = torch.export.Dim.DYNAMIC
    tokens = {0: dynamic, 1: dynamic}
    return {
        "input_ids": tokens,
        "attention_mask": tokens,
        "position_ids": tokens,
        "past": [tuple(_dynamic_rows(tensor) for tensor in tensors) for tensors in _by_layer(layout)],
    }


def _dynamic_rows(tensor: KVTensor) -> dict[int, Any]:
    dynamic = torch.export.Dim.DYNAMIC
    if tensor.sinks is not None and not tensor.is_packed:
        return {0: dynamic}
    return {0: dynamic, 1 if tensor.is_packed else 2: dynamic}


def _name_rings(graph: ir.Model, layout: KVLayout) -> None:
    """Notes the sinks of each ring and the bits of its codes, which no shape tells."""
    rings = {
        str(tensors[0].layer): {"sinks": tensors[0].sinks, "cache": tensors[-1].dtype}
        for tensors in _by_layer(layout)
        if tensors[0].sinks is not None
    }
    if rings:
        graph.metadata_props[RINGS] = json.dumps(rings)


def token_inputs(graph: ir.Model) -> tuple[str, ...]:
    """The inputs of a graph that a caller must give, other than the cache."""
    return tuple(str(value.name) for value in graph.graph.inputs if value.name in INPUTS)


def save_graph(model: ir.Model, folder: Path) -> None:
    """Writes model.onnx and model.onnx_data; equal models give equal bytes."""
    path = folder / "model.onnx"
    ir.save(model, path, external_data="model.onnx_data")
    share_storage(path)
