"""Heads that share attention: what their clusters cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.models import OpenModel
from benchmarks.plans import attending
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import BRIEF, FULL
from kvslim.methods import ClusterHeads
from kvslim.types import Plan

TABLE = Table(
    (
        Column("clusters", "clusters"),
        Column("bytes", "KV bytes per token", ",.0f"),
        Column("saved", "saved", ".1%"),
        Column("bare", "KL without refit", ".2g"),
        Column("kl", "KL", ".2g"),
        Column("top1", "same token", ".1%"),
        Column("recall", "recall", ".1%"),
    )
)


@benchmark("mha", "demo", table=TABLE, quick={"text": BRIEF})
def clusters(source: Source, *, text: Mapping[str, Any] = FULL) -> Iterator[Values]:
    """What heads that share attention cost: static and dynamic clusters, at the elbow and fewer.

    Quality is that of the exported graphs, decoded in chunks of 16 through their caches, on held-out text. Fewer
    clusters than the elbow's are formed in the last half of the layers; 8 heads on 1 are what 32 on 4 are in the paper.
    """
    model = OpenModel(source, text)
    plain = model.size(model.identity)
    found = model.measured(model.identity, model.plain_codes)
    yield {"clusters": "none", "bytes": plain, "saved": 0.0, "bare": 0.0, **found._asdict()}
    for name, method in methods(model):
        plan = method.decide(model.spec, model.statistics, model.identity)
        bare = model.codes(plan)
        found, size = model.measured(plan, model.refitted(bare)), model.size(plan)
        values = {"bytes": size, "saved": 1 - size / plain, "bare": model.kl(bare), **found._asdict()}
        yield {"clusters": f"{name}{counts_of(model, plan)}", **values}


def methods(model: OpenModel) -> Iterator[tuple[str, ClusterHeads]]:
    """The elbow in all layers, then halves of the heads in the last ones; dynamic where keys are cached by head."""
    heads, layers, group = model.spec.q_heads, model.spec.layers, model.spec.group_size
    last = range(layers - layers // 2, layers)
    modes = ("static", "dynamic") if group == 1 else ("static",)
    for mode in modes:
        yield f"{mode}, elbow, all layers", ClusterHeads(mode=mode)
    number, least = heads // 2, 1 if group == 1 else model.spec.kv_heads
    while number >= least:
        for mode in modes:
            chosen = ClusterHeads(mode=mode, clusters=dict.fromkeys(last, number))
            yield f"{mode}, {heads} heads on {number}, last {len(last)} of {layers} layers", chosen
        number //= 2


def counts_of(model: OpenModel, plan: Plan) -> str:
    """The numbers of clusters, where they are not all in the row's name."""
    counts = [attending(layer, model.spec) for layer in plan.layers]
    return "" if counts[0] == model.spec.q_heads and len(set(counts)) == 2 else f" ({', '.join(map(str, counts))})"
