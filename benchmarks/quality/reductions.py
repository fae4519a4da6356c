"""Every method that removes or shares something, by itself and in the planner's hands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.models import OpenModel
from benchmarks.plans import made_of
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table, per_subject
from benchmarks.rows import Row
from benchmarks.subjects import Source
from benchmarks.texts import BRIEF, FULL
from kvslim.methods import ClusterHeads, Method, PruneHeads, PruneLayers, ShareKv

QUALITY = (Column("kl", "KL", ".2g"), Column("top1", "same token", ".1%"), Column("recall", "recall", ".0%"))
ALONE = Table(
    (
        Column("method", "method"),
        Column("bytes", "KV bytes per token", ",.0f"),
        Column("mib", "file MiB", ".1f"),
        Column("bare", "KL, bare", ".2g"),
        *QUALITY,
    )
)
PLANNED = Table(
    (
        Column("made_of", "plan made of"),
        Column("ratio", "smaller by", ".2f"),
        Column("expected_kl", "expected KL", ".2g"),
        *QUALITY,
    )
)


def tables(rows: Sequence[Row]) -> str:
    """Two tables of each subject."""
    return per_subject(rows, _tables_of_subject)


def _tables_of_subject(rows: Sequence[Row]) -> str:
    alone, planned = ([row for row in rows if key in row.values] for key in ("method", "made_of"))
    ratio = planned[0].settings["ratio"]
    return f"{ALONE(alone)}\nAll of them, at {ratio:g} times fewer bytes:\n\n{PLANNED(planned)}"


@benchmark("demo", "books", "mha", table=tables, quick={"text": BRIEF, "ratio": 8, "names": ("prune_heads",)})
def reductions(
    source: Source, *, text: Mapping[str, Any] = FULL, ratio: float = 16, names: tuple[str, ...] | None = None
) -> Iterator[Values]:
    """What each way to remove or share costs by itself, and what the planner makes of all of them.

    KL is that of the exported graphs on held-out text, through their caches in chunks of 16; "bare" is in torch and
    without compensation, "KL" with it where it pays on calibration text.
    """
    model = OpenModel(source, text)
    for name, method in methods(model):
        if names is None or method.name in names:
            yield {"method": name, **alone(model, method)}
    for planned in model.planner.alternatives(ratio):
        yield {"made_of": made_of(planned.plan), **through_graph(model, planned)}
    yield {"made_of": "**the planner's choice**", **through_graph(model, model.planner.planned(ratio))}


def methods(model: OpenModel) -> Iterator[tuple[str, Method]]:
    """Each method with the least of what it can take, or about a sixth."""
    every, half = model.spec.layers * model.spec.kv_heads, max(1, model.spec.layers // 2)
    heads = max(1, every // 6)
    yield f"`prune_heads`, {heads} of {every} kv heads", PruneHeads(groups=heads)
    yield "`prune_layers`, 1 attention", PruneLayers(attention=1)
    yield "`prune_layers`, 1 MLP", PruneLayers(mlps=1)
    yield "`prune_layers`, 1 block", PruneLayers(blocks=1)
    yield "`share_kv`, 1 layer", ShareKv(layers=1)
    yield f"`cluster_heads`, half of the heads attend in {half} layers", ClusterHeads(fraction=0.5, count=half)


def alone(model: OpenModel, method: Method) -> Values:
    """A method by itself, its choices measured."""
    chosen = model.measured_method(method)
    plan = model.decided(chosen)
    refitted, _ = model.compensated(plan)
    found = model.measured(refitted)
    return {"bytes": model.size(plan), "bare": model.kl(model.codes(plan)), **found._asdict()}


def through_graph(model: OpenModel, planned: Any) -> Values:
    """A plan of the planner, with what it expects."""
    plan, expected = model.compensated(planned.plan)
    found = model.measured(plan)
    return {"ratio": model.size(model.identity) / model.size(plan), "expected_kl": expected, **found._asdict()}
