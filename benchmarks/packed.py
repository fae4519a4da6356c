"""Memory and time of packed codes and of rings on SmolLM2-135M's shape, with int4 weights.

    python benchmarks/packed.py [--contexts 4096,16384] [--repeats 12] [--threads 2]

`packed` keeps 4 sinks and 128 tokens exact and the rest in 2 bits; `int4` is the fused operator's int4 cache; `window`
keeps 4 sinks and 512 tokens in every layer. Graphs decode in turns in one process; times are ratios to plain, medians
over turns. Peak memory is that of a fresh process with one decoded token at the context.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from random_model import save_random_model

from kvslim.load.source import read_spec, resolve
from kvslim.progress import Silent
from kvslim.recipe import parse_recipe
from kvslim.runtime.session import DecodeSession
from kvslim.transform.codes import LayerCodes
from kvslim.types import LayerPlan, ModelSpec, Plan
from kvslim.validate.latency import measure_latency
from kvslim.validate.rss import peak_rss
from kvslim.workshop import Workshop

GAUSSIAN = np.array([-1.510, -0.4528, 0.4528, 1.510])  # Max, 1960; speed does not depend on the levels


def packed(spec: ModelSpec) -> LayerCodes:
    """2 bits behind a window of 128."""
    scale = np.ones((spec.kv_heads, spec.head_dim))
    levels = {"key_levels": GAUSSIAN, "value_levels": GAUSSIAN}
    return LayerCodes(cache="codes2", window=128, sinks=4, key_scale=scale, value_scale=scale, **levels)


def int4(spec: ModelSpec) -> LayerCodes:
    """The fused operator's int4."""
    scale = np.full((spec.kv_heads, spec.head_dim), 0.3)
    return LayerCodes(cache="int4", key_scale=scale, value_scale=scale)


def window(_: ModelSpec) -> LayerCodes:
    """A ring of 512 and nothing else."""
    return LayerCodes(window=512, sinks=4)


KINDS: dict[str, Callable[[ModelSpec], LayerCodes]] = {
    "plain": lambda _: LayerCodes(),
    "int4": int4,
    "packed": packed,
    "window": window,
}


def main() -> None:
    """Builds the graphs, measures them and prints a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", default="4096,16384")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    contexts = [int(text) for text in arguments.contexts.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        graphs = build(Path(folder))
        times = measure_latency(graphs, [128], contexts, arguments.repeats, arguments.threads)
        peaks = {name: {c: peak_rss(path, c, arguments.threads) for c in contexts} for name, path in graphs.items()}
        layouts = {name: DecodeSession(path, capacity=1).layout for name, path in graphs.items()}
    print("| context | cache | bytes per token | ratio | peak MiB | ratio | ms per token | ratio |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|")
    for context in contexts:
        for name in KINDS:
            size, plain = (layouts[kind].bytes_per_token(context) for kind in (name, "plain"))
            peak, ratio = peaks[name][context], times[name].tpot_ratio[str(context)]
            print(
                f"| {context:,} | {name} | {size:,.0f} | {size / plain:.3f} | {peak:,.0f} |"
                f" {peak / peaks['plain'][context]:.2f} | {times[name].tpot_ms[str(context)]:.1f} | {ratio:.2f} |"
            )


def build(folder: Path) -> dict[str, Path]:
    """The graph of each kind, by name."""
    model = folder / "model"
    model.mkdir()
    save_random_model(model)
    return {name: export(model, folder / name, make) for name, make in KINDS.items()}


def export(model: Path, out: Path, make: Callable[[ModelSpec], LayerCodes]) -> Path:
    out.mkdir()
    snapshot = resolve(str(model))
    spec, recipe = read_spec(snapshot), parse_recipe({"name": "plain", "weights": "int4"}, where="benchmark")
    workshop, code = Workshop(snapshot, spec, recipe, Silent()), make(spec)
    workshop.install((code,) * spec.layers)
    common = {"cache": code.cache, "window": code.window, "sinks": code.sinks}
    workshop.export(Plan(layers=tuple(LayerPlan(layer=i, **common) for i in range(spec.layers))), out)
    return out


if __name__ == "__main__":
    main()
