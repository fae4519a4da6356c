"""Peak memory of loading and exporting a model of Llama-3.2-1B's shape, stored in bfloat16, with random weights.

    python benchmarks/export_memory.py [--weights fp32,int4] [--layers 16] [--model FOLDER]

Each weight format is exported in a fresh process, plain. The limit is 1.3 times the float32 weights and 1 GB.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from random_model import save_random_model

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPORT = "import sys, export_memory; export_memory.export(*sys.argv[1:])"


def main() -> None:
    """Prints a markdown table, a row per weight format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="fp32,int4")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--model", type=Path, help="a folder to keep the model in, or to find it in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or Path(folder) / "model"
        if not model.is_dir():
            save_random_model(model, {**SHAPE, "num_hidden_layers": arguments.layers}, "bfloat16")
        size = 2 * sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e9
        print("| weights | float32 weights GB | peak RSS GB | limit GB | graph GB |\n|---|---:|---:|---:|---:|")
        for weights in arguments.weights.split(","):
            out = Path(folder) / weights
            command = [sys.executable, "-c", EXPORT, str(model), weights, str(out)]
            peak = float(subprocess.run(command, cwd=Path(__file__).parent, check=True, stdout=subprocess.PIPE).stdout)
            graph = sum(path.stat().st_size for path in out.iterdir()) / 1e9
            print(f"| {weights} | {size:.2f} | {peak:.2f} | {1.3 * size + 1:.2f} | {graph:.2f} |", flush=True)


def export(model: str, weights: str, out: str) -> None:
    """Loads and exports a model, and prints this process's peak RSS in GB; on stderr, the peak after each step."""
    from kvslim.export.graph import build_graph, save_graph
    from kvslim.export.weights import quantise_weights
    from kvslim.load.source import read_spec, resolve
    from kvslim.progress import Silent
    from kvslim.recipe import parse_recipe
    from kvslim.types import KVLayout, Plan
    from kvslim.workshop import Workshop

    snapshot, recipe = resolve(model), parse_recipe({"name": "plain", "weights": weights}, "--weights")
    note("imports")
    workshop = Workshop(snapshot, read_spec(snapshot), recipe, Silent())
    note("load")
    layout = KVLayout.of(workshop.spec, Plan.identity(workshop.spec))
    graph = build_graph(workshop.model, workshop.architecture, layout)
    note("graph")
    quantise_weights(graph, recipe.weights)
    note("weights")
    Path(out).mkdir()
    save_graph(graph, Path(out))
    print(note("save"))


def note(step: str) -> float:
    """Peak RSS of this process in GB, which a fresh process starts from zero."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak, now = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) * 1024 / 1e9 for name in ("VmHWM", "VmRSS"))
    print(f"{step}: peak {peak:.2f} GB, now {now:.2f} GB", file=sys.stderr)
    return peak


if __name__ == "__main__":
    main()
