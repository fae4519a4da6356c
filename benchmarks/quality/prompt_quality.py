"""What a cache costs by how many tokens of a text come at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.speed.first_token import CACHES
from benchmarks.subjects import Source
from benchmarks.texts import BRIEF, LENGTH, USUAL

TABLE = Table(
    (Column("cache", "cache"),),
    pivot="at_once",
    each=(Column("kl", "{} at once", ".4g"),),
    format="",
)


@benchmark("smollm2", table=TABLE, quick={"text": BRIEF, "names": ("int8",), "pieces": (16, 48)})
def prompt_quality(
    source: Source,
    *,
    text: Mapping[str, Any] = USUAL,
    names: tuple[str, ...] = tuple(CACHES),
    pieces: tuple[int, ...] = (16, 64, LENGTH),
) -> Iterator[Values]:
    """KL to the plain graph, both reading held-out text so many tokens at once; the last column is one whole prompt.

    Up to 16 new tokens go to onnxruntime's operator over integers, more to the branch for prompts.
    """
    model = OpenModel(source._replace(recall=None), text)
    for name in names:
        kl = model.measured_in_pieces(model.decided(*CACHES[name]), pieces)
        for at_once, value in kl.items():
            yield {"cache": name, "at_once": f"{at_once:,}", "kl": value}
