"""Formats of the weights, in time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE
from kvslim.contract import WeightType
from kvslim.validation.latency import measure_latency
from kvslim.weight_format import WeightFormat

FORMATS: dict[str, WeightFormat] = {
    str(format_): format_
    for format_ in (
        WeightFormat(type="int4", method="rtn"),
        WeightFormat(type="int4"),
        WeightFormat(type="int4", block=64),
        WeightFormat(type="int4", block=128),
        WeightFormat(type="int4", mixed=True),
        WeightFormat(type="int8", block=32),
        WeightFormat(type="int8"),
        WeightFormat(type="stored"),
    )
}
SPEED = Table(
    (
        Column("weights", "weights"),
        Column("token_ratio", "time per token", ".2f"),
        Column("prompt_ratio", "time for a prompt", ".2f"),
    )
)
COST = Table(
    (
        Column("weights", "weights"),
        Column("bare_ms", "ms without a cache", ".1f"),
        Column("cache_ms", "ms per 1,000 cached tokens", ".2f"),
        Column("cost", "cost of a multiply-accumulate", ".2f"),
    )
)


@benchmark(
    "smollm2-shape",
    "smollm2",
    table=SPEED,
    quick={"formats": ("int4 (k_quant)", "stored"), "context": 32, "prompt": 16, "repeats": 3},
)
def weight_speed(
    source: Source,
    *,
    formats: tuple[str, ...] = tuple(FORMATS),
    context: int = 128,
    prompt: int = 128,
    repeats: int = 32,
) -> Iterator[Values]:
    """Time per token of weight formats, against int4 rtn, the symmetric one.

    The graphs decode in turns in one process; a ratio is the median over turns. `stored` are the blocks of a GGUF.
    """
    known = [name for name in formats if name != "stored" or source.model.endswith(".gguf")]
    graphs = {name: _exported(source, FORMATS[name]) for name in known}
    times = measure_latency(graphs, prompts=[prompt], contexts=[context], repeats=repeats)
    for name, time in times.items():
        ratios = {"token_ratio": time.tpot_ratio[str(context)], "prompt_ratio": time.ttft_ratio[str(prompt)]}
        yield {"weights": name, **ratios}


@benchmark("smollm2-shape", table=COST, quick={"kinds": ("fp32",), "contexts": (32, 512), "repeats": 3})
def weight_cost(
    source: Source,
    *,
    kinds: tuple[WeightType, ...] = get_args(WeightType),
    contexts: tuple[int, int] = (2048, 16384),
    repeats: int = 10,
) -> Iterator[Values]:
    """What one multiply-accumulate of weights costs, in those of the float32 attention kernel.

    Two contexts give the time of one cached token; what is left at none is the weights'. The graphs decode in turns in
    one process.
    """
    graphs = {kind: _exported(source, WeightFormat(type=kind)) for kind in kinds}
    model = OpenModel(source, LITTLE)
    numbers, spec = model.weight_numbers(contexts[0]), model.spec
    model.release()
    times = measure_latency(graphs, prompts=[16], contexts=contexts, repeats=repeats)
    for kind, time in times.items():
        near, far = (time.tpot_ms[str(context)] for context in contexts)
        slope = (far - near) / (contexts[1] - contexts[0])
        bare = near - slope * contexts[0]
        cost = (bare / numbers) / (slope / (2 * spec.layers * spec.q_heads * spec.head_dim))
        yield {"weights": kind, "bare_ms": bare, "cache_ms": 1000 * slope, "cost": cost}


def _exported(source: Source, weights: WeightFormat) -> Path:
    """The plain graph with its weights in that format."""
    model = OpenModel(source, LITTLE, weights=weights)
    folder = model.export()
    model.release()
    return folder
