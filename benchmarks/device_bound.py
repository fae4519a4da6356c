"""The bound that `kvslim inspect` sets, against the time measured here: SmolLM2-135M's shape in int4, plain cache.

    python benchmarks/device_bound.py [--contexts 128,2048,8192] [--prompt 512] [--rounds 5]

Every round measures this machine as `kvslim doctor --measure` does, and then the graph. Like with like: the bound is
that of the best round, and is held against the fastest run; the median is for comparison.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from random_model import save_random_model

from kvslim.devices.demand import Cache, StageName, decode, memory, prefill
from kvslim.devices.graph import artifact_weights
from kvslim.devices.limits import bound
from kvslim.devices.measure import measure_device
from kvslim.devices.profile import Device
from kvslim.load.source import read_spec, resolve
from kvslim.progress import Silent
from kvslim.recipe import load_recipe
from kvslim.types import ModelSpec, Plan
from kvslim.validate.latency import Times, time_models
from kvslim.validate.measure import file_mib
from kvslim.validate.rss import peak_rss
from kvslim.workshop import Workshop

REPEATS = 6
Key = tuple[StageName, int]


def main() -> None:
    """Builds the graph, measures it and prints two markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", default="128,2048,8192")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    contexts = [int(text) for text in arguments.contexts.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        report(Path(folder), build(Path(folder)), contexts, arguments.prompt, arguments.rounds)


def build(folder: Path) -> ModelSpec:
    """Exports the random model to `folder`."""
    model = folder / "model"
    model.mkdir()
    save_random_model(model)
    snapshot = resolve(str(model))
    spec = read_spec(snapshot)
    Workshop(snapshot, spec, load_recipe("lossless", ["weights=int4"]), Silent()).export(Plan.identity(spec), folder)
    return spec


def report(graph: Path, spec: ModelSpec, contexts: Sequence[int], prompt: int, rounds: int) -> None:
    """Prints the bounds and the memory of a graph next to what is measured."""
    weights = artifact_weights(graph, spec, "int4", int(file_mib(graph) * 2**20))
    cache = Cache.of("plain", spec, Plan.identity(spec))
    device, times = measured(graph, contexts, prompt, rounds)
    demands = [*(decode(weights, cache, context) for context in contexts), prefill(weights, cache, prompt)]
    print("| | bound ms | binds | fastest ms | median ms | fastest / bound |\n|---|---:|---|---:|---:|---:|")
    for demand in demands:
        found, taken = bound(device, demand), times[demand.stage, demand.context]
        least = found.seconds_per_token * 1e3 * (demand.context if demand.stage == "prefill" else 1)
        fastest, median = taken.min(), np.median(taken)
        cells = f"{least:.1f} | {found.binds} | {fastest:.1f} | {median:.1f} | {fastest / least:.2f}"
        print(f"| {demand.stage} at {demand.context} | {cells} |")
    predicted, peak = memory(weights, cache, max(contexts)) / 2**20, peak_rss(graph, max(contexts))
    print(f"\n| memory at {max(contexts)} | predicted MiB | peak MiB |\n|---|---:|---:|")
    print(f"| decode | {predicted:.0f} | {peak:.0f} |")
    print(f"\n{device.bandwidth_gb_s.value:.3g} GB/s, {device.gflops.value:.3g} GFLOP/s.")


def measured(graph: Path, contexts: Sequence[int], prompt: int, rounds: int) -> tuple[Device, dict[Key, Times]]:
    """This machine at its best, and milliseconds by stage and length."""
    devices, runs = [], []
    for _ in range(rounds):
        devices.append(measure_device())
        runs.append(time_models({"plain": graph}, [prompt], contexts, REPEATS))
    best = {
        field: max((getattr(device, field) for device in devices), key=lambda quantity: quantity.value)
        for field in ("bandwidth_gb_s", "gflops")
    }
    times: dict[Key, Times] = {}
    for stage, tables in (("prefill", [run.ttft for run in runs]), ("decode", [run.tpot for run in runs])):
        for length in tables[0]:
            times[stage, length] = np.concatenate([table[length]["plain"][:, 0] for table in tables])
    return devices[0].model_copy(update=best), times


if __name__ == "__main__":
    main()
