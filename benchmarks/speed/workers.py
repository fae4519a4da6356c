"""How much sooner workers are done than one process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import kvslim
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import recipe_of
from kvslim.progress import Silent

STEPS = {
    "windows": "statistics",
    "layers probed": "probes",
    "kinds of changes asked for recall": "what keeps recall",
    "sizes planned": "plans of several sizes",
    "sizes priced": "cache types of other tools",
}
WHOLE = "the whole plan"
TABLE = Table(
    (
        Column("stage", "stage"),
        Column("alone", "one process, seconds", ".0f"),
        Column("together", "workers, seconds", ".0f"),
        Column("speedup", "times as fast", ".2f"),
    )
)


class Timed(Silent):
    """Takes the time of each kind of steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def track(self, items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
        """Yields `items` unchanged, and takes the time from the first to the last."""
        start = time.perf_counter()
        try:
            yield from items
        finally:
            self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - start


@benchmark("smollm2-shape", table=TABLE, quick={"samples": 4, "length": 48})
def workers(source: Source, *, samples: int = 8, length: int = 256, count: int = 2) -> Iterator[Values]:
    """What a plan takes by one process of one thread, and by workers of one thread each.

    The workers load the model within the statistics' time. What keeps recall is not done in pieces, nor what stands in
    the last row alone. Plans have to be equal to the last bit.
    """
    import torch

    torch.set_num_threads(1)
    text = {"calibration": {"samples": samples, "length": length}}
    recipe = recipe_of(source, text, weights="fp32", budget={"kv_ratio": 8}, compensate=False)
    found = {}
    for name, many in {"alone": None, "together": count}.items():
        with mock.patch.dict(os.environ, {"KVSLIM_CACHE": str(source.folder / name)}):  # where nothing is found
            timed, start = Timed(), time.perf_counter()
            plan = kvslim.plan(source.model, recipe, workers=many, progress=timed)
        found[name] = plan, {**timed.seconds, WHOLE: time.perf_counter() - start}
    (alone, before), (together, after) = found.values()
    if alone != together:
        raise AssertionError("workers make another plan")
    steps = [(label, title) for label, title in (*STEPS.items(), (WHOLE, WHOLE)) if label in before]
    rows = [(title, before[label], after[label]) for label, title in steps]
    rows.insert(2, ("both", *(sum(row[side] for row in rows[:2]) for side in (1, 2))))
    for title, one, many in rows:
        yield {"stage": title, "alone": one, "together": many, "speedup": one / many}
