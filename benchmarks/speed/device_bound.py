"""What `kvslim inspect` expects of a machine, against what it does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.rows import Row
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE
from kvslim.contract import MIB
from kvslim.devices.demand import Cache, StageName, decode, prefill
from kvslim.devices.limits import bound
from kvslim.devices.measure import measure_device
from kvslim.devices.profile import Device, Quantity
from kvslim.devices.stored_weights import artifact_weights
from kvslim.devices.timing import usable_cores
from kvslim.validation.latency import Times, time_models
from kvslim.validation.measure import file_mib

REPEATS = 6
METHODS: dict[str, list[Any]] = {"plain": [], "int8": ["kv_quant"], "int4": [{"kv_quant": {"bits": 4}}]}
TIMES = Table(
    (
        Column("stage", ""),
        Column("cache", "cache"),
        Column("bound_ms", "bound ms", ".1f"),
        Column("binds", "binds"),
        Column("forecast_ms", "forecast ms", ".1f"),
        Column("fastest_ms", "fastest ms", ".1f"),
        Column("median_ms", "median ms", ".1f"),
        Column("ratio", "fastest / bound", ".2f"),
        Column("forecast_ratio", "fastest / forecast", ".2f"),
    )
)


def table(rows: Sequence[Row]) -> str:
    """Times, and what the machine was measured to do."""
    times, machines = ([row for row in rows if key in row.values] for key in ("stage", "gflops"))
    speed = machines[0].values
    numbers = f"{speed['cores']} of its cores: {speed['bandwidth_gb_s']:.3g} GB/s, {speed['gflops']:.3g} GFLOP/s."
    return f"{TIMES(times)}\n{numbers}\n"


@benchmark(
    "smollm2-shape",
    table=table,
    quick={"contexts": (32,), "prompt": 16, "rounds": 1, "caches": ("plain", "int8"), "weights": "fp32"},
)
def device_bound(
    source: Source,
    *,
    contexts: tuple[int, ...] = (128, 1024, 8192, 16384),
    caches: tuple[str, ...] = ("plain", "int8", "int4"),
    prompt: int = 512,
    rounds: int = 5,
    weights: str = "int4",
) -> Iterator[Values]:
    """The bound that `kvslim inspect` sets, and its forecast of timed kernels, against the time measured here.

    With int4 weights. Every round measures this machine as `kvslim doctor --measure` does, and then the graphs, on the
    cores that this process may use. Like with like: bound and forecast are those of the best round, and are held
    against the fastest run; the median is for comparison.
    """
    model = OpenModel(source, LITTLE, weights={"type": weights, "method": "rtn"} if weights == "int4" else weights)
    plans = {name: model.decided(*METHODS[name]) for name in caches}
    graphs = {name: model.export(plan) for name, plan in plans.items()}
    model.release()
    device, times = measured(graphs, contexts, prompt, rounds)
    without_kernels = device.model_copy(update={"kernels": {}})
    for name, graph in graphs.items():
        stored = artifact_weights(graph, model.spec, weights, int(file_mib(graph) * MIB))
        cache = Cache.of(name, model.spec, plans[name])
        for demand in [*(decode(stored, cache, context) for context in contexts), prefill(stored, cache, prompt)]:
            found, expected = bound(without_kernels, demand), bound(device, demand)
            taken = times[name, demand.stage, demand.context]
            least = found.seconds_per_token * 1e3 * (demand.context if demand.stage == "prefill" else 1)
            fastest = {"fastest_ms": float(taken.min()), "median_ms": float(np.median(taken))}
            values = {"bound_ms": least, "binds": found.binds, **fastest, "ratio": float(taken.min()) / least}
            if expected.is_forecast:
                forecast = expected.seconds_per_token * 1e3
                values |= {"forecast_ms": forecast, "forecast_ratio": float(taken.min()) / forecast}
            yield {"stage": f"{demand.stage} at {demand.context:,}", "cache": name, **values}
    speed = {"bandwidth_gb_s": device.bandwidth_gb_s.value, "gflops": device.gflops.value}
    yield {"cores": usable_cores(), **speed}


def measured(
    graphs: Mapping[str, Path], contexts: Sequence[int], prompt: int, rounds: int
) -> tuple[Device, dict[tuple[str, StageName, int], Times]]:
    """This machine at its best, and milliseconds by graph, stage and length."""
    devices, runs = [], []
    for _ in range(rounds):
        devices.append(measure_device())
        runs.append(time_models(graphs, [prompt], contexts, REPEATS, usable_cores()))
    best: dict[str, Any] = {
        field: _fastest(getattr(device, field) for device in devices) for field in ("bandwidth_gb_s", "gflops")
    }
    best["kernels"] = {name: _fastest(device.kernels[name] for device in devices) for name in devices[0].kernels}
    times: dict[tuple[str, StageName, int], Times] = {}
    for stage, tables in (("prefill", [run.ttft for run in runs]), ("decode", [run.tpot for run in runs])):
        for length in tables[0]:
            for name in graphs:
                times[name, stage, int(length)] = np.concatenate([table[length][name][:, 0] for table in tables])
    return devices[0].model_copy(update=best), times


def _fastest(measured: Iterable[Quantity]) -> Quantity:
    return max(measured, key=lambda quantity: quantity.value)
