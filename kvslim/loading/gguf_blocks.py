"""Blocks of a GGUF's tensors as the graph stores them: the same integers and scales.

A block of ggml holds levels l, a scale s and for some types a minimum m, and stands for s l + m (ggml-common.h). It
becomes s (q - z) + o with the integer zero point z nearest to -m / s. What is left over, o = m + s z, is half a step at
most where a block's range holds 0, and is rounded to 8 bits: a hundredth of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvslim.weights.blocks import Floats, Quantised
from kvslim.weights.offsets import GROUP, Offsets
from kvslim.weights.rows import QuantisedRows

if TYPE_CHECKING:
    from gguf import ReaderTensor

BLOCK, FLOAT = 32, 4
Lowest = tuple[Floats, Floats]  # scale, and what level 0 stands for, of each block


def is_in_blocks(tensor: ReaderTensor) -> bool:
    """Whether a tensor is a matrix of integers in blocks, of any type."""
    from gguf import GGML_QUANT_SIZES

    return GGML_QUANT_SIZES[tensor.tensor_type][0] > 1 and len(tensor.shape) == 2


def is_carried_over(tensor: ReaderTensor) -> bool:
    """Whether a tensor is a matrix in blocks that the graph can hold."""
    return tensor.tensor_type.name in CARRIED and len(tensor.shape) == 2


def bytes_in_graph(tensor: ReaderTensor) -> float:
    """Bytes of a matrix in the graph: codes, float32 scales and, where blocks have minima, zero points and offsets."""
    width, rows = map(int, tensor.shape)
    if not is_carried_over(tensor):
        return rows * width * (1 + (4 + 1) / 128)  # 8 bits in blocks of 128
    kind, blocks = CARRIED[tensor.tensor_type.name], width // BLOCK
    columns = blocks + kind.has_minima * 8 // kind.bits * -(-blocks // GROUP)
    zeros = -(-columns * kind.bits // 8) if kind.bits == 4 and kind.has_minima else 0
    return rows * (columns * (4 * kind.bits + FLOAT) + zeros)


def stored_rows(tensors: Iterable[ReaderTensor]) -> QuantisedRows:
    """The matrices of a file whose blocks the graph can hold, by the numbers of their rows."""
    from gguf import dequantize

    rows = QuantisedRows()
    for tensor in tensors:
        if is_carried_over(tensor):
            kind, numbers = CARRIED[tensor.tensor_type.name], dequantize(tensor.data, tensor.tensor_type)
            rows.add(numbers, _blocks(numbers, *kind.scales(tensor.data), kind))
    return rows


def _blocks(numbers: Floats, scales: Floats, lowest: Floats, kind: BlockType) -> Quantised:
    rows, width = numbers.shape
    scales, lowest = (part.reshape(rows, -1).astype(np.float32) for part in (scales, lowest))
    bits, middle = kind.bits, 1 << (kind.bits - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.rint((numbers.reshape(rows, scales.shape[1], -1) - lowest[..., None]) / scales[..., None])
        nearest = np.rint(-lowest / scales)
    # Of 8 bits the levels are moved in place of the zero point, which is the middle for all blocks then.
    least, most = (0, kind.levels - 1) if bits == 4 else (kind.levels - middle, middle)
    shifts = np.where(scales == 0, kind.levels // 2, np.clip(nearest, least, most)).astype(np.float32)
    integers = np.where(scales[..., None] == 0, 0, found - shifts[..., None]).reshape(rows, width)
    zeros, offsets = shifts if bits == 4 else np.full_like(shifts, middle), lowest + shifts * scales
    stored = Quantised.of(integers.astype(np.float32), scales, zeros, bits)
    stored = replace(stored, offsets=Offsets.of(offsets) if offsets.any() else None)
    return replace(stored, zero_points=None) if (zeros == middle).all() else stored


def _half(data: np.ndarray, size: int, place: int) -> Floats:
    """A float16 at a place of each block of `size` bytes, [blocks, 1]."""
    parts = np.ascontiguousarray(data.reshape(-1, size)[:, place : place + 2])
    found: Floats = parts.view(np.float16).astype(np.float32)
    return found


def _scaled(size: int, lowest: int) -> Callable[[np.ndarray], Lowest]:
    """Of types whose levels begin at a fixed integer."""

    def read(data: np.ndarray) -> Lowest:
        scales = _half(data, size, 0)
        return scales, lowest * scales

    return read


def _with_minimum(size: int) -> Callable[[np.ndarray], Lowest]:
    """Of types with a minimum behind the scale."""
    return lambda data: (_half(data, size, 0), _half(data, size, 2))


def _nested(size: int) -> Callable[[np.ndarray], Lowest]:
    """Of types whose blocks have 8 scales and minima of 6 bits, and a factor for each of the two."""

    def read(data: np.ndarray) -> Lowest:
        from gguf.quants import Q4_K

        packed = np.ascontiguousarray(data.reshape(-1, size)[:, 4:16])
        scales, minima = Q4_K.get_scale_min(packed)
        return _half(data, size, 0) * scales, -(_half(data, size, 2) * minima)

    return read


class BlockType(NamedTuple):
    """A type of ggml.

    Attributes:
        levels: That a number can have.
        has_minima: Whether a block has a minimum of its own.
        scales: The scale and the lowest number of each block of a tensor.
    """

    levels: int
    has_minima: bool
    scales: Callable[[Any], Lowest]

    @property
    def bits(self) -> int:
        """Of an integer in the graph."""
        return 4 if self.levels == 16 else 8


CARRIED: dict[str, BlockType] = {
    "Q4_0": BlockType(16, False, _scaled(18, -8)),
    "Q4_1": BlockType(16, True, _with_minimum(20)),
    "Q4_K": BlockType(16, True, _nested(144)),
    "Q5_0": BlockType(32, False, _scaled(22, -16)),
    "Q5_1": BlockType(32, True, _with_minimum(24)),
    "Q5_K": BlockType(32, True, _nested(176)),
    "Q8_0": BlockType(256, False, _scaled(34, -128)),
}
