"""Peak memory and time of a long prompt, in chunks and in one piece, on SmolLM2-135M's shape with int4 weights.

    python benchmarks/long_prompt.py [--lengths 2048,8192] [--chunks 128,512,0]

Each run is a fresh process; 0 is one piece. The cache itself takes what the column says.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from kvslim.runtime.session import DecodeSession
from kvslim.validate.rss import own_peak_mib


def main() -> None:
    """Prints a markdown table, or as a child process one row's numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--chunks", default="128,512,0")
    parser.add_argument("--child", nargs=3, metavar=("GRAPH", "LENGTH", "CHUNK"))
    arguments = parser.parse_args()
    if arguments.child:
        graph, length, chunk = arguments.child
        return run(Path(graph), int(length), int(chunk))
    print("| prompt | cache MiB | chunk | peak MiB | seconds |\n|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        graph = build(Path(folder))
        for length in arguments.lengths.split(","):
            for chunk in arguments.chunks.split(","):
                child = [sys.executable, __file__, "--child", str(graph), length, chunk]
                found = subprocess.run(child, check=True, capture_output=True, text=True).stdout.split()
                cache, peak, seconds = map(float, found)
                print(f"| {length} | {cache:.0f} | {chunk if chunk != '0' else 'all'} | {peak:.0f} | {seconds:.1f} |")
    return None


def build(folder: Path) -> Path:
    # Imported here, so that the memory of a run is not that of torch.
    from random_model import save_random_model

    from kvslim.load.source import read_spec, resolve
    from kvslim.progress import Silent
    from kvslim.recipe import parse_recipe
    from kvslim.types import Plan
    from kvslim.workshop import Workshop

    model, graph = folder / "model", folder / "graph"
    for path in (model, graph):
        path.mkdir()
    save_random_model(model)
    snapshot = resolve(str(model))
    spec, recipe = read_spec(snapshot), parse_recipe({"name": "plain", "weights": "int4"}, where="benchmark")
    Workshop(snapshot, spec, recipe, Silent()).export(Plan.identity(spec), graph)
    return graph


def run(graph: Path, length: int, chunk: int) -> None:
    session = DecodeSession(graph, capacity=length)
    tokens = np.random.default_rng(0).integers(0, session.vocab, length)
    start = time.perf_counter()
    session.prefill(tokens, chunk=chunk or length)
    seconds = time.perf_counter() - start
    print(session.layout.bytes_at(length) / 2**20, own_peak_mib(), seconds)


if __name__ == "__main__":
    main()
