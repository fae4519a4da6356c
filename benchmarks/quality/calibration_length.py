"""Calibrating short and deploying long."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from kvslim.methods import KvPca, KvQuant

METHODS = KvPca(rank_ratio=0.75), KvQuant()
TABLE = Table(
    (
        Column("calibrated_at", "calibrated at"),
        Column("kl", "KL", ".2g"),
        Column("ratio", "against the long one", ".2f"),
    )
)


@benchmark("demo", table=TABLE, quick={"length": 96, "short": 32, "tokens": 192, "documents": 2})
def calibration_length(
    source: Source, *, length: int = 2048, short: int = 256, tokens: int = 32768, documents: int = 4
) -> Iterator[Values]:
    """KL at 2,048 tokens by calibration length, with and without RoPE-aware moments.

    The same number of calibration tokens in every row, at three quarters of the rank in int8. "As seen" averages
    over the calibration length alone.
    """
    validation = {"samples": documents, "length": length}
    calibration = {"samples": tokens // length, "length": length, "context": length}
    model = OpenModel(source._replace(recall=None), {"calibration": calibration, "validation": validation})
    rows = {
        f"{length:,} tokens": {},
        f"{short} tokens": {"samples": tokens // short, "length": short},
        f"{short} tokens, as seen": {"samples": tokens // short, "length": short, "context": short},
    }
    reference = None
    for name, settings in rows.items():
        statistics = model.statistics_of(**settings)
        plan = model.decided(*METHODS, statistics=statistics)
        kl = model.measured(plan, model.codes(plan, statistics)).kl
        reference = reference or kl
        yield {"calibrated_at": name, "kl": kl, "ratio": kl / reference}
