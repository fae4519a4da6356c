"""What the weights of an artifact need, computed from its graph without reading the data file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvslim.contract import ModelSpec, WeightType
from kvslim.devices.demand import StoredWeights
from kvslim.devices.peak import FLOAT
from kvslim.onnx_format import ITEM_BYTES, read_graph

PRODUCTS = ("FusedMatMul", "Gemm", "MatMul")
# Operators that read one row of a table: the embedding, learned positions, and RoPE's sines and cosines.
LOOKUPS = ("Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding")


def artifact_weights(folder: Path, spec: ModelSpec, name: str, stored: int) -> StoredWeights:
    """The weights of an artifact.

    Args:
        folder: The artifact.
        spec: Its model's shape; the head is the product with as many outputs as there are tokens.
        name: Their name in tables.
        stored: Bytes of its files.

    Raises:
        NotFoundError, ArtifactError: The graph is missing, or cannot be read.
    """
    graph = read_graph(folder / "model.onnx")
    constants = {tensor.name: tensor for tensor in graph.initializer}
    read: dict[str, int] = {}
    tables: dict[str, int] = {}
    sizes: list[tuple[int, int]] = []
    packing, kinds = 0, Counter[WeightType]()
    for node in graph.node:
        found = [constants[value] for value in node.input if value in constants]
        (tables if node.op_type in LOOKUPS else read).update({tensor.name: _bytes(tensor) for tensor in found})
        if (size := _product(node, found)) is not None:
            sizes.append(size)
            kinds[_kind(node)] += math.prod(size)
        packing += _packing(node, constants)
    head = sum(inputs * outputs for inputs, outputs in sizes if outputs == spec.vocab_size)
    products = sum(inputs * outputs for inputs, outputs in sizes) - head
    return StoredWeights(
        name=name,
        stored=stored,
        resident=sum(read.values()) + sum(tables.values()) + packing,
        tables=sum(tables.values()),
        read=sum(read.values()),
        products=products,
        head=head,
        width=products / (spec.layers * spec.hidden_size),
        kinds=kinds,
    )


def _kind(node: Any) -> WeightType:
    """How the numbers of a product are stored; those of fewer than eight bits count as four."""
    bits = next((attribute.i for attribute in node.attribute if attribute.name == "bits"), 32)
    return "fp32" if bits == 32 else "int8" if bits == 8 else "int4"


def _packing(node: Any, constants: Mapping[str, Any]) -> int:
    """Bytes that blocks take in memory beyond those in the file: a sum of each in place of its zero point."""
    if node.op_type != "MatMulNBits":
        return 0
    _, _, scales, *others = node.input
    zero_points = _bytes(constants[others[0]]) if others and others[0] in constants else 0
    return math.prod(constants[scales].dims) * FLOAT - zero_points


def _product(node: Any, constants: Sequence[Any]) -> tuple[int, int] | None:
    """(inputs, outputs) of a product with constants; for a stack of matrices, the inputs of all of them."""
    if node.op_type == "MatMulNBits":
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        return sizes["K"], sizes["N"]
    matrices = [tensor.dims for tensor in constants if len(tensor.dims) > 1]
    if node.op_type not in PRODUCTS or not matrices:
        return None
    turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    outputs = matrices[0][-2 if turned else -1]
    return math.prod(matrices[0]) // outputs, outputs


def _bytes(tensor: Any) -> int:
    return math.prod(tensor.dims) * ITEM_BYTES.get(tensor.data_type, 1)
