"""Heads that two tasks of the demo's world keep."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.models import Codes, OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from kvslim.demo.world import calibration_text, recall_questions
from kvslim.methods import PruneHeads
from kvslim.types import Plan

DISTANCE = 160  # tokens from a fact to its question: a window holds several
TABLE = Table(
    (
        Column("calibrated_on", "calibrated on"),
        Column("removed", "kv heads removed"),
        Column("kl_questions", "KL on questions", ".2g"),
        Column("kl_stories", "KL on stories", ".2g"),
    )
)


@benchmark("demo", table=TABLE, quick={"groups": 1, "items": 12, "samples": 8, "length": 64})
def tasks(
    source: Source, *, groups: int = 3, items: int = 200, samples: int = 64, length: int = 512
) -> Iterator[Values]:
    """One recipe calibrated on two tasks of the demo's world: which heads each keeps, and what that costs on either.

    `questions` are stories with a question, of which the answer alone counts; `stories` go on without one. KL of the
    model without the kv heads that lose least on one task, output projections refitted on its text, on held-out text
    of both.
    """
    fitting, held_out = (write_tasks(source.folder, part, items, seed) for seed, part in enumerate(("fit", "held-out")))
    for task, path in fitting.items():
        calibration = {"samples": samples, "length": length}
        model = OpenModel(source._replace(calibration=str(path)), {"calibration": calibration})
        plan, codes = pruned(model, groups)
        kls = {f"kl_{on}": model.kl_on(codes, other, samples // 2, length) for on, other in held_out.items()}
        yield {"calibrated_on": task, "removed": words(model, plan), **kls}


def write_tasks(folder: Path, part: str, count: int, seed: int) -> dict[str, Path]:
    """Files of both tasks, by name."""
    paths = {"questions": folder / f"{part}.jsonl", "stories": folder / f"{part}.txt"}
    questions = recall_questions(count, DISTANCE, lambda text: len(text.split()), seed)
    records = ({"prompt": item.prompt, "completion": item.answer} for item in questions)
    paths["questions"].write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    stories = calibration_text(count, words=DISTANCE, seed=seed)
    paths["stories"].write_text("\n\n".join(stories), encoding="utf-8")
    return paths


def pruned(model: OpenModel, groups: int) -> tuple[Plan, Codes]:
    """The plan without the kv heads that lose least, and its codes, refitted."""
    method = model.measured_method(PruneHeads(groups=groups))
    plan = method.decide(model.spec, model.statistics, model.identity)
    return plan, model.refitted(model.codes(plan))


def words(model: OpenModel, plan: Plan) -> str:
    """The kv heads that went."""
    gone = {
        layer.layer: sorted(set(range(model.spec.kv_heads)) - set(layer.kv_heads(model.spec)))
        for layer in plan.layers
        if layer.heads is not None
    }
    return "; ".join(f"layer {layer}: {', '.join(map(str, heads))}" for layer, heads in gone.items())
