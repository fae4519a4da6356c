"""Ways to choose attention, feed-forward parts and blocks that go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import BRIEF, FULL
from kvslim.contract import Part
from kvslim.methods import PruneLayers
from kvslim.methods.prune_layers import INFLUENCES

Parts = Mapping[int, Part]
Loss = Callable[[Parts], float]
OPTIONS: dict[str, str] = {"attention": "attention", "mlps": "MLP", "blocks": "block"}
TABLE = Table(
    (
        Column("without", "without"),
        Column("chosen_by", "chosen by"),
        Column("layers", "layers"),
        Column("kl", "KL", ".2g"),
        Column("refit", "refit", ".2g"),
        Column("artifact", "artifact", ".2g"),
        Column("recall", "recall", ".0%"),
        Column("parameters", "parameters", ",d"),
        Column("bytes", "KV bytes per token", ",.0f"),
    )
)


@benchmark("demo", "books", table=TABLE, quick={"text": BRIEF, "parts": ("mlps",), "counts": (1,)})
def layers(
    source: Source,
    *,
    text: Mapping[str, Any] = FULL,
    parts: tuple[str, ...] = tuple(OPTIONS),
    counts: tuple[int, ...] = (1, 2),
) -> Iterator[Values]:
    """KL of models without attention, feed-forward parts or blocks, by how these are chosen.

    KL in torch on 24 x 512 held-out tokens; the first and the last layer keep everything. "Refit" is with the
    projections around what is gone fitted again. "Artifact" is what `kvslim compress` makes, refitted where that pays
    on calibration text, through its exported graph and its cache in chunks of 16; recall is of the same.
    """
    model = OpenModel(source, text)
    losses = {"KL": measured_loss(model), "block influence": influence_loss(model)}
    for option in parts:
        for count in counts:
            for score, loss in losses.items():
                method = PruneLayers.model_validate({option: count}).named_by(model.spec, loss)
                found = costs(model, method, through_artifact=score == "KL")
                yield {"without": f"{count} {OPTIONS[option]}", "chosen_by": score, **found}


def measured_loss(model: OpenModel) -> Loss:
    """KL of the model without some parts, each measured once for all counts."""
    known: dict[tuple[tuple[int, Part], ...], float] = {}

    def loss(parts: Parts) -> float:
        key = tuple(sorted(parts.items()))
        if key not in known:
            known[key] = model.held_out.kl(model.without(PruneLayers(layers=dict(parts))))
        return known[key]

    return loss


def influence_loss(model: OpenModel) -> Loss:
    """The sum of the influences of some parts."""
    influence = model.statistics.influence
    return lambda parts: float(sum(influence[layer, INFLUENCES.index(part)] for layer, part in parts.items()))


def costs(model: OpenModel, method: PruneLayers, *, through_artifact: bool) -> Values:
    """What is gone, KL without and with refitted projections and through the artifact, recall, and sizes."""
    codes = model.without(method)
    plan = method.decide(model.spec, model.statistics, model.identity)
    values: Values = {"layers": ", ".join(map(str, method.layers or ()))}
    values |= {"kl": model.kl(codes), "refit": model.kl(model.refitted(codes)), "artifact": None, "recall": None}
    if through_artifact:
        plan, _ = model.compensated(plan)
        found = model.measured(plan)
        values |= {"artifact": found.kl, "recall": found.recall}
    return values | {"parameters": model.parameters(plan), "bytes": model.size(plan)}
