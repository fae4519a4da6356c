"""KVSlim's graphs against another exporter's."""

from __future__ import annotations

import json
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
from kvslim.contract import MIB, ModelSpec
from kvslim.validation.latency import measure_latency

SCHEMES = {"float32": "none", "int8": "int8_per_channel"}
STEP = 0.03  # of an integer cache: its size changes no time
TABLE = Table(
    (
        Column("cache", "cache"),
        Column("what", ""),
        Column("builder", "builder", ",.1f"),
        Column("kvslim", "KVSlim", ",.1f"),
        Column("ratio", "ratio", ".2f"),
    )
)


@benchmark("smollm2-shape", table=TABLE, quick={"contexts": (32,), "prompts": (16,), "repeats": 3})
def vs_builder(
    source: Source,
    *,
    caches: tuple[str, ...] = tuple(SCHEMES),
    contexts: tuple[int, ...] = (128, 2048, 8192, 16384),
    prompts: tuple[int, ...] = (512, 4096),
    repeats: int = 24,
    method: str = "k_quant",
) -> Iterator[Values]:
    """KVSlim's graphs against the onnxruntime-genai model builder's: same weights, int4, same decode loop.

    With a float32 cache, and with one of int8 with a step per channel. Both graphs decode in turns in one process
    through in-place caches; a ratio is the median over turns, ours / theirs.
    """
    model = OpenModel(source, LITTLE, weights={"type": "int4", "method": method})
    int8 = model.decided({"kv_quant": {"bits": 8, "granularity": "per_channel"}})
    ours = {"float32": model.export(), "int8": model.export(int8)}
    model.release()
    for cache in caches:
        graphs = {"builder": source.folder / f"builder-{cache}", "kvslim": ours[cache]}
        build_theirs(source, graphs["builder"], method, model.spec, cache)
        times = measure_latency(graphs, prompts=prompts, contexts=contexts, repeats=repeats)
        theirs, own = times["builder"], times["kvslim"]
        for key, time in theirs.tpot_ms.items():
            yield values(cache, f"ms per token at {key}", time, own.tpot_ms[key], own.tpot_ratio[key])
        for key, time in theirs.ttft_ms.items():
            yield values(cache, f"ms for a prompt of {key}", time, own.ttft_ms[key], own.ttft_ratio[key])
        for name, number in {"file MiB": files_mib, "nodes": nodes}.items():
            found = {kind: float(number(path)) for kind, path in graphs.items()}
            yield values(cache, name, found["builder"], found["kvslim"], found["kvslim"] / found["builder"])


def values(cache: str, what: str, theirs: float, ours: float, ratio: float) -> Values:
    """One row."""
    return {"cache": cache, "what": what, "builder": theirs, "kvslim": ours, "ratio": ratio}


def files_mib(folder: Path) -> float:
    """Size of a graph and its weights, whatever their file is called."""
    return sum(path.stat().st_size for path in folder.glob("model.onnx*")) / MIB


def nodes(folder: Path) -> int:
    """Operators of a graph."""
    return len(onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


def build_theirs(source: Source, out: Path, method: str, spec: ModelSpec, cache: str) -> None:
    """The builder's graph."""
    options = [f"algo_config={method}", f"kv_cache_quant_scheme={SCHEMES[cache]}"]
    if cache != "float32":
        steps = [[STEP] * (spec.kv_heads * spec.head_dim)] * spec.layers
        scales = source.folder / "scales.json"
        scales.write_text(json.dumps({"scales": {"k_scales": steps, "v_scales": steps}}), encoding="utf-8")
        options.append(f"kv_cache_scale_file={scales}")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "--model_name", "", "--input", source.model]
    command += ["--output", str(out), "--precision", "int4", "--execution_provider", "cpu"]
    command += ["--cache_dir", str(source.folder / "cache"), "--extra_options", *options]
    subprocess.run(command, check=True, capture_output=True)
    graph = onnx.load(out / "model.onnx", load_external_data=False)
    for value in [*graph.graph.input, *graph.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "kv_cache_dim":  # our loop allocates the cache from the graph's shapes
                dim.dim_value = spec.head_dim
    onnx.save(graph, out / "model.onnx")
