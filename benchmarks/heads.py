"""KL of models without some of their kv heads, by how these are chosen; recall where the model has it.

    python benchmarks/heads.py [--groups 1,2,3]

In torch on 24 x 512 held-out tokens. `kl` measures each removal alone on calibration text, `fluctuation` is the
statistic, `taylor` the score by gradients, `magnitude` the norm of the head's columns of the output projection. Random
is the mean of 3 seeds, with the least and the most of them. "Refit" is with output projections fitted again, "zeros"
without the mean that stands for a head that went.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from subjects import Subject, subjects

from kvslim.methods import PruneHeads
from kvslim.methods.fitting import fit
from kvslim.methods.prune_heads import Heads, Loss
from kvslim.transform.codes import LayerCodes

SEEDS = range(3)


def main() -> None:
    """Prints one markdown table per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", default="1,2,3")
    counts = [int(text) for text in parser.parse_args().groups.split(",")]
    for subject in subjects():
        total = subject.spec.layers * subject.spec.kv_heads
        print(f"{subject.name[0].upper()}{subject.name[1:]}, of {total} kv heads:\n")
        print("| chosen by |" + "".join(f" KL without {count} | refit |" for count in counts))
        print("|---|" + "---:|---:|" * len(counts))
        ways = orders(subject)
        for name, losses in ways.items():
            print(f"| {name} |" + "".join(cells(subject, losses, count) for count in counts), flush=True)
        found = [codes_of(subject, ways["kl"][0], count) for count in counts]
        zeros = [subject.judge.kl(without_means(codes)) for codes in found]
        print("| kl, zeros |" + "".join(f" {value:.2g} | - |" for value in zeros))
        if subject.asked:
            recalls = [
                subject.judge.recall(subject.workshop.refitted(subject.statistics, codes), subject.items)
                for codes in found
            ]
            print("| recall of kl |" + "".join(f" - | {value:.0%} |" for value in recalls))
        print(flush=True)


def orders(subject: Subject) -> dict[str, list[Loss]]:
    """How heads are chosen, by name; random has several ways."""
    statistics = subject.statistics

    def measured(layer: int, gone: Heads) -> float:
        return subject.held_out.kl(subject.workshop.without(statistics, PruneHeads(heads={layer: gone})))

    def fluctuation(layer: int, gone: Heads) -> float:
        return float(statistics.fluctuation[layer, list(gone)].sum())

    def magnitude(layer: int, gone: Heads) -> float:
        return float(np.trace(statistics.output_gram[layer, gone[0] // subject.spec.group_size]))

    def random(seed: int) -> Loss:
        draws = np.random.default_rng(seed).random((subject.spec.layers, subject.spec.q_heads))
        return lambda layer, gone: float(draws[layer, gone[0]])

    gradients = subject.workshop.taylor(statistics)

    def taylor(layer: int, gone: Heads) -> float:
        return float(gradients[layer, list(gone)].sum())

    return {
        "kl": [measured],
        "fluctuation": [fluctuation],
        "taylor": [taylor],
        "magnitude": [magnitude],
        "random": [random(seed) for seed in SEEDS],
    }


def cells(subject: Subject, losses: list[Loss], count: int) -> str:
    """KL without and with refitted output projections."""
    found = [codes_of(subject, loss, count) for loss in losses]
    kinds: tuple[Callable[[tuple[LayerCodes, ...]], tuple[LayerCodes, ...]], ...] = (
        lambda codes: codes,
        lambda codes: subject.workshop.refitted(subject.statistics, codes),
    )
    values = [[subject.judge.kl(kind(codes)) for codes in found] for kind in kinds]
    print(f"{subject.name}: {count} {values}", file=sys.stderr)
    return "".join(f" {cell(kls)} |" for kls in values)


def cell(values: list[float]) -> str:
    """The mean, and behind it the range if there are several."""
    spread = f" ({min(values):.2g} - {max(values):.2g})" if len(values) > 1 else ""
    return f"{np.mean(values):.2g}{spread}"


def codes_of(subject: Subject, loss: Loss, count: int) -> tuple[LayerCodes, ...]:
    """The model's codes without the kv heads that are said to lose least."""
    method = PruneHeads(groups=count).chosen(subject.spec, loss)
    return fit(subject.spec, subject.statistics, method.decide(subject.spec, subject.statistics, subject.identity))


def without_means(codes: tuple[LayerCodes, ...]) -> tuple[LayerCodes, ...]:
    """The codes with nothing in the place of heads that went."""
    return tuple(
        code if code.mean_output is None else replace(code, mean_output=0.0 * code.mean_output) for code in codes
    )


if __name__ == "__main__":
    main()
