"""What a prompt takes over every kind of cache."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE
from kvslim.types import Plan
from kvslim.validation.latency import measure_latency

CACHES = ("int8", "int4", "int4, rotated", "int4, residual", "window of 512", "heads clustered", "2 bits, packed")
TABLE = Table(
    (Column("cache", "cache"), Column("bytes", "KV bytes per token", ",.0f")),
    pivot="prompt",
    each=(Column("ms", "ms, prompt of {}", ",.0f"), Column("ratio", "to plain", ".2f")),
    format=",",
)


@benchmark(
    "smollm2-4-layers",
    table=TABLE,
    quick={"names": ("int4, residual", "heads clustered"), "prompts": (32,), "repeats": 3},
)
def prompt_caches(
    source: Source,
    *,
    names: tuple[str, ...] = CACHES,
    prompts: tuple[int, ...] = (512, 4096),
    repeats: int = 12,
    threads: int = 1,
) -> Iterator[Values]:
    """What a prompt takes over every kind of cache, next to the plain one, in turns, with float32 weights.

    Two thirds of the query heads attend where they are clustered. `int4, residual` keeps three quarters of a head's
    coordinates, a quarter with a residual, and so takes the bytes of int4. Packed codes and clusters read a prompt 64
    tokens at once, the others 512.
    """
    model = OpenModel(source, LITTLE)
    plans = {"plain": model.identity} | {name: plan_of(model, name) for name in names}
    graphs = {name: model.export(plan) for name, plan in plans.items()}
    model.release()
    times = measure_latency(graphs, prompts, [], repeats, threads)
    for name, plan in plans.items():
        for length, ms in times[name].ttft_ms.items():
            found = {"prompt": int(length), "ms": ms, "ratio": times[name].ttft_ratio[length]}
            yield {"cache": name, "bytes": model.size(plan, max(prompts)), **found}


def plan_of(model: OpenModel, name: str) -> Plan:
    """The plan that is called so."""
    clusters = dict.fromkeys(range(model.spec.layers), model.spec.q_heads * 2 // 3)
    rotated = {"kv_hdc": {"bits": 4, "granularity": "per_channel"}}
    methods = {
        "int8": {"kv_quant": {"bits": 8, "granularity": "per_channel"}},
        "int4": {"kv_quant": {"bits": 4, "granularity": "per_channel"}},
        "int4, rotated": rotated,
        "int4, residual": rotated,
        "window of 512": {"kv_window": {"window": 512}},
        "heads clustered": {"cluster_heads": {"clusters": clusters}},
        "2 bits, packed": {"kv_hdc": {"bits": 2}},
    }
    plan = model.decided(methods[name])
    if name != "int4, residual":
        return plan
    sizes = {"rank": model.spec.head_dim * 3 // 4, "residual": model.spec.head_dim // 4}
    return plan.model_copy(update={"layers": tuple(layer.with_cache(**sizes) for layer in plan.layers)})
