"""Tiny ONNX decoders that follow KVSlim's graph contract, with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from kvslim.contract import LAST_POSITION

Q_HEADS = 4
KV_HEADS = 2
HIDDEN = 16


@dataclass
class _Graph:
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def weight(self, name: str, array: npt.NDArray[np.generic]) -> str:
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, inputs: Sequence[str], *outputs: str, **attributes: object) -> str:
        domain = "com.microsoft" if op == "GroupQueryAttention" else ""
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs[0]


def write_tiny(
    path: Path,
    *,
    vocab: int = 24,
    dims: Sequence[int] = (8, 16),
    layers: Sequence[int] = (0, 2),
    int8: bool = False,
    seed: int = 0,
    noise: float = 0.0,
    positions: int = 0,
) -> Path:
    """Writes a decoder of one GroupQueryAttention per layer.

    Args:
        path: The `.onnx` file to write.
        vocab: Tokens of the vocabulary.
        dims: Head size of each layer.
        layers: Index of each layer in the names of the cache.
        int8: Whether the cache is int8 with per-channel scales.
        seed: Seed of the weights.
        noise: Standard deviation of a perturbation of the language model head.
        positions: Learned positions, which make `position_ids` an input; 0 for none.
    """
    rng = np.random.default_rng(seed)
    graph = _Graph()
    hidden = _embedding(graph, rng, vocab, positions)
    _lengths(graph)
    for layer, dim in zip(layers, dims, strict=True):
        hidden = _layer(graph, rng, hidden, layer, dim, int8)
    head = rng.standard_normal((HIDDEN, vocab)) + noise * np.random.default_rng(99).standard_normal((HIDDEN, vocab))
    graph.node("MatMul", [hidden, graph.weight("head", head.astype(np.float32))], "logits")
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", vocab])
    proto = helper.make_graph(graph.nodes, "tiny", graph.inputs, [logits, *graph.outputs], graph.weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(proto, opset_imports=opsets, ir_version=10), path)
    return path


def _embedding(graph: _Graph, rng: np.random.Generator, vocab: int, positions: int) -> str:
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total_length"])
    graph.inputs += [ids, mask]
    table = graph.weight("embedding", rng.standard_normal((vocab, HIDDEN)).astype(np.float32))
    hidden = graph.node("Gather", [table, "input_ids"], "embedded")
    if positions:
        graph.inputs.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "length"]))
        table = graph.weight("positions", rng.standard_normal((positions, HIDDEN)).astype(np.float32))
        hidden = graph.node("Add", [hidden, graph.node("Gather", [table, "position_ids"], "position")], "placed")
    return hidden


def _lengths(graph: _Graph) -> None:
    axis = graph.weight("axis", np.array([1], np.int64))
    one = graph.weight("one", np.array(1, np.int64))
    total = graph.node("ReduceSum", ["attention_mask", axis], "tokens", keepdims=0)
    graph.node("Cast", [graph.node("Sub", [total, one], "last")], "seqlens_k", to=TensorProto.INT32)
    length = graph.node("Gather", [graph.node("Shape", ["attention_mask"], "mask_shape"), one], "mask_length")
    graph.node("Cast", [length], "total_sequence_length", to=TensorProto.INT32)


def _layer(graph: _Graph, rng: np.random.Generator, hidden: str, layer: int, dim: int, int8: bool) -> str:
    def project(name: str, source: str, rows: int, columns: int) -> str:
        matrix = rng.standard_normal((rows, columns)).astype(np.float32) / np.float32(np.sqrt(rows))
        return graph.node("MatMul", [source, graph.weight(f"{name}.{layer}.weight", matrix)], f"{name}.{layer}")

    query = project("q", hidden, HIDDEN, Q_HEADS * dim)
    key = project("k", hidden, HIDDEN, KV_HEADS * dim)
    value = project("v", hidden, HIDDEN, KV_HEADS * dim)
    inputs = [query, key, value, *_cache(graph, layer, dim, int8), "seqlens_k", "total_sequence_length"]
    attributes: dict[str, object] = {"num_heads": Q_HEADS, "kv_num_heads": KV_HEADS}
    if int8:
        scale = np.full((1, KV_HEADS, 1, dim), 0.03, np.float32)
        inputs += [""] * 5 + [graph.weight(f"{kind}_scale.{layer}", scale) for kind in ("k", "v")]
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    presents = [f"present.{layer}.{kind}" for kind in ("key", "value")]
    attended = graph.node("GroupQueryAttention", inputs, f"attended.{layer}", *presents, **attributes)
    return graph.node("Add", [hidden, project("o", attended, Q_HEADS * dim, HIDDEN)], f"hidden.{layer}")


def _cache(graph: _Graph, layer: int, dim: int, int8: bool) -> list[str]:
    dtype = TensorProto.INT8 if int8 else TensorProto.FLOAT
    names = []
    for kind in ("key", "value"):
        past, present = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
        shape = ["batch", KV_HEADS, "past_length", dim]
        graph.inputs.append(helper.make_tensor_value_info(past, dtype, shape))
        shape = ["batch", KV_HEADS, "present_length", dim]
        graph.outputs.append(helper.make_tensor_value_info(present, dtype, shape))
        names.append(past)
    return names


def write_last_only(path: Path, **options: Any) -> Path:
    """Writes the decoder of `write_tiny` with logits of the last position alone, as exported graphs have them."""
    model = onnx.load(write_tiny(path, **options))
    (head,) = [node for node in model.graph.node if node.output[0] == "logits"]
    head.output[0] = "all_logits"
    for name, value in {"start": -1, "end": np.iinfo(np.int64).max, "along": 1}.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
    inputs = ["all_logits", "start", "end", "along"]
    model.graph.node.append(helper.make_node("Slice", inputs, ["logits"], name=LAST_POSITION))
    logits = next(value for value in model.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, path)
    return path
