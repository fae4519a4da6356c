"""CPU seconds that planning takes on SmolLM2-135M's shape: statistics, prices, and one plan at an eighth of the bytes.

    python benchmarks/planning.py [--samples 64] [--length 512]

The weights are random and so is the text; neither matters to the time. CPU time of all threads, which other load on the
machine changes little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from random_model import save_random_model

from kvslim.calibrate.statistics import collect
from kvslim.load.source import read_spec, resolve
from kvslim.progress import Silent
from kvslim.recipe import parse_recipe
from kvslim.workshop import Workshop

RATIO = 8
T = TypeVar("T")


def main() -> None:
    """Prints a markdown table of CPU seconds by stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    print("| stage | CPU seconds |\n|---|---:|")
    workshop = opened()
    windows = np.random.default_rng(0).integers(workshop.spec.vocab_size, size=(arguments.samples, arguments.length))
    start = time.process_time()
    statistics = timed(
        "statistics",
        lambda: collect(
            workshop.model, workshop.architecture, workshop.spec, windows, context=4096, seed=0, batches=iter
        ),
    )
    judges = timed("reference of the probes", lambda: workshop.judges(statistics))
    planner = timed("prices", lambda: workshop.planner(statistics, judges))
    planned = timed("one plan", lambda: planner.allocated(planner.plain_bytes / RATIO))
    assert planned is not None
    planned = timed("the uniform plan", lambda: planner.never_worse(planned))
    timed("refit of the output", lambda: workshop.compensated(statistics, planned.plan))
    print(f"| all | {time.process_time() - start:.0f} |")


def opened() -> Workshop:
    """The random model with nothing done to it."""
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder))
        snapshot = resolve(folder)
        recipe = parse_recipe({"name": "planning"}, where="benchmark")
        return Workshop(snapshot, read_spec(snapshot), recipe, Silent())


def timed(stage: str, action: Callable[[], T]) -> T:
    """What an action gives; prints its CPU time."""
    start = time.process_time()
    result = action()
    print(f"| {stage} | {time.process_time() - start:.0f} |", flush=True)
    return result


if __name__ == "__main__":
    main()
