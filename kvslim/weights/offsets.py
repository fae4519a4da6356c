"""Numbers that are added to whole blocks of a matrix: what a block's minimum is more than its zero point.

They are integers of 8 bits with a step for every 32. The graph has them as further columns of the matrix, which the
sums of the input over each block are multiplied with; where the matrix has 4 bits, a number is two digits of 4 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

GROUP = 32  # offsets of a row that share a step
TOP = 127
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Offsets:
    """Offsets of a matrix with b blocks a row.

    Attributes:
        levels: [n, b], from -127 to 127.
        steps: [n, ceil(b / 32)].
    """

    levels: npt.NDArray[np.int8]
    steps: Floats

    @classmethod
    def of(cls, numbers: Floats) -> Offsets:
        """The nearest to numbers [n, b]."""
        rows, blocks = numbers.shape
        groups = np.pad(numbers, ((0, 0), (0, -blocks % GROUP))).reshape(rows, -1, GROUP)
        steps = np.abs(groups).max(2) / np.float32(TOP)
        inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps > 0)
        levels = np.rint(groups * inverse[..., None]).reshape(rows, -1)[:, :blocks]
        return cls(levels.astype(np.int8), steps)

    @classmethod
    def zeros(cls, rows: int, blocks: int) -> Offsets:
        """Those of a matrix that needs none."""
        return cls.of(np.zeros((rows, blocks), np.float32))

    def numbers(self) -> Floats:
        """[n, b]."""
        found: Floats = self.levels * self.steps.repeat(GROUP, 1)[:, : self.levels.shape[1]]
        return found

    def rows(self, picked: npt.NDArray[np.int64]) -> Offsets:
        """Those of some rows, in that order."""
        return Offsets(self.levels[picked], self.steps[picked])

    def of_parts(self, each: int) -> Offsets:
        """Those of the same matrix whose blocks are cut into so many each."""
        levels = self.levels.repeat(each, 1)
        return Offsets(levels, self.steps.repeat(each, 1)[:, : -(-levels.shape[1] // GROUP)])

    def digits(self, bits: int) -> list[tuple[npt.NDArray[np.uint8], Floats, int]]:
        """Integers [n, ceil(b / 32) x 32] of 4 or 8 bits, scales and a zero point each, that add up to them."""
        levels = np.pad(self.levels, ((0, 0), (0, -self.levels.shape[1] % GROUP)))
        if bits == 8:
            return [((levels.astype(np.int16) + 128).astype(np.uint8), self.steps, 128)]
        high, low = (levels >> 4) + 8, levels & 15
        return [(high.astype(np.uint8), np.float32(16) * self.steps, 8), (low.astype(np.uint8), self.steps, 0)]
