"""What each codec of the cache costs, by bytes per token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Plot, Table
from benchmarks.subjects import Source
from benchmarks.texts import BRIEF, FULL
from kvslim.types import Plan

LONG = 16384
MINMAX = {"granularity": "per_channel", "clip": "minmax", "centre": False}
REFERENCE = "minmax int4"
CODECS: dict[str, list[dict[str, Any]]] = {
    REFERENCE: [{"kv_quant": {**MINMAX, "bits": 4}}],
    "minmax int8": [{"kv_quant": {**MINMAX, "bits": 8}}],
    "`kv_quant` int8": [{"kv_quant": {"bits": 8}}],
    "`kv_quant` int4": [{"kv_quant": {"bits": 4}}],
    "`kv_pca` half the rank, int8": [{"kv_pca": {"rank_ratio": 0.5}}, {"kv_quant": {"bits": 8}}],
    "`kv_hdc` int8, one step": [{"kv_hdc": {"bits": 8}}],
    "`kv_hdc` int8, per channel": [{"kv_hdc": {"bits": 8, "granularity": "per_channel"}}],
    "`kv_hdc` int4, one step": [{"kv_hdc": {"bits": 4}}],
    "`kv_hdc` int4, per channel": [{"kv_hdc": {"bits": 4, "granularity": "per_channel"}}],
    "packed 2 bits, window 128": [{"kv_hdc": {"bits": 2, "window": 128}}],
}
TABLE = Table(
    (
        Column("codec", "codec"),
        Column("bytes", "bytes per token", ",.0f"),
        Column("long_bytes", f"at {LONG:,}", ",.0f"),
        Column("ratio", "times smaller", ".2f"),
        Column("kl", "KL", ".2g"),
        Column("kl_ratio", f"of {REFERENCE}", ".2g"),
        Column("expected_kl", "expected KL", ".2g"),
        Column("recall", "recall", ".0%"),
    )
)
PLOT = Plot(
    x=("bytes", "bytes per token"),
    ys={"kl": "mean KL, nats per token", "recall": "recall"},
    name="codec",
    styles={"minmax": "x", "`kv_quant`": "s", "`kv_pca`": "^", "`kv_hdc`": "o", "packed": "d", "planner": ".-"},
    logarithmic=frozenset({"kl"}),
)


@benchmark("demo", "books", table=TABLE, plot=PLOT, quick={"text": BRIEF, "names": (REFERENCE,), "ratios": (8,)})
def codecs(
    source: Source,
    *,
    text: Mapping[str, Any] = FULL,
    names: tuple[str, ...] = tuple(CODECS),
    ratios: tuple[float, ...] = (16 / 3, 8, 32 / 3, 64 / 5, 16),
) -> Iterator[Values]:
    """What each codec of the cache costs: KL and recall of the exported graph, by bytes per token.

    Calibrated on 64 x 512 tokens, judged on 24 x 512 through the cache in chunks of 16. Rows of the planner are as
    `kvslim compress --kv-ratio` makes them; the others keep the output projections that the model had.
    """
    model = OpenModel(source, text)
    reference = None
    for name, plan, expected in plans(model, names, ratios):
        found = model.measured(plan)
        reference = reference or found.kl
        yield {
            "codec": name,
            "bytes": model.size(plan),
            "long_bytes": model.size(plan, LONG) if any(layer.cache.kept for layer in plan.layers) else None,
            "ratio": model.size(model.identity) / model.size(plan),
            "kl": found.kl,
            "kl_ratio": found.kl / reference,
            "expected_kl": expected,
            "recall": found.recall,
        }


def plans(
    model: OpenModel, names: tuple[str, ...], ratios: tuple[float, ...]
) -> Iterator[tuple[str, Plan, float | None]]:
    """Name and plan of each codec, and what the planner expects of its own."""
    for name in names:
        yield name, model.decided(*CODECS[name]), None
    for ratio in ratios:
        plan, expected = model.compensated(model.planner.planned(ratio).plan)
        yield f"planner, {ratio:.4g} times", plan, expected
