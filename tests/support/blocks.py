"""The matrices of a graph whose weights are in blocks, straight from the definition of its operators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

GROUP = 32  # offsets that share a step


def graph_rows(folder: Path) -> set[bytes]:
    """The rows of all matrices of a graph in float32, as bytes."""
    return {row.tobytes() for matrix in _matrices(ir.load(folder / "model.onnx").graph) for row in matrix}


def _matrices(graph: ir.Graph) -> Iterator[np.ndarray]:
    for node in graph:
        if node.op_type == "MatMulNBits":
            _, codes, scales, zeros = (*node.inputs[:4], None)[:4]
            yield _numbers(node, _array(codes), _array(scales), zeros, *_width_and_digits(node))
        elif node.op_type == "GatherBlockQuantized":
            flat, _, scales, zeros = (*node.inputs, None)[:4]
            split = [user for user, _ in node.outputs[0].uses() if user.op_type == "Split"]
            bits, block = node.attributes.get_int("bits"), node.attributes.get_int("block_size")
            codes = _array(flat).reshape(len(_array(flat)), -1, block * bits // 8)
            width, digits = codes.shape[1] * block, 0
            if split:
                width, digits = int(_array(split[0].inputs[1])[0]), 8 // bits
            yield _numbers(node, codes, _array(scales), zeros, width, digits)


def _width_and_digits(product: ir.Node) -> tuple[int, int]:
    """Numbers of a row, and the digits that offsets have behind them."""
    joined = product.inputs[0].producer()
    if joined is None or joined.op_type != "Concat" or not str(joined.name).endswith(".input"):
        return product.attributes.get_int("K"), 0
    digits = len(joined.inputs) - 1
    return _array(joined.inputs[1].producer().inputs[1]).shape[0], digits


def _numbers(node: ir.Node, codes: np.ndarray, scales: np.ndarray, zeros: Any, width: int, digits: int) -> np.ndarray:
    bits, block = node.attributes.get_int("bits"), node.attributes.get_int("block_size")
    rows, columns = codes.shape[:2]
    middles = np.full((rows, columns), 1 << (bits - 1))
    if zeros is not None:
        middles = _integers(_array(zeros).reshape(rows, -1), bits)[:, :columns]
    integers = _integers(codes.reshape(rows, -1), bits).reshape(rows, columns, block) - middles[..., None]
    blocks = -(-width // block)
    found = integers[:, :blocks].astype(np.float32) * scales.reshape(rows, -1)[:, :blocks, None]
    if digits:
        levels, steps = _offsets(integers[:, blocks:], scales.reshape(rows, -1)[:, blocks:], digits)
        found += (levels.astype(np.float32) * steps)[:, :blocks, None]
    return np.ascontiguousarray(found.reshape(rows, -1)[:, :width])


def _offsets(integers: np.ndarray, scales: np.ndarray, digits: int) -> tuple[np.ndarray, np.ndarray]:
    """Levels and steps of offsets, one for each block; of two digits the first counts 16 times."""
    each = integers.shape[1] // digits
    parts = [integers[:, place * each : (place + 1) * each].reshape(len(integers), -1) for place in range(digits)]
    steps = scales[:, -each:]
    if digits == 2:
        np.testing.assert_array_equal(scales[:, :each], 16 * steps)
        parts[0] = 16 * parts[0]
    return sum(parts), steps.repeat(GROUP, 1)


def _integers(packed: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return packed.astype(np.int64)
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).astype(np.int64)


def _array(value: Any) -> np.ndarray:
    found: np.ndarray = value.const_value.numpy()
    return found
