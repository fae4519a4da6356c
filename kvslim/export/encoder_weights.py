"""Weight quantisation of encoders: a text comes in one piece, so arithmetic decides, not the bytes that weights take.

On many tokens at once onnxruntime's MatMulNBits is hardly faster than float32, while its dynamic quantisation takes
half the time: weights in int8 per output channel, activations in uint8 with one step per tensor. One step is too coarse
for what comes out of an activation function, a few of whose values are large: those products keep blocks of 32.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import onnx_ir as ir

from kvslim.export.quiet import quiet
from kvslim.export.weights import quantise_weights
from kvslim.weight_format import WeightFormat
from kvslim.weights.rows import QuantisedRows

SMOOTH = {"LayerNormalization", "SkipLayerNormalization", "Attention"}  # their outputs have no far outliers


def quantise_encoder(model: ir.Model, weights: WeightFormat, rows: QuantisedRows) -> ir.Model:
    """The graph of an encoder with its constant matrices in `weights`.

    Args:
        model: A graph of `build_encoder_graph`.
        weights: int8 takes dynamic quantisation where it is accurate, and blocks of 32 elsewhere; int4 takes blocks.
        rows: What the rows of its matrices are stored as, where that is blocks.
    """
    if weights.type == "int8":
        model = _dynamic(model)
    quantise_weights(model, rows)
    return model


def _dynamic(model: ir.Model) -> ir.Model:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet(), tempfile.TemporaryDirectory(prefix="kvslim-") as folder:
        quantize_dynamic(
            ir.to_proto(model),
            Path(folder, "int8.onnx"),
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=[str(node.name) for node in model.graph if _is_smooth_product(node)],
            per_channel=True,
            reduce_range=True,  # x86 without VNNI sums pairs of products in 16 bits, which 8-bit weights overflow
            weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        return ir.from_proto(onnx.load(Path(folder, "int8.onnx")))


def _is_smooth_product(node: ir.Node) -> bool:
    """Whether a node multiplies activations without outliers by a matrix that the embedding does not share."""
    if node.op_type != "MatMul" or node.inputs[0] is None or node.inputs[1] is None:
        return False
    source = node.inputs[0].producer()
    return source is not None and source.op_type in SMOOTH and not _is_output(node)


def _is_output(node: ir.Node) -> bool:
    """Whether a product, with its bias, is what the graph returns."""
    users = [usage.node for usage in node.outputs[0].uses()]
    return any(value.is_graph_output() for last in (node, *users) for value in last.outputs)
