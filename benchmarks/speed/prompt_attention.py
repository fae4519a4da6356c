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

WHOLE = tuple((None, context, new) for context in (0, 4096) for new in (4, 16, 32, 128, 512))
WINDOWED = tuple((512, 4096, new) for new in (16, 32, 128, 512))
CACHES = {"float32": "float32", "int8": "int8, per channel", "int4": "int4, per channel"}
TABLE = Table(
    (
        Column("window", "cache of"),
        Column("context", "context", ",d"),
        Column("new", "new tokens", ",d"),
        Column("float32", "float32", ".2f"),
    ),
    pivot="cache",
    each=(Column("operator", "{}, operator", ".2f"), Column("branch", "{}, branch", ".2f")),
    format="",
)


@benchmark("smollm2-shape", table=TABLE, quick={"points": ((None, 64, 8), (16, 64, 8)), "repeats": 4})
def prompt_attention(
    source: Source,
    *,
    points: tuple[tuple[int | None, int, int], ...] = (*WHOLE, *WINDOWED),
    repeats: int = 12,
) -> Iterator[Values]:
    """Attention to so many new tokens: milliseconds over float32, over integers by the operator, and by the branch.

    One GroupQueryAttention of the model's heads on one thread, in turns; medians. The branch includes reading the past
    into float32 and writing the new rows. A point is the window that the cache keeps, or None for all tokens, the
    context and the new tokens.
    """
    spec = read_spec(resolve(source.model))
    for window, context, new in points:
        times = timed(spec, window, context, new, repeats)
        shown = {"window": "all tokens" if window is None else f"{window:,} tokens", "context": context, "new": new}
        for cache in ("int8", "int4"):
            if cache not in times:
                continue
            measured = {"operator": times[cache], "branch": times[f"{cache}, branch"]}
            yield {**shown, "cache": cache, "float32": times["float32"], **measured}


def timed(spec: ModelSpec, window: int | None, context: int, new: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of each cache by the operator, and of integers by the branch."""
    runs: dict[str, Callable[[], None]] = {}
    for cache, kind in CACHES.items():
        if cache == "int4" and window is not None and spec.head_dim % 32:
            continue  # the operator does not take it
        model = graph(spec, kind, window)
        variants = {cache: model.SerializeToString()}
        if cache != "float32":
            variants[f"{cache}, branch"] = branched(model)
        for name, serialized in variants.items():
            runs[name] = run(serialized, spec, kind, window, context, new)
    times = in_turns(list(runs), lambda name: thread_ms(runs[name]), repeats)
    return {name: float(np.median(row)) for name, row in times.items()}


def run(model: bytes, spec: ModelSpec, kind: str, window: int | None, context: int, new: int) -> Callable[[], None]:
    """One run of a graph on random content."""
    session = one_thread(model)
    bound = binding(session, spec, kind, context, new, window)
    return lambda: session.run_with_iobinding(bound)
