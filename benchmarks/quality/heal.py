"""What training for minutes takes off the KL of compressed caches, and of models without some of their parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.models import OpenModel
from benchmarks.plans import sharing_plan
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Plot, Table, per_subject
from benchmarks.rows import Row
from benchmarks.subjects import Source
from benchmarks.texts import BRIEF
from kvslim.contract import ModelSpec
from kvslim.types import Plan

TEXT = {
    "calibration": {"samples": 16, "length": 512, "context": 512},
    "validation": {"samples": 8, "length": 512, "recall_items": 100, "recall_distance": 320},
}
CODES: dict[str, tuple[Mapping[str, Any], ...]] = {
    "8 times, int4": ({"kv_hdc": {"bits": 4, "granularity": "per_channel"}},),
    "16 times, rank 32 and int4": (
        {"kv_pca": {"rank_ratio": 0.5}},
        {"kv_hdc": {"bits": 4, "granularity": "per_channel"}},
    ),
}
REMOVED = (
    "a tenth of the layers without attention",
    "a third of the caches shared",
    "a ninth of the kv heads gone",
    "MLPs a fifth narrower",
)
PLANS = (*CODES, *REMOVED)
WHEN = "before", "after"
BY_PLAN = Table(
    (
        Column("plan", "plan"),
        Column("steps", "steps"),
        Column("same_before", "KL, text as trained on", ".3g"),
        Column("same_after", "healed", ".3g"),
        Column("other_before", "KL, other text", ".3g"),
        Column("other_after", "healed ", ".3g"),
        Column("share", "of it", ".2f"),
        Column("graph_before", "KL of the graph", ".3g"),
        Column("graph_after", "healed  ", ".3g"),
        Column("recall_before", "recall", ".0%"),
        Column("recall_after", "healed   ", ".0%"),
    )
)
BY_STEP = Table((Column("step", "steps"),), pivot="name", each=(Column("watched", "KL, {}", ".3g"),), format="")
PLOT = Plot(
    x=("passed", "minutes"),
    ys={"watched": "mean KL, nats per token"},
    name="name",
    styles={name: f"{style}-" for name, style in zip(PLANS, ".sd^xo", strict=True)},
    logarithmic=frozenset({"watched"}),
)


def tables(rows: Sequence[Row]) -> str:
    """Plans before and after, then the KL as each training went on."""
    return per_subject(rows, _tables_of_subject)


def _tables_of_subject(rows: Sequence[Row]) -> str:
    plans, steps = ([row for row in rows if key in row.values] for key in ("plan", "step"))
    return f"{BY_PLAN(plans)}\nAs it went on:\n\n{BY_STEP(steps)}"


@benchmark(
    "smollm2",
    table=tables,
    plot=PLOT,
    quick={"text": BRIEF, "steps": 2, "names": (PLANS[0], REMOVED[1]), "exported": PLANS[:1]},
)
def heal(
    source: Source,
    *,
    text: Mapping[str, Any] = TEXT,
    steps: int = 40,
    names: tuple[str, ...] = PLANS,
    exported: tuple[str, ...] = tuple(CODES),
) -> Iterator[Values]:
    """What minutes of training take off the KL of plans, on text of the kind trained on and on another.

    Trained on an encyclopedia, 1,024 tokens a step. "Text as trained on" is a part of it that the training never saw;
    other text is prose. Both are in torch. KL of the graph, and recall, are those of the exported graphs of coded
    caches on the prose, in chunks of 16. Projections are fitted again before, where that pays. A training that is on
    the disk from an earlier run is not repeated.
    """
    model = OpenModel(source, text)
    for name in names:
        plan, _ = model.compensated(_plan_of(model, name))
        codes = model.codes(plan)
        healed, found = model.healed(plan, codes, {"steps": steps})
        before, after = (model.kl(each) for each in (codes, healed))
        graphs = [model.measured(plan, each) for each in (codes, healed)] if name in exported else []
        kls, recalls = ([getattr(each, what) for each in graphs] or [None, None] for what in ("kl", "recall"))
        yield {
            "plan": name,
            "steps": found.steps,
            "same_before": found.kl_before,
            "same_after": found.kl_after,
            "other_before": before,
            "other_after": after,
            "share": after / before if before else None,
            **{f"graph_{when}": kl for when, kl in zip(WHEN, kls, strict=True)},
            **{f"recall_{when}": recall for when, recall in zip(WHEN, recalls, strict=True)},
        }
        for look in found.watched:
            yield {"name": name, "step": look.step, "passed": look.seconds / 60, "watched": look.kl}


def _plan_of(model: OpenModel, name: str) -> Plan:
    if name in CODES:
        return model.decided(*CODES[name])
    return {
        REMOVED[0]: lambda: model.decided({"prune_layers": _tenth(model.spec)}),
        REMOVED[1]: lambda: sharing_plan(model.spec, every=3),
        REMOVED[2]: lambda: model.decided({"prune_heads": _third(model.spec)}),
        REMOVED[3]: lambda: model.decided({"prune_mlp": {"ratio": 0.2, "score": "alike"}}),
    }[name]()


def _tenth(spec: ModelSpec) -> Mapping[str, Any]:
    """Chosen by a statistic, as measuring each would take longer than all the rest."""
    return {"attention": max(1, spec.layers // 10), "score": "block_influence"}


def _third(spec: ModelSpec) -> Mapping[str, Any]:
    """As many as a third of the layers, likewise."""
    return {"groups": max(1, spec.layers // 3), "score": "fluctuation"}
