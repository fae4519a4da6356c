"""The first token and the tokens after it, at short contexts and long ones."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE
from kvslim.validation.latency import measure_latency

INT8 = {"kv_quant": {"bits": 8, "granularity": "per_channel"}}
CACHES = {
    "int8": (INT8,),
    "int4, rotated": ({"kv_hdc": {"bits": 4}},),
    "rank 48, int8": ({"kv_pca": {"rank": 48}}, INT8),
}
TABLE = Table(
    (Column("weights", "weights"), Column("cache", "cache"), Column("bytes", "KV bytes per token", ",.0f")),
    pivot="what",
    each=(Column("ratio", "{}", ".2f"),),
    format="",
)


@benchmark(
    "smollm2",
    table=TABLE,
    quick={"weights": ("fp32",), "names": ("int8",), "prompts": (32,), "contexts": (16,), "repeats": 3},
)
def first_token(
    source: Source,
    *,
    weights: tuple[str, ...] = ("int4", "fp32"),
    names: tuple[str, ...] = tuple(CACHES),
    prompts: tuple[int, ...] = (512, 4096),
    contexts: tuple[int, ...] = (128, 1024, 8000),
    repeats: int = 12,
) -> Iterator[Values]:
    """Prompts, and tokens after them, next to the plain graph of the same weights.

    All caches take turns with plain in one process; the table has ratios, medians over pairs of neighbouring turns.
    `int8` is the cache of `lossless`, an eighth of plain's bytes is `int4, rotated`. Codes are fitted on little text,
    which changes no time, and int4 weights are rounded to nearest.
    """
    for format_ in weights:
        model = OpenModel(source, LITTLE, weights={"type": "int4", "method": "rtn"} if format_ == "int4" else format_)
        plans = {"plain": model.identity} | {name: model.decided(*CACHES[name]) for name in names}
        graphs = {name: model.export(plan) for name, plan in plans.items()}
        model.release()
        times = measure_latency(graphs, prompts=prompts, contexts=contexts, repeats=repeats)
        for name, plan in plans.items():
            shown, latency = {"weights": format_, "cache": name, "bytes": model.size(plan)}, times[name]
            for length, ms in latency.ttft_ms.items():
                yield {**shown, "what": f"prompt of {length}", "ms": ms, "ratio": latency.ttft_ratio[length]}
            for length, ms in latency.tpot_ms.items():
                yield {**shown, "what": f"token at {length}", "ms": ms, "ratio": latency.tpot_ratio[length]}
