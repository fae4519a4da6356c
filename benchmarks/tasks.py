"""One recipe calibrated on two tasks of the demo's world: which heads each keeps, and what that costs on either.

    python benchmarks/tasks.py [--groups 3] [--items 200]

`questions` are stories with a question, of which the answer alone counts; `stories` go on without one. KL of the model
without the kv heads that lose least on one task, output projections refitted on its text, on held-out text of both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from kvslim.calibrate.corpus import counted_windows, text_windows
from kvslim.demo.world import calibration_text, recall_questions
from kvslim.load.source import read_spec, resolve
from kvslim.methods import PruneHeads
from kvslim.methods.fitting import fit
from kvslim.progress import Silent
from kvslim.recipe import parse_recipe
from kvslim.transform.codes import LayerCodes
from kvslim.transform.judge import Judge
from kvslim.types import Plan
from kvslim.workshop import Workshop

DISTANCE = 160  # tokens from a fact to its question: a window holds several
LENGTH, SAMPLES = 512, 64


def main() -> None:
    """Prints a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--items", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        texts = {
            part: write_tasks(Path(folder), part, arguments.items, seed)
            for seed, part in enumerate(("fit", "held-out"))
        }
        print("| calibrated on | kv heads removed | KL on questions | KL on stories |")
        print("|---|---|---:|---:|")
        for task, source in texts["fit"].items():
            workshop = opened(source)
            codes, removed = pruned(workshop, arguments.groups)
            kls = [divergence(workshop, codes, other) for other in texts["held-out"].values()]
            print(f"| {task} | {removed} | " + " | ".join(f"{kl:.2g}" for kl in kls) + " |", flush=True)


def write_tasks(folder: Path, part: str, count: int, seed: int) -> dict[str, Path]:
    """Files of both tasks, by name."""
    paths = {"questions": folder / f"{part}.jsonl", "stories": folder / f"{part}.txt"}
    questions = recall_questions(count, DISTANCE, lambda text: len(text.split()), seed)
    records = ({"prompt": item.prompt, "completion": item.answer} for item in questions)
    paths["questions"].write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    stories = calibration_text(count, words=DISTANCE, seed=seed)
    paths["stories"].write_text("\n\n".join(stories), encoding="utf-8")
    return paths


def opened(source: Path) -> Workshop:
    """The demo model with a recipe that is calibrated on a file."""
    calibration = {"source": str(source), "samples": SAMPLES, "length": LENGTH}
    snapshot = resolve("demo")
    recipe = parse_recipe({"name": "tasks", "calibration": calibration}, where="benchmark")
    return Workshop(snapshot, read_spec(snapshot), recipe, Silent())


def pruned(workshop: Workshop, groups: int) -> tuple[tuple[LayerCodes, ...], str]:
    """Codes without the kv heads that lose least, refitted, and what went, in words."""
    statistics, spec = workshop.statistics(), workshop.spec
    held_out = workshop.held_out_judge(statistics)
    method = PruneHeads(groups=groups).chosen(
        spec, lambda layer, gone: held_out.kl(workshop.without(statistics, PruneHeads(heads={layer: gone})))
    )
    plan = method.decide(spec, statistics, Plan.identity(spec))
    words = (
        f"{layer.layer}: {', '.join(str(head) for head in range(spec.kv_heads) if head not in layer.kv_heads(spec))}"
        for layer in plan.layers
        if layer.heads is not None
    )
    return workshop.refitted(statistics, fit(spec, statistics, plan)), "; ".join(f"layer {word}" for word in words)


def divergence(workshop: Workshop, codes: tuple[LayerCodes, ...], source: Path) -> float:
    """KL on a task's held-out text."""
    windows, counted = (
        part(str(source), workshop.tokenizer, samples=SAMPLES // 2, length=LENGTH)
        for part in (text_windows, counted_windows)
    )
    return Judge(workshop.model, workshop.architecture, windows, counted).kl(codes)


if __name__ == "__main__":
    main()
