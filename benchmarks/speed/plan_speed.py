"""How well the planner's count of a decode step tells the time of a plan."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.models import OpenModel
from benchmarks.plans import plan_of, sharing_plan
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE
from kvslim.contract import ModelSpec
from kvslim.types import Plan
from kvslim.validation.latency import measure_latency
from kvslim.validation.measure import file_mib

TABLE = Table(
    (
        Column("plan", "plan"),
        Column("bytes", "KV bytes per token at the longest", ",.0f"),
        Column("mib", "file MiB", ".1f"),
    ),
    pivot="context",
    each=(Column("ms", "ms at {}", ".1f"), Column("ratio", "ratio", ".2f"), Column("expected", "expected", ".2f")),
    format=",",
)


@benchmark(
    "smollm2-shape",
    table=TABLE,
    quick={"names": ("plain", "half the rank"), "contexts": (64,), "repeats": 3, "weights": "fp32"},
)
def plan_speed(
    source: Source,
    *,
    names: tuple[str, ...] | None = None,
    contexts: tuple[int, ...] = (2048, 16384),
    window: int = 1024,
    repeats: int = 10,
    weights: str = "int4",
) -> Iterator[Values]:
    """Expected and measured time of plans over the plain graph's, with int4 weights.

    One plan for each way to save time; all graphs decode in turns in one process.
    """
    model = OpenModel(source, LITTLE, weights=weights)
    every = plans_of(model.spec, window)
    plans = {name: every[name] for name in names or every}
    graphs = {name: model.export(plan) for name, plan in plans.items()}
    times = measure_latency(graphs, prompts=[16], contexts=contexts, repeats=repeats)
    for name, plan in plans.items():
        sizes = {"bytes": model.size(plan, contexts[-1]), "mib": file_mib(graphs[name])}
        for context in contexts:
            expected = model.decode_time(plan, context) / model.decode_time(plans["plain"], context)
            time = {"ms": times[name].tpot_ms[str(context)], "ratio": times[name].tpot_ratio[str(context)]}
            yield {"plan": name, "context": context, **sizes, **time, "expected": expected}


def plans_of(spec: ModelSpec, window: int) -> dict[str, Plan]:
    """One plan for each way to save time."""
    half, group = spec.head_dim // 2, spec.group_size
    readers = tuple(head for head in range(spec.q_heads) if head % group)
    return {
        "plain": Plan.identity(spec),
        "int8": plan_of(spec, bits=8, per_tensor=True),
        "half the rank": plan_of(spec, rank=half),
        "half the rank, int4": plan_of(spec, rank=half, bits=4),
        f"window of {window:,}": plan_of(spec, window=window, sinks=4),
        "without a kv head": plan_of(spec, heads=tuple(range(spec.q_heads - group))),
        "without one reader of each kv head": plan_of(spec, heads=readers),
        "no attention in a third of the layers": plan_of(spec, every=3, heads=()),
        "no MLP in a third of the layers": plan_of(spec, every=3, mlp=False),
        "a third of the layers gone": plan_of(spec, every=3, heads=(), mlp=False),
        "a third of the layers on another's cache": sharing_plan(spec, every=3),
    }
