"""A slim graph against the plain one."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE
from kvslim.validation.latency import measure_latency

TABLE = Table(
    (
        Column("tokens", "tokens"),
        Column("plain_ms", "plain ms", ".1f"),
        Column("slim_ms", "slim ms", ".1f"),
        Column("ratio", "ratio", ".2f"),
    )
)


@benchmark(
    "smollm2-shape", table=TABLE, quick={"rank": 8, "contexts": (32,), "prompt": 16, "repeats": 3, "weights": "fp32"}
)
def decode_speed(
    source: Source,
    *,
    rank: int = 32,
    contexts: tuple[int, ...] = (128, 1024, 4096, 8192),
    prompt: int = 512,
    repeats: int = 24,
    weights: str = "int4",
) -> Iterator[Values]:
    """Time per token at half the rank in int8, against the plain graph, with int4 weights.

    Both graphs decode in turns in one process through in-place caches; the ratio is the median over turns.
    """
    model = OpenModel(source, LITTLE, weights=weights)
    plan = model.decided({"kv_pca": {"rank": rank}}, {"kv_quant": {"bits": 8, "granularity": "per_channel"}})
    graphs = {"plain": model.export(), "slim": model.export(plan)}
    model.release()
    times = measure_latency(graphs, prompts=[prompt], contexts=contexts, repeats=repeats)
    plain, slim = times["plain"], times["slim"]
    for kind, (theirs, ours, ratio) in {
        "decode at": (plain.tpot_ms, slim.tpot_ms, slim.tpot_ratio),
        "prompt of": (plain.ttft_ms, slim.ttft_ms, slim.ttft_ratio),
    }.items():
        for key in theirs:
            yield {"tokens": f"{kind} {key}", "plain_ms": theirs[key], "slim_ms": ours[key], "ratio": ratio[key]}
