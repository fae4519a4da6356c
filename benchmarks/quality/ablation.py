"""What each part of the planner's plans is worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from benchmarks.models import STEP, OpenModel
from benchmarks.plans import has_windows, recoded, refit, without_residual
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import BRIEF, FULL
from kvslim.types import Plan

SHORT = 128
TABLE = Table(
    (Column("plan", "plan"),),
    pivot="ratio",
    each=(Column("kl", "KL at {}x", ".2g"), Column("kl_ratio", "over all", ".2f")),
)


@benchmark("demo", "books", table=TABLE, quick={"text": BRIEF, "ratios": (8,), "short": 24})
def ablation(
    source: Source, *, text: Mapping[str, Any] = FULL, ratios: tuple[float, ...] = (8, 16), short: int = SHORT
) -> Iterator[Values]:
    """What each part of the planner's plans is worth: KL without it, over KL with all, at no more bytes.

    In torch on 24 x 512 held-out tokens. Each row changes one thing in the finished plan and fits all else again;
    "uniform ranks" gives all layers one rank, "no residual" spends the residuals' bytes on rank, and "no windows" lets
    the planner choose anew. Moments are also taken from windows of 128 tokens, as many tokens in all: once averaged
    over 512 positions, as KVSlim does, and once as seen.
    """
    model = OpenModel(source, text)
    for ratio in ratios:
        reference = None
        for name, plan, statistics in variants(model, ratio, short):
            kl = model.kl(model.codes(plan, statistics))
            reference = reference or kl
            size = model.size(plan)
            yield {"plan": name, "ratio": ratio, "kl": kl, "kl_ratio": kl / reference, "bytes": size}


def variants(model: OpenModel, ratio: float, short: int) -> Iterator[tuple[str, Plan, Any]]:
    """Name, plan and statistics of each row; whether to fit projections again is decided once, for all of them."""
    statistics = model.statistics
    bare = model.planner.planned(ratio).plan
    whole, _ = model.compensated(bare)
    is_refit = whole.layers[0].refit
    yield "all parts", whole, statistics
    yield "no refit of the output", bare, statistics
    unwindowed = model.planner.planned_of(ratio, lambda kind: not has_windows(kind)).plan
    yield "no windows", refit(unwindowed, is_refit), statistics
    yield "uniform ranks", refit(uniform(model, ratio), is_refit), statistics
    yield "no residual", model.centred(without_residual(whole, model.spec)), statistics
    yield "key PCA, not balanced", model.centred(recoded(whole, objective="key")), statistics
    yield "no rotation", model.centred(recoded(whole, rotation=None)), statistics
    yield "no centring", recoded(whole, centred=False), statistics
    if ratio <= 8:
        yield "channels as they are", refit(model.decided({"kv_quant": {"bits": 4}}), is_refit), statistics
    for name, context in ((f"moments from {short} tokens", model.context), (f"from {short} tokens, as seen", short)):
        yield name, whole, statistics_of_short(model, short, context)


@cache
def statistics_of_short(model: OpenModel, length: int, context: int) -> Any:
    """Statistics of as many tokens in short windows."""
    settings = model.recipe.calibration
    samples = settings.samples * settings.length // length
    return model.statistics_of(samples=samples, length=length, context=context)


def uniform(model: OpenModel, ratio: float) -> Plan:
    """One rank for all layers, in the bytes of a ratio, int4."""
    rank = int(8 * model.spec.head_dim / ratio) // STEP * STEP
    return model.decided({"kv_pca": {"rank": rank}}, {"kv_hdc": {"bits": 4, "granularity": "per_channel"}})
