"""KL of models without the attention of some layers, by how these are chosen; recall where the model has it.

    python benchmarks/layers.py [--layers 1,2]

In torch on 24 x 512 held-out tokens; the first and the last layer keep theirs. `greedy` measures again after
each removal, `alone` measures each layer once, random is the mean of 3 seeds. "Refit" is with output projections fitted
again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import numpy as np
from subjects import Subject, subjects

from kvslim.methods import PruneLayers
from kvslim.transform.codes import LayerCodes

SEEDS = range(3)
Layers = tuple[int, ...]
Divergence = Callable[[Layers], float]


def main() -> None:
    """Prints one markdown table per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", default="1,2")
    counts = [int(text) for text in parser.parse_args().layers.split(",")]
    for subject in subjects():
        print(f"{subject.name[0].upper()}{subject.name[1:]}, of {subject.spec.layers} layers:\n")
        print("| chosen by |" + "".join(f" KL without {count} | refit | recall |" for count in counts))
        print("|---|" + "---:|---:|---:|" * len(counts))
        for name in ("greedy", "alone", "random"):
            print(f"| {name} |" + "".join(cells(subject, name, count) for count in counts), flush=True)
        print(flush=True)


def cells(subject: Subject, name: str, count: int) -> str:
    """KL without and with refitted output projections, and recall with."""
    found = [codes_of(subject, layers) for layers in chosen(subject, name, count)]
    again = [subject.workshop.refitted(subject.statistics, codes) for codes in found]
    values = [np.mean([subject.judge.kl(codes) for codes in kind]) for kind in (found, again)]
    recall = np.mean([subject.judge.recall(codes, subject.items) for codes in again]) if subject.asked else None
    return "".join(f" {value:.2g} |" for value in values) + (" - |" if recall is None else f" {recall:.0%} |")


def chosen(subject: Subject, name: str, count: int) -> Iterator[Layers]:
    """The layers that lose their attention, once or by seed."""
    method = PruneLayers(attention=count)
    if name != "random":
        measured: Divergence = lambda gone: subject.held_out.kl(codes_of(subject, gone))  # noqa: E731
        once: Divergence = lambda gone: measured(gone[-1:])  # noqa: E731
        yield method.chosen(subject.spec, measured if name == "greedy" else once, iter).layers or ()
        return
    free = np.arange(method.protect, subject.spec.layers - method.protect)
    for seed in SEEDS:
        yield tuple(np.random.default_rng(seed).choice(free, count, replace=False).tolist())


def codes_of(subject: Subject, layers: Layers) -> tuple[LayerCodes, ...]:
    """The model without the attention of these layers."""
    return subject.workshop.without(subject.statistics, dict.fromkeys(layers, tuple(range(subject.spec.q_heads))))


if __name__ == "__main__":
    main()
