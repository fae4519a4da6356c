"""Matrices as small integers in blocks along the input dimension: the storage format of MatMulNBits.

A block holds integers q, one scale s and one integer zero point z, and stands for s (q - z), or s (q - z) + o with an
offset o (`weights.offsets`). `rtn` rounds to nearest with s = extreme / -2^(bits-1) and z in the middle. `k_quant`
searches as the k-quants of llama.cpp do (`make_qkx2_quants` in ggml-quants.c): it tries several steps, refits the scale
to each rounding by weighted least squares, and keeps the best. There the offset of a block is a float; here z is an
integer, so it is rounded within the search and not after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvslim.contract import WeightMethod
from kvslim.weights.offsets import Offsets

SMALLEST_BLOCK = 32
# Levels more or fewer over a block's range: a coarser step rounds the extremes better, a finer one clips them.
STRETCHES = np.arange(-1, 1.25, 0.25, dtype=np.float32)
SMALLEST = np.float32(1e-30)
CHUNK = 1 << 16  # numbers that one thread works on; its temporaries then fit a processor's cache

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class BlockFormat(NamedTuple):
    """Bits of an integer, 4 or 8, and numbers that share a scale: a power of two."""

    bits: int
    block: int

    def of_width(self, width: int) -> BlockFormat:
        """The format with the largest blocks, that rows of so many numbers are made of."""
        return BlockFormat(self.bits, max(min(self.block, width & -width), SMALLEST_BLOCK))

    def padding(self, width: int) -> int:
        """Zeros that fill up the last block of a row."""
        return -width % self.block


@dataclass(frozen=True)
class Quantised:
    """A matrix [n, k] in blocks; b blocks a row, the last filled up with zeros.

    Attributes:
        codes: [n, b, block x bits / 8], the lowest bits of a byte first.
        scales: [n, b].
        zero_points: [n, ceil(b x bits / 8)], packed like the codes; None where all are 2^(bits-1).
        bits: Of an integer.
        offsets: What is added to each block; None where all are 0. Such blocks are of at most 32.
    """

    codes: Bytes
    scales: Floats
    zero_points: Bytes | None
    bits: int
    offsets: Offsets | None = None

    @classmethod
    def of(cls, integers: Floats, scales: Floats, zeros: Floats, bits: int) -> Quantised:
        """From integers q - z [n, b x block], scales [n, b] and zero points z [n, b]."""
        rows, blocks = scales.shape
        levels = integers.reshape(rows, blocks, -1) + zeros[..., None]
        codes = _pack(levels.reshape(rows, -1).astype(np.uint8), bits).reshape(rows, blocks, -1)
        return cls(codes, scales, _pack(zeros.astype(np.uint8), bits), bits)

    @property
    def format(self) -> BlockFormat:
        """Bits and block size."""
        return BlockFormat(self.bits, self.codes.shape[2] * 8 // self.bits)

    def numbers(self, width: int) -> Floats:
        """The matrix [n, width] that the blocks stand for, exactly as the operators compute it."""
        rows, blocks = self.scales.shape
        integers = _unpack(self.codes.reshape(rows, -1), self.bits).reshape(rows, blocks, -1).astype(np.float32)
        integers -= self._zeros()[..., None]
        integers *= self.scales[..., None]
        if self.offsets is not None:
            integers += self.offsets.numbers()[..., None]
        return integers.reshape(rows, -1)[:, :width]

    def stored_as(self, to: BlockFormat) -> Quantised:
        """The same numbers in more bits, or in smaller blocks."""
        if to == self.format:
            return self
        rows, each = len(self.scales), self.format.block // to.block
        codes = _pack(_unpack(self.codes.reshape(rows, -1), self.bits), to.bits)
        scales, zeros = self.scales.repeat(each, 1), self._zeros().repeat(each, 1)
        offsets = None if self.offsets is None else self.offsets.of_parts(each)
        return Quantised(codes.reshape(*scales.shape, -1), scales, _pack(zeros, to.bits), to.bits, offsets)

    def widened(self) -> Quantised:
        """The matrix with its offsets as blocks of their own, behind all others.

        With S the sums of an input x over blocks, filled up with zeros to a multiple of 32, the product with (x, S), or
        (x, S, S) where integers have 4 bits, is that of this matrix with x.
        """
        if self.offsets is None:
            return self
        parts = [replace(self, offsets=None)]
        for levels, scales, zero in self.offsets.digits(self.bits):
            codes = _pack(levels, self.bits).reshape(*scales.shape, -1)
            zeros = _pack(np.full(scales.shape, zero, np.uint8), self.bits)
            parts.append(Quantised(codes, scales, zeros, self.bits).stored_as(self.format))
        codes, scales, zeros = (
            np.concatenate(each, 1)
            for each in zip(*((part.codes, part.scales, part._zeros()) for part in parts), strict=True)
        )
        is_symmetric = bool((zeros == 1 << (self.bits - 1)).all())
        return Quantised(codes, scales, None if is_symmetric else _pack(zeros, self.bits), self.bits)

    def rows(self, picked: npt.NDArray[np.int64]) -> Quantised:
        """Some rows, in that order."""
        zeros = None if self.zero_points is None else self.zero_points[picked]
        offsets = None if self.offsets is None else self.offsets.rows(picked)
        return Quantised(self.codes[picked], self.scales[picked], zeros, self.bits, offsets)

    def kept(self, keep: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Quantised:
        """The same with each large array as a function keeps it."""
        zeros = None if self.zero_points is None else keep(self.zero_points)
        return replace(self, codes=keep(self.codes), scales=keep(self.scales), zero_points=zeros)

    def _zeros(self) -> Bytes:
        """The zero points, [n, b]."""
        if self.zero_points is None:
            return np.full(self.scales.shape, 1 << (self.bits - 1), np.uint8)
        return _unpack(self.zero_points, self.bits)[:, : self.scales.shape[1]]


def quantise(matrix: Floats, to: BlockFormat, method: WeightMethod) -> Quantised:
    """Quantises a matrix [n, k], a row per output; a transposed view will do.

    The result does not depend on the number of threads.
    """
    rows = max(1, CHUNK // matrix.shape[1])
    chunks = (matrix[start : start + rows] for start in range(0, matrix.shape[0], rows))
    with ThreadPoolExecutor() as pool:
        return stacked(list(pool.map(lambda chunk: _quantise_chunk(chunk, to, method), chunks)))


def stacked(parts: Sequence[Quantised]) -> Quantised:
    """Matrices of one width, the rows of each below those of the one before; in the finest of their formats."""
    to = BlockFormat(max(part.bits for part in parts), min(part.format.block for part in parts))
    parts = [part.stored_as(to) for part in parts]
    codes, scales = (np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    zeros = None
    if any(part.zero_points is not None for part in parts):
        zeros = np.concatenate([_pack(part._zeros(), to.bits) for part in parts])
    return Quantised(codes, scales, zeros, to.bits, _stacked_offsets(parts))


def _stacked_offsets(parts: Sequence[Quantised]) -> Offsets | None:
    """The offsets of matrices one below the other; None where none has any."""
    if all(part.offsets is None for part in parts):
        return None
    found = [Offsets.zeros(*part.scales.shape) if part.offsets is None else part.offsets for part in parts]
    return Offsets(np.concatenate([one.levels for one in found]), np.concatenate([one.steps for one in found]))


def _quantise_chunk(matrix: Floats, to: BlockFormat, method: WeightMethod) -> Quantised:
    rows = len(matrix)
    padded = np.pad(matrix, ((0, 0), (0, to.padding(matrix.shape[1]))))
    fit = round_to_nearest if method == "rtn" else search
    integers, scales, zeros = fit(np.ascontiguousarray(padded).reshape(-1, to.block), to.bits)
    found = Quantised.of(integers.reshape(rows, -1), scales.reshape(rows, -1), zeros.reshape(rows, -1), to.bits)
    return replace(found, zero_points=None) if method == "rtn" else found


def round_to_nearest(blocks: Floats, bits: int) -> tuple[Floats, Floats, Floats]:
    """Symmetric rounding of blocks [m, block]: integers q - z [m, block], scales [m, 1] and zero points [m, 1]."""
    middle = np.float32(1 << (bits - 1))
    inverse = _reciprocal(_extreme(blocks) / -middle)
    integers = np.clip(np.rint(blocks * inverse), -middle, middle - 1)
    return integers, _reciprocal(inverse), np.full_like(inverse, middle)


def search(blocks: Floats, bits: int, weights: Floats | None = None) -> tuple[Floats, Floats, Floats]:
    """The best of several roundings of blocks [m, block], `round_to_nearest` among them; results as there.

    Args:
        blocks: The numbers.
        bits: Of an integer.
        weights: [m, block], what an error squared counts; by default |x| + the block's root mean square.
    """
    if weights is None:
        weights = np.abs(blocks) + np.sqrt(np.mean(np.square(blocks), axis=1, keepdims=True))
    low, high = np.minimum(blocks.min(1, keepdims=True), 0), np.maximum(blocks.max(1, keepdims=True), 0)
    top = np.float32((1 << bits) - 1)
    per_level = _reciprocal(high - low)
    integers, _, zeros = round_to_nearest(blocks, bits)
    scales, errors = _refit(blocks, integers, weights)
    for stretch in STRETCHES:
        inverse = (top + stretch) * per_level
        new_zeros = np.clip(np.rint(-low * inverse), 0, top)
        new = np.clip(np.rint(blocks * inverse), -new_zeros, top - new_zeros)
        new_scales, new_errors = _refit(blocks, new, weights)
        better = new_errors < errors
        for best, candidate in ((integers, new), (zeros, new_zeros), (scales, new_scales), (errors, new_errors)):
            np.copyto(best, candidate, where=better)
    return integers, scales, zeros


def _refit(blocks: Floats, integers: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """The weighted least-squares scale [m, 1] of each block's integers, and the error [m, 1] that it leaves."""
    weighted = weights * integers
    product = np.einsum("mi,mi->m", weighted, blocks)[:, None]
    scales = product * _reciprocal(np.einsum("mi,mi->m", weighted, integers)[:, None])
    rest = blocks - scales * integers  # not from the sums above: at eight bits they differ by less than they round
    return scales, np.einsum("mi,mi,mi->m", weights, rest, rest)[:, None]


def _extreme(blocks: Floats) -> Floats:
    """The number of largest size in each block, with its sign: [m, 1]."""
    return np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], axis=1)


def _reciprocal(values: Floats) -> Floats:
    """1 / x, and 0 where that would overflow: so small a block becomes zeros."""
    return np.divide(1, values, out=np.zeros_like(values), where=np.abs(values) > SMALLEST)


def _pack(values: Bytes, bits: int) -> Bytes:
    """Integers [m, n] as bytes [m, ceil(n x bits / 8)]."""
    per_byte = 8 // bits
    filled = np.pad(values, ((0, 0), (0, -values.shape[1] % per_byte))).reshape(len(values), -1, per_byte)
    return np.bitwise_or.reduce(filled << _shifts(bits), axis=-1)


def _unpack(packed: Bytes, bits: int) -> Bytes:
    """Bytes [m, n] as integers [m, n x 8 / bits]."""
    return (packed[..., None] >> _shifts(bits) & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)


def _shifts(bits: int) -> Bytes:
    """Where the integers of a byte begin."""
    return np.arange(0, 8, bits, dtype=np.uint8)
