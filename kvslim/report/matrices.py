"""How each matrix of an artifact is stored, as its graph says, and what it was stored as before.

The data file is not read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from kvslim.export.manifest import GRAPH
from kvslim.onnx_format import read_graph
from kvslim.types import Manifest

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


def rounded_again(manifest: Manifest) -> str | None:
    """That weights which were integers in blocks were rounded a second time, and what it cost; None where not so."""
    blocks, weights, report = manifest.source.blocks, manifest.weights, manifest.report
    if not blocks or weights.type not in ("int8", "int4"):
        return None
    loss = None if report is None else report.plain.kl_to_original
    cost = "" if loss is None else f", at a KL of {loss:.2g}"
    return f"weights that the file has in {', '.join(blocks)} were rounded a second time{cost}; stored keeps them"
