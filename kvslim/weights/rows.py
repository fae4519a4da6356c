"""Finds again what a row of a matrix was quantised to, by the numbers of the row.

The exporter stacks projections that read one input, and methods take rows out. So codes belong to rows, not to modules.
"""

from __future__ import annotations

from hashlib import blake2b
from itertools import pairwise

import numpy as np

from kvslim.weights.blocks import BlockFormat, Bytes, Floats, Quantised, quantise, stacked

CHANGED = BlockFormat(8, 128)  # of rows that are not as they were quantised; four bits would round them again


class QuantisedRows:
    """Rows of numbers, and the blocks that stand for each."""

    def __init__(self) -> None:
        self.matrices: list[Quantised] = []
        self.places: dict[bytes, tuple[int, int]] = {}

    def add(self, numbers: Floats, quantised: Quantised) -> None:
        """Remembers what the rows of a matrix [n, k] are stored as."""
        self.places |= {digest: (len(self.matrices), row) for row, digest in enumerate(_digests(numbers))}
        self.matrices.append(quantised)

    def stored(self, matrix: Floats) -> Quantised:
        """What a matrix [n, k] is stored as: rows that are known as they were added, all others in 8 bits."""
        places = [self.places.get(digest) for digest in _digests(matrix)]
        numbers = np.array([-1 if place is None else place[0] for place in places])
        rows = np.array([row if place is None else place[1] for row, place in enumerate(places)])
        borders = [0, *(np.flatnonzero(np.diff(numbers)) + 1), len(numbers)]
        runs = [slice(start, stop) for start, stop in pairwise(borders)]
        block = min((self.matrices[number].format.block for number in set(numbers) - {-1}), default=CHANGED.block)
        changed = CHANGED._replace(block=block).of_width(matrix.shape[1])
        return stacked([self._run(matrix, int(numbers[run.start]), rows[run], changed) for run in runs])

    def form(self, matrix: Floats) -> tuple[BlockFormat, bool]:
        """The format of the first row of a matrix [n, k] as it is stored, and whether its blocks have offsets."""
        place = self.places.get(_digests(matrix[:1])[0])
        if place is None:
            return CHANGED.of_width(matrix.shape[1]), False
        found = self.matrices[place[0]]
        return found.format, found.offsets is not None

    def _run(self, matrix: Floats, number: int, rows: np.ndarray, changed: BlockFormat) -> Quantised:
        """Rows of one known matrix; those of `matrix` itself for number -1."""
        return quantise(matrix[rows], changed, "k_quant") if number < 0 else self.matrices[number].rows(rows)


def _digests(matrix: Floats) -> list[bytes]:
    rows: Bytes = np.ascontiguousarray(matrix, dtype=np.float32).view(np.uint8)
    return [blake2b(row, digest_size=16).digest() for row in rows]
