"""How each matrix of an artifact is stored, as its graph says; without reading the data file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from kvslim.export.manifest import GRAPH
from kvslim.onnx_format import read_graph

# What holds a matrix's integers, by operator: the place among the inputs. Tables that are heads too come up in both.
OPERATORS = {"MatMulNBits": 1, "GatherBlockQuantized": 0}
CODES = re.compile(r"(\.packed)?\.int\d\.codes(\.rows)?$")


def matrix_formats(folder: Path) -> dict[str, str] | None:
    """The format of each matrix in blocks, by its name in the model, of packed ones the first; None where none is.

    Args:
        folder: The artifact.

    Raises:
        ArtifactError: The graph cannot be read.
    """
    found: dict[str, str] = {}
    for node in read_graph(folder / GRAPH).node:
        if node.op_type in OPERATORS:
            sizes = {attribute.name: attribute.i for attribute in node.attribute}
            name = CODES.sub("", node.input[OPERATORS[node.op_type]]).removeprefix("model.")
            found.setdefault(name, f"int{sizes['bits']}, blocks of {sizes['block_size']}")
    return found or None


def formats_line(formats: Mapping[str, str] | None) -> str:
    """How many matrices are stored in each format."""
    counts = Counter((formats or {}).values()).most_common()
    return "; ".join(f"{count} {'matrix' if count == 1 else 'matrices'} in {kind}" for kind, count in counts)
