"""Heads that share attention: what their clusters save in time."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE
from kvslim.methods import ClusterHeads
from kvslim.validation.latency import measure_latency

TABLE = Table(
    (
        Column("graph", "graph"),
        Column("bytes", "KV bytes per token", ",.0f"),
        Column("ttft_ratio", "TTFT ratio", ".2f"),
    ),
    pivot="context",
    each=(
        Column("ms", "ms per token at {}", ".1f"),
        Column("ratio", "ratio", ".2f"),
        Column("cache_ratio", "ratio for the cache", ".2f"),
    ),
    format=",",
)


@benchmark(
    "mha-shape",
    table=TABLE,
    quick={
        "modes": ("static",),
        "contexts": (256,),
        "short": 16,
        "prompt": 16,
        "repeats": 3,
        "last": 1,
        "weights": "fp32",
    },
)
def cluster_speed(
    source: Source,
    *,
    modes: tuple[str, ...] = ("static", "dynamic"),
    contexts: tuple[int, ...] = (2048, 8192),
    short: int = 128,
    prompt: int = 512,
    repeats: int = 8,
    last: int = 5,
    weights: str = "int4",
) -> Iterator[Values]:
    """What heads that share attention save in time, next to the plain graph, in turns.

    Two clusters in the last layers or in all; 5 of 12 are what 14 of 32 are in the paper. Time for the cache is what a
    context takes beyond a short one: attention, and nothing else.
    """
    model = OpenModel(source, LITTLE, weights=weights)
    plans = {"plain": model.identity}
    plans |= {
        name: method.decide(model.spec, model.statistics, model.identity)
        for name, method in methods(model, last, modes).items()
    }
    graphs = {name: model.export(plan) for name, plan in plans.items()}
    times = measure_latency(graphs, prompts=[prompt], contexts=[short, *contexts], repeats=repeats)
    for name, plan in plans.items():
        own, plain = times[name].tpot_ms, times["plain"].tpot_ms
        shown = {"bytes": model.size(plan), "ttft_ratio": times[name].ttft_ratio[str(prompt)]}
        for context in map(str, contexts):
            cached, plain_cached = (one[context] - one[str(short)] for one in (own, plain))
            ratios = {"ratio": times[name].tpot_ratio[context], "cache_ratio": cached / plain_cached}
            yield {"graph": name, "context": int(context), **shown, "ms": own[context], **ratios}


def methods(model: OpenModel, last: int, modes: tuple[str, ...]) -> dict[str, ClusterHeads]:
    """Clusters of the last layers, and static ones of all."""
    heads, layers = model.spec.q_heads, model.spec.layers
    some, every = (dict.fromkeys(range(first, layers), 2) for first in (layers - last, 0))
    found = {
        f"{mode}, {heads} heads on 2, last {last} layers": ClusterHeads(clusters=some, mode=mode) for mode in modes
    }
    whole = {f"static, {heads} heads on 2, all layers": ClusterHeads(clusters=every)} if "static" in modes else {}
    return found | whole
