"""From a prepared torch model to an ONNX graph with onnxruntime's fused operators and its cache as inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

from kvslim.caches import CACHES
from kvslim.caches.attention.shared import SharedAttention
from kvslim.caches.packed import PAST_CODES
from kvslim.caches.shared import SHARED
from kvslim.contract import BATCH, CAPACITY, INPUTS, PAST, Axes, KVTensor, Layout
from kvslim.export.lowering import quick_lowering
from kvslim.export.matching import quick_matching
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
from kvslim.loading.architecture import Architecture
from kvslim.loading.mapped import let_go
from kvslim.progress import Progress, Silent
from kvslim.transform.attention import PassThroughCache, SlimAttention
from kvslim.transform.operators import ExportStep
from kvslim.transform.surgery import slim_modules
from kvslim.types import KVLayout
from kvslim.weights.rows import QuantisedRows

OPSETS: dict[Layout, int] = {"gqa": 21, "attention24": 24}
SAMPLE_HEADS = 4  # unlike any other size that is traced, which torch.export could take for the same
TORCH_TYPES = {"float32": torch.float32, "int8": torch.int8, "int4": torch.uint8}


class _Decoder(nn.Module):
    """The graph: tokens, mask, positions and past cache in; logits of the last position and present cache out."""

    def __init__(
        self, model: Any, architecture: Architecture, layout: KVLayout, rows: QuantisedRows | None = None
    ) -> None:
        super().__init__()
        self.model, self.layout, self.rows = model, layout, rows
        self.slims = slim_modules(model, architecture)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, ...]],
        extra: list[tuple[Tensor, ...]],
    ) -> tuple[Tensor, list[tuple[Tensor, ...]], list[Tensor]]:
        rows = past[0][0].shape[2]
        shared: dict[object, Tensor] = {}
        caches = {tensors[0].layer: tensors for tensors in self.layout.layers}
        pasts, extras = (dict(zip(caches, each, strict=True)) for each in (past, extra))
        for layer, slim in enumerate(self.slims):
            windowed = layer in caches and caches[layer][0].window is not None
            slim.step = ExportStep(
                self.layout.layout,
                windowed,
                pasts.get(layer, ()),
                rows,
                attention_mask,
                position_ids,
                extras.get(layer, ()),
                shared,
            )
        with self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][:, -1:],)):
            output = self.model(
                input_ids=input_ids, position_ids=position_ids, past_key_values=PassThroughCache(past), use_cache=True
            )
        own, read = (
            [slim.step.present for slim in slims if slim.step and slim.step.present]
            for slims in ([self.slims[layer] for layer in caches], self._readers.values())
        )
        steps = [slim.step for slim in self.slims if slim.step is not None]
        return output.logits, [*own, *read], [value for step in steps for value in step.extra_outputs]

    @property
    def _readers(self) -> dict[int, SlimAttention]:
        """The layers that read another's cache, by index."""
        return {layer: slim for layer, slim in enumerate(self.slims) if isinstance(slim.cache, SharedAttention)}

    def shared_names(self) -> list[str]:
        """What the present caches are called that the operators of layers without a cache give of their sources'."""
        return [
            f"{SHARED}{kind}.{slim.cache.read.source}.{layer}"
            for layer, slim in self._readers.items()
            if isinstance(slim.cache, SharedAttention) and self.layout.layout == "gqa"
            for kind in ("key", "value")
        ]


def build_graph(
    model: Any,
    architecture: Architecture,
    layout: KVLayout,
    progress: Progress | None = None,
    rows: QuantisedRows | None = None,
) -> ir.Model:
    """The ONNX graph of a prepared model.

    Args:
        model: The model with its slim attention and codes installed.
        architecture: Where its parts live.
        layout: The cache that the codes give.
        progress: Receives the progress.
        rows: What the rows of its matrices will be stored as, where they are quantised.

    Returns:
        A graph with the inputs and outputs that `layout` names; its weights stay where the model has them, and what
        is computed from them (a transposed or packed matrix) is computed when it is read.
    """
    decoder = _Decoder(model, architecture, layout, rows)
    try:
        with torch.inference_mode(False), torch.no_grad(), quiet(), quick_lowering(), quick_matching():
            made: Any = decoder
            steps: list[Callable[[Any, _Decoder], Any]] = [_traced, _translated, _optimised, _fused, _finished]
            for step in (progress or Silent()).track(steps, "steps of the export"):
                made = step(made, decoder)
        graph: ir.Model = made
        return graph
    finally:
        for slim in decoder.slims:
            slim.step, slim.hidden = None, None
            if slim.shared is not None:
                slim.shared.states = None


def _traced(_: Any, decoder: _Decoder) -> torch.export.ExportedProgram:
    """The decoder as torch's operators."""
    layout = decoder.layout
    batch, length, past_length = 2, 3, 5  # torch.export takes sizes 0 and 1 for constants
    past = [tuple(_sample(layout, tensor, batch, past_length) for tensor in tensors) for tensors in layout.layers]
    ids = torch.zeros(batch, length, dtype=torch.long)
    mask = torch.ones(batch, past_length + length, dtype=torch.long)
    positions = torch.arange(past_length, past_length + length).repeat(batch, 1)
    arguments = (ids, mask, positions, past, _sample_extra(layout))
    return torch.export.export(decoder, arguments, dynamic_shapes=_dynamic_dims(layout), strict=False)


def _translated(program: torch.export.ExportedProgram, decoder: _Decoder) -> ir.Model:
    """The graph as the exporter leaves it."""
    layout = decoder.layout
    exported = torch.onnx.export(
        program,
        input_names=[*INPUTS, *(tensor.past for tensor in layout.tensors), *layout.extra_inputs],
        output_names=[
            "logits",
            *(tensor.present for tensor in layout.tensors),
            *decoder.shared_names(),
            *layout.extra_outputs,
        ],
        opset_version=OPSETS[layout.layout],
        optimize=False,
        verbose=False,
    )
    if exported is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    share_tied_weights(exported.model)
    return exported.model


def _optimised(graph: ir.Model, _: _Decoder) -> ir.Model:
    with hidden_weights(graph):
        optimise(graph)
        drop_idle_rotations(graph)
    return graph


def _fused(graph: ir.Model, decoder: _Decoder) -> ir.Model:
    with hidden_weights(graph):
        fuse_for_onnxruntime(graph, "cpu")
        drop_idle_reshapes(graph)
    pack_projections(graph, decoder.rows)
    return graph


def _finished(graph: ir.Model, decoder: _Decoder) -> ir.Model:
    """The graph with the names and notes of the contract, and nothing else."""
    name_last_position(graph)
    drop_unused_inputs(graph)
    strip_traces(graph)
    name_dimensions(graph, decoder.layout)
    _note_caches(graph, decoder)
    return graph


def _sample(layout: KVLayout, tensor: KVTensor, batch: int, rows: int) -> Tensor:
    """A cache input to trace with; an axis of any other name is one of heads."""
    lengths = {BATCH: batch, CAPACITY: rows, PAST: rows, PAST_CODES: rows}
    shape = [
        length if isinstance(length, int) else lengths.get(length, SAMPLE_HEADS)
        for length in tensor.past_axes(layout.layout)
    ]
    return torch.zeros(shape, dtype=TORCH_TYPES.get(tensor.dtype, torch.uint8))


def _sample_extra(layout: KVLayout) -> list[tuple[Tensor, ...]]:
    """Other inputs of each layer to trace with: indices of heads."""
    return [
        tuple(
            torch.arange(length) % SAMPLE_HEADS if isinstance(length, int) else torch.arange(SAMPLE_HEADS)
            for (length,) in CACHES[tensors[0].cache].inputs(tensors).values()
        )
        for tensors in layout.layers
    ]


def _dynamic_dims(layout: KVLayout) -> dict[str, Any]:
    tokens = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    return {
        "input_ids": tokens,
        "attention_mask": tokens,
        "position_ids": tokens,
        "past": [tuple(_named(tensor.past_axes(layout.layout)) for tensor in tensors) for tensors in layout.layers],
        "extra": [tuple(map(_named, CACHES[tensors[0].cache].inputs(tensors).values())) for tensors in layout.layers],
    }


def _named(axes: Axes) -> dict[int, Any]:
    """The axes that have a name, and so any length."""
    return {place: torch.export.Dim.DYNAMIC for place, length in enumerate(axes) if isinstance(length, str)}


def _note_caches(graph: ir.Model, decoder: _Decoder) -> None:
    """Notes what no shape tells of the layers' caches, such as the sinks of a ring."""
    notes: dict[str, dict[str, object]] = {}
    for tensors in decoder.layout.layers:
        kind, layer = CACHES[tensors[0].cache], tensors[0].layer
        if kind.metadata is not None:
            note = kind.note(tensors, decoder.slims[layer].cache)
            notes.setdefault(kind.metadata, {})[str(layer)] = note
    for key, layers in notes.items():
        graph.metadata_props[key] = json.dumps(layers)


def token_inputs(graph: ir.Model) -> tuple[str, ...]:
    """The inputs of a graph that a caller must give, other than the cache."""
    names = (str(value.name) for value in graph.graph.inputs)
    return tuple(name for name in names if not name.startswith("past_key_values."))


def save_graph(model: ir.Model, folder: Path) -> None:
    """Writes model.onnx and model.onnx_data; equal models give equal bytes."""
    path = folder / "model.onnx"
    ir.save(model, path, external_data="model.onnx_data", callback=lambda *_: let_go())
    share_storage(path)
