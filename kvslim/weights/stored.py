"""Blocks of matrices in one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvslim.loading.mapped import in_file
from kvslim.weights.blocks import Quantised


def save_blocks(path: Path, quantised: Mapping[str, Quantised]) -> None:
    """Writes the blocks of matrices by name; none has offsets."""
    arrays: dict[str, Any] = {"names": np.array(list(quantised))}
    for number, blocks in enumerate(quantised.values()):
        arrays |= {f"{number}.{part}": value for part, value in vars(blocks).items() if value is not None}
    np.savez(path, allow_pickle=False, **arrays)


def load_blocks(path: Path) -> dict[str, Quantised]:
    """Reads what `save_blocks` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return {str(name): _blocks(arrays, number) for number, name in enumerate(arrays["names"])}


def _blocks(arrays: Mapping[str, np.ndarray], number: int) -> Quantised:
    codes, scales, bits = (arrays[f"{number}.{part}"] for part in ("codes", "scales", "bits"))
    return Quantised(codes, scales, arrays.get(f"{number}.zero_points"), int(bits)).kept(in_file)
