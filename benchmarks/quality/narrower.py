"""What narrower feed-forward parts give within a limit of time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import BRIEF

TEXT = {
    "calibration": {"samples": 16, "length": 512, "context": 2048},
    "validation": {"samples": 4, "length": 512, "recall_items": 40, "recall_distance": 320},
}
TABLE = Table(
    (
        Column("ratio", "time ratio", ".2f"),
        Column("whole", "whole parts: KL", ".2g"),
        Column("kl", "with narrower ones: KL", ".2g"),
        Column("layers", "layers narrower"),
        Column("whole_other", "whole, other text: KL", ".2g"),
        Column("other", "narrower, other text: KL", ".2g"),
    )
)


@benchmark("smollm2", table=TABLE, quick={"text": BRIEF, "ratios": (0.9,)})
def narrower(
    source: Source, *, text: Mapping[str, Any] = TEXT, ratios: tuple[float, ...] = (0.85, 0.8, 0.75, 0.7, 0.65)
) -> Iterator[Values]:
    """What plans within a limit of time lose, all feed-forward parts whole or some of them narrower.

    Weights are float32, and projections are not fitted again. KL is that of the planner's text, and of another.
    """
    model = OpenModel(source, text)
    for ratio in ratios:
        planner = model.planner_within(ratio)
        found, whole = planner.within_time(), planner.within_time(narrower=False)
        yield {
            "ratio": ratio,
            "whole": None if whole is None else whole.point.kl,
            "kl": None if found is None else found.point.kl,
            "layers": None if found is None else sum(layer.mlp_width is not None for layer in found.plan.layers),
            "whole_other": None if whole is None else model.kl(model.codes(whole.plan)),
            "other": None if found is None else model.kl(model.codes(found.plan)),
        }
