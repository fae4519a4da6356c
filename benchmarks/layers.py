"""KL of models without attention, feed-forward parts or blocks, by how these are chosen, with and without compensation.

    python benchmarks/layers.py [--counts 1,2]

KL in torch on 24 x 512 held-out tokens; the first and the last layer keep everything. "Refit" is with the projections
around what is gone fitted again. "Artifact" is what `kvslim compress` makes, refitted where that pays on calibration
text, through its exported graph and its cache in chunks of 16; recall is of the same, where the model has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from subjects import Subject, subjects

from kvslim.methods import PruneLayers
from kvslim.methods.prune_layers import INFLUENCES
from kvslim.transform.surgery import layer_modules
from kvslim.types import Part, Plan

Parts = Mapping[int, Part]
OPTIONS: dict[str, str] = {"attention": "attention", "mlps": "MLP", "blocks": "block"}
HEADER = "| without | chosen by | layers | KL | refit | artifact | recall | parameters, millions | KV bytes per token |"


def main() -> None:
    """Prints one markdown table per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", default="1,2")
    counts = [int(text) for text in parser.parse_args().counts.split(",")]
    for subject in subjects():
        measured = divergences(subject)
        print(f"{subject.name[0].upper()}{subject.name[1:]}, of {subject.spec.layers} layers:\n")
        print(f"{HEADER}\n|---|---|---|{'---:|' * 6}")
        for option, name in OPTIONS.items():
            for count in counts:
                for score, losses in (("KL", measured), ("block influence", influences(subject))):
                    chosen = PruneLayers.model_validate({option: count}).chosen(subject.spec, losses)
                    shown = f"| {count} {name} | {score} |"
                    print(shown + cells(subject, chosen, through_artifact=score == "KL"), flush=True)
        print(flush=True)


def divergences(subject: Subject) -> Callable[[Parts], float]:
    """KL of the model without some parts, each measured once for all counts."""
    known: dict[tuple[tuple[int, Part], ...], float] = {}

    def divergence(parts: Parts) -> float:
        key = tuple(sorted(parts.items()))
        if key not in known:
            method = PruneLayers(layers=dict(parts))
            known[key] = subject.held_out.kl(subject.workshop.without(subject.statistics, method))
        return known[key]

    return divergence


def influences(subject: Subject) -> Callable[[Parts], float]:
    """The sum of the influences of some parts."""
    influence = subject.statistics.influence
    return lambda parts: float(sum(influence[layer, INFLUENCES.index(part)] for layer, part in parts.items()))


def cells(subject: Subject, method: PruneLayers, *, through_artifact: bool) -> str:
    """What is gone, KL without and with refitted projections and through the artifact, recall, and sizes."""
    codes = subject.workshop.without(subject.statistics, method)
    again = subject.workshop.refitted(subject.statistics, codes)
    plan = method.decide(subject.spec, subject.statistics, subject.identity)
    row = [", ".join(map(str, method.layers or ())), *(f"{subject.judge.kl(kind):.2g}" for kind in (codes, again))]
    if through_artifact:
        plan, _ = subject.workshop.compensated(subject.statistics, subject.held_out, plan)
        measured = subject.measured(plan)
        row += [f"{measured.kl:.2g}", "-" if measured.recall is None else f"{measured.recall:.0%}"]
    else:
        row += ["-", "-"]
    row += [f"{parameters(subject, plan) / 1e6:.2f}", f"{subject.size(plan):,.0f}"]
    return "".join(f" {cell} |" for cell in row)


def parameters(subject: Subject, plan: Plan) -> int:
    """Numbers in the weights of the parts that stay."""
    model, architecture = subject.workshop.model, subject.workshop.architecture
    count = sum(weight.numel() for weight in model.parameters())
    for layer, module in zip(plan.layers, layer_modules(model, architecture), strict=True):
        names = (() if layer.mlp else architecture.mlp) + ((architecture.attention,) if layer.heads == () else ())
        count -= sum(weight.numel() for name in names for weight in module.get_submodule(name).parameters())
    return count


if __name__ == "__main__":
    main()
