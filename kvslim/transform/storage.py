"""How packed codes store numbers, in operations that torch evaluates and ONNX has.

Bytes are read by table: one look-up of a byte gives all the numbers that lie in it. They are packed by one product
with powers of two, which is exact in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Levels:
    """Keys or values as packed indices of levels; 3 bits are a plane of signs, then a plane of 2-bit magnitudes.

    Attributes:
        levels: [2 ** bits] ascending; symmetric about 0.
        scale: [heads, dim] what the levels are in units of.
    """

    levels: Tensor
    scale: Tensor

    @property
    def bits(self) -> int:
        """Bits of one number."""
        return len(self.levels).bit_length() - 1

    def stored(self, states: Tensor) -> Tensor:
        """[batch, rows, heads, dim] as uint8 [batch, rows, heads, dim * bits / 8], each the nearest level."""
        states = states / self.scale
        if self.bits != 3:
            return _indexed(states, self.levels, self.bits)
        signs = _packed((states > 0).float(), 1)
        return torch.cat([signs, _indexed(states.abs(), self.levels[4:], 2)], dim=-1)

    def read(self, stored: Tensor) -> Tensor:
        """uint8 [..., dim * bits / 8] as float32 [..., dim] levels: the states over the scale."""
        if self.bits != 3:
            return _looked_up(stored, self.levels, self.bits)
        signs, magnitudes = stored.split([self.scale.shape[-1] // 8, self.scale.shape[-1] // 4], dim=-1)
        return _looked_up(signs, torch.tensor([-1.0, 1.0]), 1) * _looked_up(magnitudes, self.levels[4:], 2)


def _indexed(states: Tensor, levels: Tensor, bits: int) -> Tensor:
    """The index of the nearest of ascending levels to each of [..., dim], packed."""
    middles = (levels[1:] + levels[:-1]) / 2
    above = (states[..., None] > middles).float()
    # The sum over the levels is part of the product that packs: onnxruntime's ReduceSum fails on no rows at all.
    return _packed(_joined(above), bits, len(middles))


def _packed(numbers: Tensor, bits: int, parts: int = 1) -> Tensor:
    """Numbers below 2 ** bits as bytes [..., dim * bits / 8], the first in the low bits.

    Args:
        numbers: [..., dim * parts] in float32, each number as the sum of `parts` neighbours.
        bits: Bits of a number.
        parts: See numbers.
    """
    places = packing(numbers.shape[-1] // parts, bits, parts)
    return (numbers @ torch.tensor(places)).to(torch.uint8)


def packing(dim: int, bits: int, parts: int = 1) -> np.ndarray:
    """[dim * parts, dim * bits / 8] float32, the matrix that packs: arguments as for `_packed`."""
    per_byte = 8 // bits
    weights = [float(1 << (bits * place)) for place in range(per_byte)]
    places: np.ndarray = np.kron(np.eye(dim // per_byte, dtype=np.float32), np.repeat(weights, parts)[:, None])
    return places.astype(np.float32)


def _looked_up(stored: Tensor, levels: Tensor, bits: int) -> Tensor:
    """What bytes [..., n] stand for, [..., n * 8 / bits]."""
    return _joined(nn.functional.embedding(stored.int(), levels[torch.tensor(numbers_of_bytes(bits))]))


def numbers_of_bytes(bits: int) -> list[list[int]]:
    """The numbers below 2 ** bits that each byte holds, the one in its low bits first."""
    return [[byte >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)] for byte in range(256)]


def _joined(states: Tensor) -> Tensor:
    """[..., n, m] as [..., n * m]; sizes are said, since onnxruntime cannot infer one where there are no rows."""
    *rows, outer, inner = states.shape
    return states.reshape(*rows, outer * inner)
