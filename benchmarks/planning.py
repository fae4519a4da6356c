"""Seconds of planning on SmolLM2-135M's shape: statistics, prices, a frontier, one plan at an eighth, its refit.

    python benchmarks/planning.py [--samples 64] [--length 512]

The weights are random and so is the text; neither matters to the time. Beside the wall time that of the CPU, over all
threads, which other load on the machine changes little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from random_model import save_random_model

from kvslim.calibrate.recorder import collect
from kvslim.load.source import read_spec, resolve
from kvslim.progress import Silent
from kvslim.recipe import parse_recipe
from kvslim.workshop import Workshop

RATIO = 8
T = TypeVar("T")


class Clock(NamedTuple):
    """A moment, by the wall and by the CPU, in seconds."""

    wall: float
    cpu: float


def main() -> None:
    """Prints a markdown table of CPU seconds by stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    print("| stage | seconds | of CPU |\n|---|---:|---:|")
    workshop = opened()
    windows = np.random.default_rng(0).integers(workshop.spec.vocab_size, size=(arguments.samples, arguments.length))
    start = Clock(time.perf_counter(), time.process_time())
    statistics = timed(
        "statistics",
        lambda: collect(
            workshop.model, workshop.architecture, workshop.spec, windows, context=4096, seed=0, progress=Silent()
        ),
    )
    held_out = timed("reference of the judge", lambda: workshop.held_out_judge(statistics))
    planner = timed("probes and prices", lambda: workshop.planner(statistics, held_out))
    timed("frontier", planner.frontier)
    planned = timed("one plan", lambda: planner.allocated(planner.plain_bytes / RATIO))
    assert planned is not None
    planned = timed("the uniform plan", lambda: planner.never_worse(planned))
    timed("refit of the output", lambda: workshop.compensated(statistics, held_out, planned.plan))
    print(f"| all | {time.perf_counter() - start.wall:.0f} | {time.process_time() - start.cpu:.0f} |")


def opened() -> Workshop:
    """The random model with nothing done to it."""
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder))
        snapshot = resolve(folder)
        recipe = parse_recipe({"name": "planning"}, where="benchmark")
        return Workshop(snapshot, read_spec(snapshot), recipe, Silent())


def timed(stage: str, action: Callable[[], T]) -> T:
    """What an action gives; prints its time."""
    start = Clock(time.perf_counter(), time.process_time())
    result = action()
    print(f"| {stage} | {time.perf_counter() - start.wall:.0f} | {time.process_time() - start.cpu:.0f} |", flush=True)
    return result


if __name__ == "__main__":
    main()
