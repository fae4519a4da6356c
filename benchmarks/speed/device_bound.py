"""What `kvslim inspect` expects of a machine, against what it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.rows import Row
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE
from kvslim.devices.demand import Cache, StageName, decode, prefill
from kvslim.devices.limits import bound
from kvslim.devices.measure import measure_device
from kvslim.devices.peak import memory
from kvslim.devices.profile import Device
from kvslim.devices.stored_weights import artifact_weights
from kvslim.validation.latency import Times, time_models
from kvslim.validation.measure import file_mib
from kvslim.validation.rss import peak_rss

REPEATS = 6
TIMES = Table(
    (
        Column("stage", ""),
        Column("bound_ms", "bound ms", ".1f"),
        Column("binds", "binds"),
        Column("fastest_ms", "fastest ms", ".1f"),
        Column("median_ms", "median ms", ".1f"),
        Column("ratio", "fastest / bound", ".2f"),
    )
)
MEMORY = Table(
    (
        Column("memory", "memory"),
        Column("predicted_mib", "predicted MiB", ".0f"),
        Column("peak_mib", "peak MiB", ".0f"),
    )
)


def table(rows: Sequence[Row]) -> str:
    """Times, memory, and what the machine was measured to do."""
    times, sizes = ([row for row in rows if key in row.values] for key in ("stage", "memory"))
    speed = sizes[0].values
    numbers = f"{speed['bandwidth_gb_s']:.3g} GB/s, {speed['gflops']:.3g} GFLOP/s."
    return f"{TIMES(times)}\n{MEMORY(sizes)}\n{numbers}\n"


@benchmark("smollm2-shape", table=table, quick={"contexts": (32,), "prompt": 16, "rounds": 1})
def device_bound(
    source: Source, *, contexts: tuple[int, ...] = (128, 2048, 8192), prompt: int = 512, rounds: int = 5
) -> Iterator[Values]:
    """The bound that `kvslim inspect` sets, against the time measured here: int4 weights, plain cache.

    Every round measures this machine as `kvslim doctor --measure` does, and then the graph. Like with like: the bound
    is that of the best round, and is held against the fastest run; the median is for comparison.
    """
    model = OpenModel(source, LITTLE, weights="int4")
    graph, spec = model.export(), model.spec
    weights = artifact_weights(graph, spec, "int4", int(file_mib(graph) * 2**20))
    cache = Cache.of("plain", spec, model.identity)
    model.release()
    device, times = measured(graph, contexts, prompt, rounds)
    for demand in [*(decode(weights, cache, context) for context in contexts), prefill(weights, cache, prompt)]:
        found, taken = bound(device, demand), times[demand.stage, demand.context]
        least = found.seconds_per_token * 1e3 * (demand.context if demand.stage == "prefill" else 1)
        fastest = {"fastest_ms": float(taken.min()), "median_ms": float(np.median(taken))}
        values = {"bound_ms": least, "binds": found.binds, **fastest, "ratio": float(taken.min()) / least}
        yield {"stage": f"{demand.stage} at {demand.context}", **values}
    longest = max(contexts)
    peaks = {"predicted_mib": memory(weights, cache, longest) / 2**20, "peak_mib": peak_rss(graph, longest)}
    speed = {"bandwidth_gb_s": device.bandwidth_gb_s.value, "gflops": device.gflops.value}
    yield {"memory": f"decode at {longest}", **peaks, **speed}


def measured(
    graph: Path, contexts: Sequence[int], prompt: int, rounds: int
) -> tuple[Device, dict[tuple[StageName, int], Times]]:
    """This machine at its best, and milliseconds by stage and length."""
    devices, runs = [], []
    for _ in range(rounds):
        devices.append(measure_device())
        runs.append(time_models({"plain": graph}, [prompt], contexts, REPEATS))
    best = {
        field: max((getattr(device, field) for device in devices), key=lambda quantity: quantity.value)
        for field in ("bandwidth_gb_s", "gflops")
    }
    times: dict[tuple[StageName, int], Times] = {}
    for stage, tables in (("prefill", [run.ttft for run in runs]), ("decode", [run.tpot for run in runs])):
        for length in tables[0]:
            times[stage, length] = np.concatenate([table[length]["plain"][:, 0] for table in tables])
    return devices[0].model_copy(update=best), times
