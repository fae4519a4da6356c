"""Ways to choose the kv heads that go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.models import Codes, OpenModel
from benchmarks.plans import without_means
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import BRIEF, FULL
from kvslim.methods import PruneHeads
from kvslim.methods.prune_heads import Heads, Loss

SEEDS = range(3)
TABLE = Table(
    (Column("chosen_by", "chosen by"),),
    pivot="heads",
    each=(Column("kl", "KL without {}", ".2g"), Column("refit", "refit", ".2g"), Column("recall", "recall", ".0%")),
)


@benchmark("demo", "books", table=TABLE, quick={"text": BRIEF, "counts": (1,)})
def heads(source: Source, *, text: Mapping[str, Any] = FULL, counts: tuple[int, ...] = (1, 2, 3)) -> Iterator[Values]:
    """KL of models without some of their kv heads, by how these are chosen.

    In torch on 24 x 512 held-out tokens. `kl` measures each removal alone on calibration text, `fluctuation` is the
    statistic, `taylor` the score by gradients, `magnitude` the norm of the head's columns of the output projection.
    Random is the mean of 3 seeds, with the least and the most of them. "Refit" and recall are with output projections
    fitted again, "zeros" without the mean that stands for a head that went.
    """
    model = OpenModel(source, text)
    losses = losses_of(model)
    for count in counts:
        for name, orders in losses.items():
            found = [codes_without(model, order, count) for order in orders]
            again = [model.refitted(codes) for codes in found]
            kl, refit = (tuple(model.kl(codes) for codes in some) for some in (found, again))
            recall = model.recall(again[0]) if name == "kl" else None
            yield {"chosen_by": name, "heads": count, "kl": one(kl), "refit": one(refit), "recall": recall}
        zeros = model.kl(without_means(codes_without(model, losses["kl"][0], count)))
        yield {"chosen_by": "kl, zeros", "heads": count, "kl": zeros, "refit": None, "recall": None}


def losses_of(model: OpenModel) -> dict[str, list[Loss]]:
    """How heads are chosen, by name; random has several orders."""
    statistics, spec, gradients = model.statistics, model.spec, model.taylor()

    def measured(layer: int, gone: Heads) -> float:
        return model.held_out.kl(model.without(PruneHeads(heads={layer: gone})))

    def fluctuation(layer: int, gone: Heads) -> float:
        return float(statistics.fluctuation[layer, list(gone)].sum())

    def magnitude(layer: int, gone: Heads) -> float:
        return float(np.trace(statistics.output_gram[layer, gone[0] // spec.group_size]))

    def taylor(layer: int, gone: Heads) -> float:
        return float(gradients[layer, list(gone)].sum())

    def random(seed: int) -> Loss:
        draws = np.random.default_rng(seed).random((spec.layers, spec.q_heads))
        return lambda layer, gone: float(draws[layer, gone[0]])

    return {
        "kl": [measured],
        "fluctuation": [fluctuation],
        "taylor": [taylor],
        "magnitude": [magnitude],
        "random": [random(seed) for seed in SEEDS],
    }


def codes_without(model: OpenModel, loss: Loss, count: int) -> Codes:
    """The model without the kv heads that are said to lose least."""
    return model.without(PruneHeads(groups=count).named_by(model.spec, loss))


def one(values: tuple[float, ...]) -> float | tuple[float, ...]:
    """A single value as a number."""
    return values if len(values) > 1 else values[0]
