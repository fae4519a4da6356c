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

STEPS = {"windows": "statistics", "layers probed": "probes"}
TABLE = Table(
    (
        Column("stage", "stage"),
        Column("alone", "one process, seconds", ".0f"),
        Column("together", "workers, seconds", ".0f"),
        Column("speedup", "times as fast", ".2f"),
    )
)


class Timed(Silent):
    """Takes the time of each row of steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def track(self, items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
        """Yields `items` unchanged, and takes the time from the first to the last."""
        start = time.perf_counter()
        yield from items
        self.seconds[label] = time.perf_counter() - start


@benchmark("smollm2-shape", table=TABLE, quick={"samples": 4, "length": 48})
def workers(source: Source, *, samples: int = 8, length: int = 256, count: int = 2) -> Iterator[Values]:
    """Statistics and probes by one process of one thread, and by workers of one thread each.

    The workers load the model within the statistics' time. Plans have to be equal to the last bit.
    """
    import torch

    torch.set_num_threads(1)
    text = {"calibration": {"samples": samples, "length": length}}
    recipe = recipe_of(source, text, weights="fp32", budget={"kv_ratio": 8}, compensate=False)
    found = {}
    for name, many in {"alone": None, "together": count}.items():
        with mock.patch.dict(os.environ, {"KVSLIM_CACHE": str(source.folder / name)}):  # where nothing is found
            timed = Timed()
            plan = kvslim.plan(source.model, recipe, workers=many, progress=timed)
        found[name] = plan, timed.seconds
    (alone, before), (together, after) = found.values()
    if alone != together:
        raise AssertionError("workers make another plan")
    rows = [(title, before[label], after[label]) for label, title in STEPS.items()]
    rows.append(("both", *(sum(row[side] for row in rows) for side in (1, 2))))
    for title, one, many in rows:
        yield {"stage": title, "alone": one, "together": many, "speedup": one / many}
