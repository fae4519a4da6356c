"""Bytes and time per token without heads or whole layers' attention, on SmolLM2-135M's shape with int4 weights.

    python benchmarks/heads_speed.py [--contexts 2048,16384] [--repeats 12]

All graphs decode in turns in one process, through in-place caches in float32; ratios to the plain graph are medians
over turns.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from random_model import save_random_model

from kvslim.load.source import read_spec, resolve
from kvslim.methods.fitting import fit
from kvslim.progress import Silent
from kvslim.recipe import load_recipe
from kvslim.transform.surgery import trial
from kvslim.types import KVLayout, ModelSpec, Plan
from kvslim.validate.latency import measure_latency
from kvslim.workshop import Workshop

OVERRIDES = ("weights=int4", "calibration.samples=2", "calibration.length=64")
Heads = tuple[int, ...]


def main() -> None:
    """Builds the graphs, times them and prints a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", default="2048,16384")
    parser.add_argument("--repeats", type=int, default=12)
    arguments = parser.parse_args()
    contexts = [int(text) for text in arguments.contexts.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        spec, graphs, plans = build(Path(folder))
        sizes = {name: sum(path.stat().st_size for path in graph.iterdir()) for name, graph in graphs.items()}
        times = measure_latency(graphs, prompts=[16], contexts=contexts, repeats=arguments.repeats)
    columns = "".join(f" ms per token at {context:,} | ratio |" for context in contexts)
    print(f"| graph | KV bytes per token | file MiB |{columns}")
    print("|---|---:|---:|" + "---:|---:|" * len(contexts))
    for name, time in times.items():
        size = KVLayout.of(spec, plans[name]).bytes_per_token(contexts[-1])
        cells = "".join(f" {time.tpot_ms[key]:.1f} | {time.tpot_ratio[key]:.2f} |" for key in time.tpot_ms)
        print(f"| {name} | {size:,.0f} | {sizes[name] / 2**20:.1f} |{cells}")


def build(folder: Path) -> tuple[ModelSpec, dict[str, Path], dict[str, Plan]]:
    """The model's shape, and its graphs and plans by name, the plain ones first."""
    save_random_model(folder / "model")
    recipe, snapshot = load_recipe("lossless", OVERRIDES), resolve(str(folder / "model"))
    spec = read_spec(snapshot)
    workshop = Workshop(snapshot, spec, recipe, Silent())
    statistics = workshop.statistics()
    graphs: dict[str, Path] = {}
    plans = plans_of(spec)
    for name, plan in plans.items():
        graphs[name] = folder / name.replace(" ", "_")
        graphs[name].mkdir()
        with trial(workshop.model, workshop.architecture, fit(spec, statistics, plan)):
            workshop.export(plan, graphs[name])
    return spec, graphs, plans


def plans_of(spec: ModelSpec) -> dict[str, Plan]:
    """One kv head of three gone, one query head of every three, and the attention of every third layer."""
    group = spec.group_size
    return {
        "plain": Plan.identity(spec),
        "a third of the kv heads": _with(spec, tuple(range(spec.q_heads - group)), every=1),
        "a third of each kv head's readers": _with(
            spec, tuple(head for head in range(spec.q_heads) if head % group), every=1
        ),
        "the attention of a third of the layers": _with(spec, (), every=3),
    }


def _with(spec: ModelSpec, heads: Heads, every: int) -> Plan:
    plan = Plan.identity(spec)
    layers = (layer.model_copy(update={"heads": None if layer.layer % every else heads}) for layer in plan.layers)
    return plan.model_copy(update={"layers": tuple(layers)})


if __name__ == "__main__":
    main()
