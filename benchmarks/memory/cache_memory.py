"""Memory and time of caches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE
from kvslim.validation.latency import measure_latency
from kvslim.validation.rss import peak_rss

TABLE = Table(
    (
        Column("context", "context", ","),
        Column("cache", "cache"),
        Column("bytes", "bytes per token", ",.0f"),
        Column("bytes_ratio", "ratio", ".3f"),
        Column("peak_mib", "peak MiB", ",.0f"),
        Column("peak_ratio", "ratio", ".2f"),
        Column("ms", "ms per token", ".1f"),
        Column("ratio", "ratio", ".2f"),
    )
)


@benchmark(
    "smollm2-shape",
    table=TABLE,
    quick={"kinds": ("plain", "packed"), "contexts": (96,), "exact": 16, "repeats": 3, "threads": 1, "weights": "fp32"},
)
def cache_memory(
    source: Source,
    *,
    kinds: tuple[str, ...] = ("plain", "int4", "packed", "window"),
    contexts: tuple[int, ...] = (4096, 16384),
    exact: int = 128,
    window: int = 512,
    repeats: int = 12,
    threads: int = 2,
    weights: str = "int4",
) -> Iterator[Values]:
    """Memory and time of packed codes and of rings, with int4 weights.

    `packed` keeps 4 sinks and a window exact and the rest in 2 bits, `int4` is the fused operator's own cache, `window`
    keeps 4 sinks and a longer window in every layer. Graphs decode in turns in one process; times are ratios to plain,
    medians over turns. Peak memory is that of a fresh process with one decoded token at the context.
    """
    model = OpenModel(source, LITTLE, weights=weights)
    methods: dict[str, list[Any]] = {
        "plain": [],
        "int4": [{"kv_quant": {"bits": 4}}],
        "packed": [{"kv_hdc": {"bits": 2, "window": exact}}],
        "window": [{"kv_window": {"window": window}}],
    }
    plans = {kind: model.decided(*methods[kind]) for kind in kinds}
    graphs = {name: model.export(plan) for name, plan in plans.items()}
    model.release()
    times = measure_latency(graphs, [16], contexts, repeats, threads)
    for context in contexts:
        peaks = {name: peak_rss(path, context, threads) for name, path in graphs.items()}
        plain = model.size(plans["plain"], context)
        for name, plan in plans.items():
            size, time = model.size(plan, context), times[name]
            yield {
                "context": context,
                "cache": name,
                "bytes": size,
                "bytes_ratio": size / plain,
                "peak_mib": peaks[name],
                "peak_ratio": peaks[name] / peaks["plain"],
                "ms": time.tpot_ms[str(context)],
                "ratio": time.tpot_ratio[str(context)],
            }
