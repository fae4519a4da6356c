"""Formats of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import BRIEF, FULL
from kvslim.runtime.session import DecodeSession
from kvslim.types import WeightFormat
from kvslim.validation.measure import file_mib
from kvslim.validation.quality import measure_quality

FORMATS: dict[str, WeightFormat] = {
    str(format_): format_
    for format_ in (
        WeightFormat(),
        WeightFormat(type="int8", method="rtn"),
        WeightFormat(type="int8"),
        WeightFormat(type="int4", method="rtn"),
        WeightFormat(type="int4"),
        WeightFormat(type="int4", mixed=True),
    )
}
TABLE = Table(
    (
        Column("weights", "weights"),
        Column("mib", "MiB", ".1f"),
        Column("kl", "KL", ".2g"),
        Column("kl_p99", "KL p99", ".2g"),
        Column("top1", "same top token", ".3f"),
        Column("perplexity", "perplexity", ".3f"),
    )
)


@benchmark("demo", table=TABLE, quick={"text": BRIEF, "formats": ("int4 (k_quant)",)})
def weights(
    source: Source, *, text: Mapping[str, Any] = FULL, formats: tuple[str, ...] = tuple(FORMATS)
) -> Iterator[Values]:
    """What weight formats cost: plain graphs against the float32 one, on held-out text.

    Measured through the cache in chunks of 16.
    """
    model = OpenModel(source._replace(recall=None), text)
    for name in formats:
        folder = model.export(weights=FORMATS[name])
        session = DecodeSession(folder, capacity=model.windows.shape[1], all_positions=True)
        found = measure_quality(model.plain, session, model.windows)
        yield {
            "weights": name,
            "mib": file_mib(folder),
            "kl": found.kl_mean,
            "kl_p99": found.kl_p99,
            "top1": found.top1_agreement,
            "perplexity": found.perplexity,
        }
