"""Memory of an export.

`python -m benchmarks.memory.export_memory MODEL WEIGHTS FOLDER` exports in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.rows import ROOT
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE
from kvslim.validation.measure import file_mib
from kvslim.validation.rss import own_peak_mib

TABLE = Table(
    (
        Column("weights", "weights"),
        Column("model_gib", "float32 weights GiB", ".2f"),
        Column("peak_gib", "peak RSS GiB", ".2f"),
        Column("limit_gib", "limit GiB", ".2f"),
        Column("graph_gib", "graph GiB", ".2f"),
    )
)


@benchmark("llama-1b-shape", table=TABLE, quick={"formats": ("fp32",)})
def export_memory(source: Source, *, formats: tuple[str, ...] = ("fp32", "int4")) -> Iterator[Values]:
    """Peak memory of loading and exporting a model that is stored in bfloat16.

    Each weight format is exported in a fresh process, plain. The limit is 1.3 times the float32 weights and 1 GiB.
    """
    size = 2 * sum(path.stat().st_size for path in Path(source.model).glob("*.safetensors")) / 2**30
    for weights in formats:
        folder = source.folder / weights
        folder.mkdir()
        command = [sys.executable, "-m", "benchmarks.memory.export_memory", source.model, weights, str(folder)]
        output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        peak, graph = (float(number) / 2**10 for number in output.split())
        sizes = {"model_gib": size, "peak_gib": peak, "limit_gib": 1.3 * size + 1, "graph_gib": graph}
        yield {"weights": weights, **sizes}


def export(model: str, weights: str, folder: Path) -> tuple[float, float]:
    """MiB of this process's peak, and of the graph."""
    graph = OpenModel(Source(model, folder), LITTLE, weights=weights).export()
    return own_peak_mib(), file_mib(graph)


if __name__ == "__main__":
    print(*export(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
