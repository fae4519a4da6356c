"""Weight quantisation with onnxruntime's own block-wise quantiser: MatMul becomes MatMulNBits."""

from __future__ import annotations

import logging

import onnx_ir as ir

from kvslim.export.passes import plain_matmuls
from kvslim.types import Weights

BITS = {"int8": 8, "int4": 4}
BLOCK = 32
ACCURACY_LEVEL = 4  # activations in int8: the fast path on CPU


def quantise_weights(model: ir.Model, weights: Weights) -> ir.Model:
    """The graph with its constant matrices in `weights`, symmetric, in blocks of 32 along the input dimension.

    Codes on keys and queries, a few thousand numbers a layer, stay float32, and so does the embedding table.
    """
    if weights == "fp32":
        return model
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    plain_matmuls(model)
    level = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        quantizer = MatMulNBitsQuantizer(
            ir.to_proto(model),
            bits=BITS[weights],
            block_size=BLOCK,
            is_symmetric=True,
            accuracy_level=ACCURACY_LEVEL,
        )
        quantizer.process()
    finally:
        logging.disable(level)
    return ir.from_proto(quantizer.model.model)
