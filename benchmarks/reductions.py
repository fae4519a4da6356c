"""What each way to remove or share costs by itself, and what the planner makes of all of them at 16 times fewer bytes.

    python benchmarks/reductions.py [--ratio 16]

The demo, a model of English prose if it lies beside the checkout, and a model with a kv head for every query head. KL
is that of the exported graphs on held-out text, through their caches in chunks of 16; "bare" is without compensation,
"KL" with it where it pays on calibration text.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from subjects import LENGTH, MHA, Measured, Subject, of_stories, subjects

from kvslim.methods import ClusterHeads, Method, PruneHeads, PruneLayers, ShareKv
from kvslim.pipeline import decide
from kvslim.plan.planner import Planned
from kvslim.types import LayerPlan


def main() -> None:
    """Prints two markdown tables per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=16)
    ratio = parser.parse_args().ratio
    for subject in (*subjects(), of_stories("a model of 8 heads on 8 kv heads, on stories", str(MHA))):
        print(f"{subject.name[0].upper()}{subject.name[1:]}:\n")
        print("| method | KV bytes per token | file MiB | KL, bare | KL | same token | recall |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        for name, method in methods(subject):
            print(f"| {name} |{_alone(subject, method)}", flush=True)
        print(f"\nAll of them, at {ratio:g} times fewer bytes:\n")
        print("| plan made of | smaller by | expected KL | KL | same token | recall |")
        print("|---|---:|---:|---:|---:|---:|")
        for name, planned in plans(subject, ratio):
            print(f"| {name} |{_planned(subject, planned)}", flush=True)
        print(flush=True)


def methods(subject: Subject) -> Iterator[tuple[str, Method]]:
    """Each method with the least of what it can take, or about a sixth."""
    spec = subject.spec
    heads = max(1, spec.layers * spec.kv_heads // 6)
    yield f"`prune_heads`, {heads} of {spec.layers * spec.kv_heads} kv heads", PruneHeads(groups=heads)
    yield "`prune_layers`, 1 attention", PruneLayers(attention=1)
    yield "`prune_layers`, 1 MLP", PruneLayers(mlps=1)
    yield "`prune_layers`, 1 block", PruneLayers(blocks=1)
    yield "`share_kv`, 1 layer", ShareKv(layers=1)
    yield "`cluster_heads`, half of the heads attend in 3 layers", ClusterHeads(fraction=0.5, count=3)


def plans(subject: Subject, ratio: float) -> Iterator[tuple[str, Planned]]:
    """The planner's plans of each kind of ways, and the one that it takes."""
    planner, seen = subject.planner, set()
    budget = planner.plain_bytes / ratio
    for ways in planner.ways[4]:
        layers = planner._filled(budget, ways)
        if layers is not None and layers not in seen:
            seen.add(layers)
            yield made_of(layers), planner._planned(layers)
    yield "**the planner's choice**", subject.planned(ratio)


def made_of(layers: Sequence[LayerPlan]) -> str:
    """What a plan uses, in words."""
    windows = {layer.window for layer in layers} - {None}
    gone = sum(layer.heads is not None for layer in layers)
    shared = sum(layer.donor is not None for layer in layers)
    parts = ["ranks and bits"]
    parts += [f"windows of {windows.pop()}"] if windows else []
    parts += [f"heads removed in {gone} layers"] if gone else []
    parts += [f"{shared} shared caches"] if shared else []
    return ", ".join(parts)


def _alone(subject: Subject, method: Method) -> str:
    shop, held_out = subject.workshop, subject.held_out
    chosen = shop._measured(method, subject.statistics, held_out)
    recipe = subject.recipe.model_copy(update={"methods": (chosen,)})
    plan = decide(recipe, subject.spec, subject.statistics)
    refitted, _ = shop.compensated(subject.statistics, held_out, plan)
    bare = subject.judge.kl(shop.codes(subject.statistics, plan))
    measured = subject.measured(refitted)
    return f" {subject.size(plan):,.0f} | {measured.mib:.1f} | {bare:.2g} |{_quality(measured)}"


def _planned(subject: Subject, planned: Planned) -> str:
    plan, expected = subject.workshop.compensated(subject.statistics, subject.held_out, planned.plan)
    ratio = subject.size(subject.identity) / subject.size(plan, LENGTH)
    return f" {ratio:.2f} | {expected:.2g} |{_quality(subject.measured(plan))}"


def _quality(measured: Measured) -> str:
    recall = "-" if measured.recall is None else f"{measured.recall:.0%}"
    return f" {measured.kl:.2g} | {measured.top1:.1%} | {recall} |"


if __name__ == "__main__":
    main()
