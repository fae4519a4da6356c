"""From a prepared torch model to an ONNX graph with onnxruntime's fused operators and its cache as inputs."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

from kvslim.export.passes import drop_idle_reshapes, name_dimensions, strip_traces
from kvslim.load.architecture import Architecture
from kvslim.transform.attention import ExportStep, PassThroughCache
from kvslim.transform.surgery import slim_modules
from kvslim.types import INPUTS, KVLayout

OPSET = 21
TORCH_TYPES = {"float32": torch.float32, "int8": torch.int8}


class _Decoder(nn.Module):
    """The graph: tokens, mask, positions and past cache in; logits and present cache out."""

    def __init__(self, model: Any, architecture: Architecture) -> None:
        super().__init__()
        self.model = model
        self.slims = slim_modules(model, architecture)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor] | None]]:
        last = attention_mask.sum(-1).to(torch.int32) - 1
        total = torch.tensor(attention_mask.shape[1], dtype=torch.int32)
        for slim, layer_past in zip(self.slims, past, strict=True):
            slim.step = ExportStep(layer_past, last, total)
        output = self.model(
            input_ids=input_ids, position_ids=position_ids, past_key_values=PassThroughCache(past), use_cache=True
        )
        return output.logits, [slim.step.present if slim.step else None for slim in self.slims]


def build_graph(model: Any, architecture: Architecture, layout: KVLayout) -> ir.Model:
    """The ONNX graph of a prepared model.

    Args:
        model: The model with its slim attention and codes installed.
        architecture: Where its parts live.
        layout: The cache that the codes give.

    Returns:
        A graph with the inputs and outputs that `layout` names, its weights in memory.
    """
    decoder = _Decoder(model, architecture)
    keys, values = layout.tensors[0::2], layout.tensors[1::2]
    batch, length, past_length = 2, 3, 5  # torch.export takes sizes 0 and 1 for constants
    past = [
        tuple(torch.zeros(batch, t.heads, past_length, t.dim, dtype=TORCH_TYPES[t.dtype]) for t in pair)
        for pair in zip(keys, values, strict=True)
    ]
    ids = torch.zeros(batch, length, dtype=torch.long)
    mask = torch.ones(batch, past_length + length, dtype=torch.long)
    positions = torch.arange(past_length, past_length + length).repeat(batch, 1)
    dims = _dynamic_dims(len(past))
    try:
        with torch.inference_mode(False), torch.no_grad(), _quiet():
            program = torch.export.export(decoder, (ids, mask, positions, past), dynamic_shapes=dims, strict=False)
            exported = torch.onnx.export(
                program,
                input_names=[*INPUTS, *(tensor.past for tensor in layout.tensors)],
                output_names=["logits", *(tensor.present for tensor in layout.tensors)],
                opset_version=OPSET,
                verbose=False,
            )
        if exported is None:
            raise RuntimeError("torch.onnx.export returned nothing")
        with _quiet():
            fuse_for_onnxruntime(exported.model, "cpu")
            drop_idle_reshapes(exported.model)
            strip_traces(exported.model)
            name_dimensions(exported.model, layout)
        return exported.model
    finally:
        for slim in decoder.slims:
            slim.step, slim.hidden = None, None


def _dynamic_dims(layers: int) -> dict[str, Any]:
    dynamic = torch.export.Dim.DYNAMIC
    pair = ({0: dynamic, 2: dynamic}, {0: dynamic, 2: dynamic})
    tokens = {0: dynamic, 1: dynamic}
    return {"input_ids": tokens, "attention_mask": tokens, "position_ids": tokens, "past": [pair] * layers}


def save_graph(model: ir.Model, folder: Path) -> None:
    """Writes model.onnx and model.onnx.data; equal models give equal bytes."""
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporters' notes, which no user can act on, out of the terminal."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
