"""Balanced truncation against key PCA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import BRIEF, FULL

TABLE = Table(
    (
        Column("rank", "rank"),
        Column("balanced", "KL, balanced", ".2g"),
        Column("key", "KL, key", ".2g"),
        Column("ratio", "ratio", ".2f"),
    )
)


@benchmark("demo", table=TABLE, quick={"text": BRIEF, "ranks": (8,)})
def objective(
    source: Source, *, text: Mapping[str, Any] = FULL, ranks: tuple[int, ...] = (16, 32, 48)
) -> Iterator[Values]:
    """Balanced truncation against plain key PCA at equal rank, the cache in float32.

    KL of the exported graphs on held-out text, through their caches in chunks of 16.
    """
    model = OpenModel(source._replace(recall=None), text)
    for rank in ranks:
        kls = {
            name: model.measured(model.decided({"kv_pca": {"rank": rank, "objective": name}})).kl
            for name in ("balanced", "key")
        }
        yield {"rank": rank, **kls, "ratio": kls["balanced"] / kls["key"]}
