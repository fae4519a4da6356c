"""How long planning takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE

TABLE = Table((Column("stage", "stage"), Column("seconds", "seconds", ".0f"), Column("cpu", "of CPU", ".0f")))


@benchmark("smollm2-shape", table=TABLE, quick={"samples": 4, "length": 48, "context": 96})
def planning_speed(
    source: Source, *, samples: int = 64, length: int = 512, context: int = 4096, ratio: float = 8
) -> Iterator[Values]:
    """Seconds of planning: statistics, prices, a frontier, one plan at an eighth, its refit.

    The text is random, which does not matter to the time, and new in every run, so that nothing is read from the disk.
    Beside the wall time stands that of the CPU, over all threads, which other load on the machine changes little.
    """
    model = OpenModel(source, LITTLE | {"calibration": {"context": context}})
    windows = np.random.default_rng().integers(model.spec.vocab_size, size=(samples, length))
    model.calibrate(windows[:1, :8])  # what is loaded once is not timed
    found: dict[str, Any] = {}
    seconds = cpu = 0.0
    for stage, action in stages(model, windows, ratio).items():
        start, start_cpu = time.perf_counter(), time.process_time()
        found[stage] = action(found)
        taken, taken_cpu = time.perf_counter() - start, time.process_time() - start_cpu
        seconds, cpu = seconds + taken, cpu + taken_cpu
        yield {"stage": stage, "seconds": taken, "cpu": taken_cpu}
    yield {"stage": "all", "seconds": seconds, "cpu": cpu}


def stages(model: OpenModel, windows: np.ndarray, ratio: float) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """What planning does, in order; each takes what those before it found."""

    def statistics(_: dict[str, Any]) -> None:
        model.calibrate(windows)

    return {
        "statistics": statistics,
        "reference of the KL evaluator": lambda _: model.held_out,
        "probes and prices": lambda _: model.planner,
        "frontier": lambda _: model.planner.frontier(),
        "one plan": lambda _: model.planner.allocated(ratio),
        "the uniform plan": lambda found: model.planner.never_worse(found["one plan"]),
        "refit of the output": lambda found: model.compensated(found["the uniform plan"].plan),
    }
