"""From a prepared torch model to an ONNX graph with onnxruntime's fused operators and its cache as inputs."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
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
from kvslim.transform.clustering import Formed
from kvslim.transform.operators import ExportStep
from kvslim.transform.surgery import slim_modules
from kvslim.types import ATTENTIONS, CLUSTER_INPUTS, CLUSTERS, INPUTS, RINGS, SHARED, KVLayout, KVTensor, Layout

OPSETS: dict[Layout, int] = {"gqa": 21, "attention24": 24}
SAMPLE_CLUSTERS = 4  # unlike any other size that is traced, which torch.export could take for the same
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
        clusters: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, ...]], list[Tensor]]:
        rows = past[0][0].shape[2]
        shared: dict[object, Tensor] = {}
        caches = {tensors[0].layer: tensors for tensors in _by_layer(self.layout)}
        pasts = dict(zip(caches, past, strict=True))
        formed = dict(zip(self.layout.dynamic_layers, clusters, strict=True))
        for layer, slim in enumerate(self.slims):
            windowed = layer in caches and caches[layer][0].window is not None
            heads = formed.get(layer)
            slim.step = ExportStep(
                self.layout.layout, windowed, pasts.get(layer, ()), rows, attention_mask, position_ids, heads, shared
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
        steps = [slim.step for slim in self.slims if slim.step is not None]
        attentions = [step.attentions for step in steps if step.attentions is not None]
        return output.logits, [*own, *borrowed], attentions

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
            _note_rings(graph, layout)
            _note_clusters(graph, decoder)
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
    arguments = (ids, mask, positions, past, _sample_clusters(layout))
    program = torch.export.export(decoder, arguments, dynamic_shapes=_dynamic_dims(layout), strict=False)
    exported = torch.onnx.export(
        program,
        input_names=[*INPUTS, *(tensor.past for tensor in layout.tensors), *_cluster_inputs(layout)],
        output_names=[
            "logits",
            *(tensor.present for tensor in layout.tensors),
            *decoder.shared_names(),
            *(ATTENTIONS.format(layer) for layer in layout.dynamic_layers),
        ],
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
    heads = SAMPLE_CLUSTERS if _has_dynamic_heads(tensor) else tensor.heads
    return torch.zeros(batch, heads, tensor.rows(rows), tensor.columns, dtype=TORCH_TYPES[tensor.dtype])


def _sample_clusters(layout: KVLayout) -> list[tuple[Tensor, Tensor]]:
    """Inputs of dynamic clusters to trace with."""
    heads = {tensor.layer: tensor.heads for tensor in layout.tensors if tensor.kind == "value"}
    counts = [heads[layer] for layer in layout.dynamic_layers]
    return [(torch.arange(SAMPLE_CLUSTERS), torch.arange(count) % SAMPLE_CLUSTERS) for count in counts]


def _cluster_inputs(layout: KVLayout) -> list[str]:
    return [name.format(layer) for layer in layout.dynamic_layers for name in CLUSTER_INPUTS]


def _dynamic_dims(layout: KVLayout) -> dict[str, Any]:
    dynamic = torch.export.Dim.DYNAMIC
    tokens = {0: dynamic, 1: dynamic}
    return {
        "input_ids": tokens,
        "attention_mask": tokens,
        "position_ids": tokens,
        "past": [tuple(_dynamic_rows(tensor) for tensor in tensors) for tensors in _by_layer(layout)],
        "clusters": [({0: dynamic}, {}) for _ in layout.dynamic_layers],
    }


def _dynamic_rows(tensor: KVTensor) -> dict[int, Any]:
    dynamic = torch.export.Dim.DYNAMIC
    if tensor.sinks is not None and not tensor.is_packed:
        return {0: dynamic}
    if _has_dynamic_heads(tensor):
        return {0: dynamic, 1: dynamic, 2: dynamic}
    return {0: dynamic, 1 if tensor.is_packed else 2: dynamic}


def _has_dynamic_heads(tensor: KVTensor) -> bool:
    """Whether the runtime says how many heads there are."""
    return tensor.clusters == "dynamic" and tensor.kind == "key"


def _note_rings(graph: ir.Model, layout: KVLayout) -> None:
    """Notes the sinks of each ring and the bits of its codes, which no shape tells."""
    rings = {
        str(tensors[0].layer): {"sinks": tensors[0].sinks, "cache": tensors[-1].dtype}
        for tensors in _by_layer(layout)
        if tensors[0].sinks is not None
    }
    if rings:
        graph.metadata_props[RINGS] = json.dumps(rings)


def _note_clusters(graph: ir.Model, decoder: _Decoder) -> None:
    """Notes which layers have clusters of heads, and how those that are not fixed are formed."""
    clustered = {str(tensor.layer) for tensor in decoder.layout.tensors if tensor.clusters is not None}
    formed = {layer: decoder.slims[int(layer)].formed for layer in sorted(clustered, key=int)}
    notes = {layer: None if how is None else _note(how) for layer, how in formed.items()}
    if notes:
        graph.metadata_props[CLUSTERS] = json.dumps(notes)


def _note(formed: Formed) -> dict[str, Any]:
    scale = formed.calibrated.max() or 1.0
    return {"count": formed.count, "calibrated": np.round(formed.calibrated / scale, 4).tolist()}


def token_inputs(graph: ir.Model) -> tuple[str, ...]:
    """The inputs of a graph that a caller must give, other than the cache."""
    names = (str(value.name) for value in graph.graph.inputs)
    return tuple(name for name in names if not name.startswith("past_key_values."))


def save_graph(model: ir.Model, folder: Path) -> None:
    """Writes model.onnx and model.onnx_data; equal models give equal bytes."""
    path = folder / "model.onnx"
    ir.save(model, path, external_data="model.onnx_data")
    share_storage(path)
