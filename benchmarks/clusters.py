"""What heads that share attention cost and save: static and dynamic clusters, at the elbow and at the paper's fraction.

    python benchmarks/clusters.py quality|time [--contexts 2048,8192] [--repeats 8]

Quality is that of the exported graphs, decoded in chunks of 16 through their caches, on held-out stories of a model
with a kv head for every query head and of the demo model, whose query heads share kv heads in pairs. Fewer clusters
than the elbow's are formed in the last half of the layers; 8 heads on 1 are what 32 on 4 are in the paper. Time is that
of a random model of 16 heads of 64 in 12 layers, the last 5 clustered as 14 of 32 are in the paper, next to the plain
graph, in turns. Time for the cache is what a context takes beyond one of 128 tokens: attention, and nothing else.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from random_model import save_random_model
from subjects import LENGTH, MHA, Subject, of_stories

from kvslim.load.source import read_spec, resolve
from kvslim.methods import ClusterHeads
from kvslim.progress import Silent
from kvslim.recipe import load_recipe
from kvslim.transform.codes import LayerCodes
from kvslim.transform.surgery import trial
from kvslim.types import KVLayout, Plan
from kvslim.validate.latency import measure_latency
from kvslim.validate.recall import measure_recall
from kvslim.workshop import Workshop

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 4096,
    "max_position_embeddings": 32768,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SHORT = 128
OVERRIDES = ("weights=int4", "calibration.samples=2", "calibration.length=64")


class Row(NamedTuple):
    """One way to cluster heads."""

    name: str
    options: dict[str, Any]


def main() -> None:
    """Measures and prints markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quality", "time"))
    parser.add_argument("--contexts", default="2048,8192")
    parser.add_argument("--repeats", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.what == "time":
        print_time([int(text) for text in arguments.contexts.split(",")], arguments.repeats)
        return
    mha, gqa = "a model of 8 heads on 8 kv heads, on stories", "the demo model of 4 heads on 2 kv heads, on stories"
    print_quality(of_stories(mha, str(MHA)), rows_of(8, (4, 2, 1), 1))
    print_quality(Subject(gqa, "demo"), rows_of(4, (2,), 2))


def rows_of(heads: int, counts: tuple[int, ...], pools: int) -> Iterator[Row]:
    """The elbow in all layers, then numbers of clusters in the last three; both modes where keys are cached by head."""
    modes = ("static", "dynamic") if pools == 1 else ("static",)
    for mode in modes:
        yield Row(f"{mode}, elbow, all layers", {"mode": mode})
    for number in counts:
        for mode in modes:
            clusters = dict.fromkeys((3, 4, 5), number)
            yield Row(f"{mode}, {heads} heads on {number}, last 3 of 6 layers", {"mode": mode, "clusters": clusters})


def print_quality(subject: Subject, rows: Iterator[Row]) -> None:
    """One table of a model; output projections are fitted again, as `kvslim compress` does."""
    print(f"{subject.name[0].upper()}{subject.name[1:]}:\n")
    print("| clusters | KV bytes per token | saved | KL without refit | KL | same token | recall |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    plain = subject.size(subject.identity)
    recall = measure_recall(subject.plain, subject.items)
    print(f"| none | {plain:,.0f} | 0.0% | 0 | 0 | 100.0% | {recall:.1%} |", flush=True)
    for row in rows:
        plan = ClusterHeads(**row.options).decide(subject.spec, subject.statistics, subject.identity)
        bare = subject.workshop.codes(subject.statistics, plan)
        measured = subject.measured(plan, subject.workshop.refitted(subject.statistics, bare))
        size = subject.size(plan)
        print(
            f"| {row.name}{counts_of(plan, subject)} | {size:,.0f} | {1 - size / plain:.1%} |"
            f" {subject.judge.kl(bare):.2g} | {measured.kl:.2g} | {measured.top1:.1%} | {measured.recall or 0:.1%} |",
            flush=True,
        )
    print()


def counts_of(plan: Plan, subject: Subject) -> str:
    """The numbers of clusters, where they are not all in the row's name."""
    counts = [layer.attending or subject.spec.q_heads for layer in plan.layers]
    return "" if counts[0] == subject.spec.q_heads and len(set(counts)) == 2 else f" ({', '.join(map(str, counts))})"


def print_time(contexts: list[int], repeats: int) -> None:
    """Time per token of the random model."""
    with tempfile.TemporaryDirectory() as folder:
        graphs, plans, spec = build(Path(folder))
        times = measure_latency(graphs, prompts=[512], contexts=[SHORT, *contexts], repeats=repeats)
    columns = "".join(f" ms per token at {context:,} | ratio | ratio for the cache |" for context in contexts)
    print("Random weights in int4, 12 layers of 16 heads:\n")
    print(f"| graph | KV bytes per token | TTFT ratio at 512 |{columns}")
    print("|---|---:|---:|" + "---:|---:|---:|" * len(contexts))
    plain = times["plain"].tpot_ms
    for name, time in times.items():
        size, own = KVLayout.of(spec, plans[name]).bytes_per_token(LENGTH), time.tpot_ms
        cells = [
            f" {own[key]:.1f} | {time.tpot_ratio[key]:.2f} | {cached(own, key) / cached(plain, key):.2f} |"
            for key in map(str, contexts)
        ]
        print(f"| {name} | {size:,.0f} | {time.ttft_ratio['512']:.2f} |{''.join(cells)}")


def cached(times: Mapping[str, float], context: str) -> float:
    """Milliseconds that a cache of that context adds to a token."""
    return times[context] - times[str(SHORT)]


def build(folder: Path) -> tuple[dict[str, Path], dict[str, Plan], Any]:
    """Graphs and plans of the random model by name, the plain one first, and its shape."""
    save_random_model(folder / "model", SHAPE)
    recipe, snapshot = load_recipe("lossless", OVERRIDES), resolve(str(folder / "model"))
    spec = read_spec(snapshot)
    workshop = Workshop(snapshot, spec, recipe, Silent())
    statistics = workshop.statistics()
    last, every = (dict.fromkeys(range(start, spec.layers), 2) for start in (7, 0))
    methods = {
        "static, 16 heads on 2, last 5 layers": ClusterHeads(clusters=last),
        "dynamic, 16 heads on 2, last 5 layers": ClusterHeads(clusters=last, mode="dynamic"),
        "static, 16 heads on 2, all layers": ClusterHeads(clusters=every),
    }
    plans = {"plain": Plan.identity(spec)}
    plans |= {name: method.decide(spec, statistics, plans["plain"]) for name, method in methods.items()}
    graphs: dict[str, Path] = {}
    for name, plan in plans.items():
        graphs[name] = folder / name.replace(" ", "_")
        graphs[name].mkdir()
        codes = workshop.codes(statistics, plan) if name in methods else tuple(LayerCodes() for _ in plan.layers)
        with trial(workshop.model, workshop.architecture, codes):
            workshop.export(plan, graphs[name])
    return graphs, plans, spec


if __name__ == "__main__":
    main()
