"""KVSlim's plain graph against another exporter's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE
from kvslim.validation.latency import measure_latency
from kvslim.validation.measure import file_mib

TABLE = Table(
    (
        Column("what", ""),
        Column("builder", "builder", ",.1f"),
        Column("kvslim", "KVSlim", ",.1f"),
        Column("ratio", "ratio", ".2f"),
    )
)


@benchmark("smollm2-shape", table=TABLE, quick={"contexts": (32,), "prompt": 16, "repeats": 2})
def vs_builder(
    source: Source,
    *,
    contexts: tuple[int, ...] = (128, 2048, 8192, 16384),
    prompt: int = 512,
    repeats: int = 24,
    method: str = "k_quant",
) -> Iterator[Values]:
    """KVSlim's plain graph against the onnxruntime-genai model builder's: same weights, int4, same decode loop.

    Both graphs decode in turns in one process through in-place caches; a ratio is the median over turns, ours / theirs.
    """
    model = OpenModel(source, LITTLE, weights={"type": "int4", "method": method})
    graphs = {"builder": source.folder / "builder", "kvslim": model.export()}
    model.release()
    build_theirs(source, graphs["builder"], method, model.spec.head_dim)
    times = measure_latency(graphs, prompts=[prompt], contexts=contexts, repeats=repeats)
    theirs, ours = times["builder"], times["kvslim"]
    for key, time in theirs.tpot_ms.items():
        yield values(f"ms per token at {key}", time, ours.tpot_ms[key], ours.tpot_ratio[key])
    for key, time in theirs.ttft_ms.items():
        yield values(f"ms for a prompt of {key}", time, ours.ttft_ms[key], ours.ttft_ratio[key])
    for name, number in {"file MiB": file_mib, "nodes": nodes}.items():
        found = {kind: float(number(path)) for kind, path in graphs.items()}
        yield values(name, found["builder"], found["kvslim"], found["kvslim"] / found["builder"])


def values(what: str, theirs: float, ours: float, ratio: float) -> Values:
    """One row."""
    return {"what": what, "builder": theirs, "kvslim": ours, "ratio": ratio}


def nodes(folder: Path) -> int:
    """Operators of a graph."""
    return len(onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


def build_theirs(source: Source, out: Path, method: str, head_dim: int) -> None:
    """The builder's graph."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "--model_name", "", "--input", source.model]
    command += ["--output", str(out), "--precision", "int4", "--execution_provider", "cpu"]
    command += ["--cache_dir", str(source.folder / "cache"), "--extra_options", f"algo_config={method}"]
    subprocess.run(command, check=True, capture_output=True)
    graph = onnx.load(out / "model.onnx", load_external_data=False)
    for value in [*graph.graph.input, *graph.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "kv_cache_dim":  # our loop allocates the cache from the graph's shapes
                dim.dim_value = head_dim
    onnx.save(graph, out / "model.onnx")
