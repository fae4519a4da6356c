"""KVSlim's plain export against the onnxruntime-genai model builder's: same weights, int4, same decode loop.

    python benchmarks/vs_builder.py [--contexts 128,2048,8192,16384] [--repeats 24] [--method k_quant]

Both graphs decode in turns in one process through in-place caches; a ratio is the median over turns, ours / theirs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
from random_model import SHAPE, save_random_model

from kvslim.load.source import read_spec, resolve
from kvslim.progress import Silent
from kvslim.recipe import parse_recipe
from kvslim.types import Plan
from kvslim.validate.latency import measure_latency
from kvslim.workshop import Workshop

HEAD_DIM = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]


def main() -> None:
    """Builds both graphs, times them and prints markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", default="128,2048,8192,16384")
    parser.add_argument("--repeats", type=int, default=24)
    parser.add_argument("--method", default="k_quant", help="weight quantisation of both: k_quant or rtn")
    arguments = parser.parse_args()
    contexts = [int(text) for text in arguments.contexts.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        graphs = build(Path(folder), arguments.method)
        sizes = {name: sum(file.stat().st_size for file in path.glob("model.onnx*")) for name, path in graphs.items()}
        counts = {name: count_nodes(path / "model.onnx") for name, path in graphs.items()}
        times = measure_latency(graphs, prompts=[512], contexts=contexts, repeats=arguments.repeats)
    print("| | builder | KVSlim | ratio |\n|---|---:|---:|---:|")
    theirs, ours = times["builder"], times["kvslim"]
    for key in theirs.tpot_ms:
        print(row(f"ms per token at {key}", theirs.tpot_ms[key], ours.tpot_ms[key], ours.tpot_ratio[key]))
    for key in theirs.ttft_ms:
        print(row(f"ms for a prompt of {key}", theirs.ttft_ms[key], ours.ttft_ms[key], ours.ttft_ratio[key]))
    mib = {name: size / 2**20 for name, size in sizes.items()}
    print(row("file MiB", mib["builder"], mib["kvslim"], mib["kvslim"] / mib["builder"]))
    print(row("nodes", counts["builder"], counts["kvslim"], counts["kvslim"] / counts["builder"], digits=0))


def row(name: str, theirs: float, ours: float, ratio: float, digits: int = 1) -> str:
    return f"| {name} | {theirs:.{digits}f} | {ours:.{digits}f} | {ratio:.2f} |"


def count_nodes(graph: Path) -> int:
    return len(onnx.load(graph, load_external_data=False).graph.node)


def build(folder: Path, method: str) -> dict[str, Path]:
    """The builder's and our graph of one random model, by name."""
    paths = {name: folder / name for name in ("model", "builder", "kvslim")}
    for path in paths.values():
        path.mkdir()
    save_random_model(paths["model"])
    build_theirs(paths["model"], paths["builder"], folder / "cache", method)
    recipe = parse_recipe({"name": "plain", "weights": {"type": "int4", "method": method}}, where="benchmark")
    snapshot = resolve(str(paths["model"]))
    spec = read_spec(snapshot)
    Workshop(snapshot, spec, recipe, Silent()).export(Plan.identity(spec), paths["kvslim"])
    return {name: paths[name] for name in ("builder", "kvslim")}


def build_theirs(model: Path, out: Path, cache: Path, method: str) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "--model_name", "", "--input", str(model)]
    command += ["--output", str(out), "--precision", "int4", "--execution_provider", "cpu", "--cache_dir", str(cache)]
    subprocess.run([*command, "--extra_options", f"algo_config={method}"], check=True, capture_output=True)
    graph = onnx.load(out / "model.onnx", load_external_data=False)
    for value in [*graph.graph.input, *graph.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "kv_cache_dim":  # our loop allocates the cache from the graph's shapes
                dim.dim_value = HEAD_DIM
    onnx.save(graph, out / "model.onnx")


if __name__ == "__main__":
    main()
