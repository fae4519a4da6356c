"""The attention operator and its branch for prompts, by number of new tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.models import branched
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.speed.attention_kernel import binding, graph, one_thread, thread_ms
from benchmarks.subjects import Source
from kvslim.contract import ModelSpec
from kvslim.loading.source import read_spec, resolve
from kvslim.validation.latency import in_turns

CACHES = {"float32": "float32", "int8": "int8, per channel", "int4": "int4, per channel"}
TABLE = Table(
    (Column("context", "context", ",d"), Column("new", "new tokens", ",d"), Column("float32", "float32", ".2f")),
    pivot="cache",
    each=(Column("operator", "{}, operator", ".2f"), Column("branch", "{}, branch", ".2f")),
    format="",
)


@benchmark("smollm2-shape", table=TABLE, quick={"contexts": (64,), "new_tokens": (8,), "repeats": 4})
def prompt_attention(
    source: Source,
    *,
    contexts: tuple[int, ...] = (0, 4096),
    new_tokens: tuple[int, ...] = (4, 16, 32, 128, 512),
    repeats: int = 12,
) -> Iterator[Values]:
    """Attention to so many new tokens: milliseconds over float32, over integers by the operator, and by the branch.

    One GroupQueryAttention of the model's heads on one thread, in turns; medians. The branch includes reading the past
    into float32 and writing the new rows.
    """
    spec = read_spec(resolve(source.model))
    for context in contexts:
        for new in new_tokens:
            times = timed(spec, context, new, repeats)
            for cache in ("int8", "int4"):
                measured = {"operator": times[cache], "branch": times[f"{cache}, branch"]}
                yield {"context": context, "new": new, "cache": cache, "float32": times["float32"], **measured}


def timed(spec: ModelSpec, context: int, new: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of each cache by the operator, and of integers by the branch."""
    runs: dict[str, Callable[[], None]] = {}
    for cache, kind in CACHES.items():
        runs[cache] = run(graph(spec, kind).SerializeToString(), spec, kind, context, new)
        if cache != "float32":
            runs[f"{cache}, branch"] = run(branched(graph(spec, kind)), spec, kind, context, new)
    times = in_turns(list(runs), lambda name: thread_ms(runs[name]), repeats)
    return {name: float(np.median(row)) for name, row in times.items()}


def run(model: bytes, spec: ModelSpec, kind: str, context: int, new: int) -> Callable[[], None]:
    """One run of a graph on random content."""
    session = one_thread(model)
    bound = binding(session, spec, kind, context, new)
    return lambda: session.run_with_iobinding(bound)
