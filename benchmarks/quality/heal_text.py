"""What a plan heals on: a text, or what the model writes itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import BRIEF, USUAL

METHODS = {"kv_pca": {"rank_ratio": 0.5}}, {"kv_hdc": {"bits": 4, "granularity": "per_channel"}}
TABLE = Table(
    (
        Column("trained", "trained on"),
        Column("windows", "windows, at most", ","),
        Column("before", "KL", ".3g"),
        Column("after", "healed", ".3g"),
        Column("share", "of it", ".2f"),
    )
)


@benchmark("books", table=TABLE, quick={"text": BRIEF, "steps": 2, "own": (4,)})
def heal_text(
    source: Source, *, text: Mapping[str, Any] = USUAL, steps: int = 40, own: tuple[int, ...] = (16, 64)
) -> Iterator[Values]:
    """What half the rank in int4 loses on other text, healed on a text, on less of it, or on what the model writes.

    Codes are fitted to the text in all cases, and projections are not fitted again. KL is that on the validation text.
    """
    model = OpenModel(source, text)
    written = source._replace(calibration="self")
    plan = model.decided(*METHODS)
    codes = model.codes(plan)
    before = model.kl(codes)
    for trained, windows, trainer in (
        ("text", 1024, model),
        *(("text", count, model) for count in own),
        *(("own samples", count, OpenModel(written, _with(text, count))) for count in own),
    ):
        healed, _ = trainer.healed(plan, codes, {"steps": steps, "samples": windows})
        after = model.kl(healed)
        share = after / before if before else None
        yield {"trained": trained, "windows": windows, "before": before, "after": after, "share": share}


def _with(text: Mapping[str, Any], samples: int) -> Mapping[str, Any]:
    return {**text, "calibration": {**text["calibration"], "samples": samples}}
