"""Ways to choose the heads of an encoder that go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.encoders import OpenEncoder
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from kvslim.contract import Part
from kvslim.methods import PruneHeads, PruneLayers
from kvslim.methods.prune_heads import Heads, Loss
from kvslim.validation.encoder import BATCH, answers, compare, encoder_costs

FULL = {"calibration": {"samples": 256, "length": 128}, "validation": {"samples": 200, "length": 128}}
BRIEF = {"calibration": {"samples": 16, "length": 48}, "validation": {"samples": 8, "length": 48}}
TABLE = Table(
    (
        Column("removed", "removed"),
        Column("chosen_by", "chosen by"),
        Column("cosine", "cosine, mean", ".4f"),
        Column("correlation", "rank correlation", ".4f"),
        Column("mib", "files, MiB", ".1f"),
        Column("latency", "latency, ratio", ".2f"),
    )
)
Cost = Callable[[Path], float]


@benchmark(
    "minilm",
    table=TABLE,
    quick={"text": BRIEF, "shares": (0.25,), "layers": (), "seeds": 1, "length": 48, "repeats": 3},
)
def encoder_heads(
    source: Source,
    *,
    text: Mapping[str, Any] = FULL,
    shares: tuple[float, ...] = (0.1, 0.25, 0.5),
    layers: tuple[int, ...] = (1, 2),
    seeds: int = 3,
    length: int = 128,
    repeats: int = 24,
) -> Iterator[Values]:
    """A sentence encoder without some heads, or without the attention of some layers, by how these are chosen.

    fp32 graphs in onnxruntime on 200 held-out sentences. Output projections are as they were, but in the rows that say
    refitted. `measured` takes what loses least alone, `fluctuation` is the statistic; random is the mean of seeds,
    with the least and the most of them. Latency is for one text, in turns with the plain graph.
    """
    model = OpenEncoder(source, text)
    losses, total = losses_of(model, seeds), model.spec.layers * model.spec.q_heads

    def latency(slim: Path) -> float:
        costs = encoder_costs({"plain": model.plain, "slim": slim}, [length], repeats)
        plain, found = (costs[name].latency_ms or {} for name in ("plain", "slim"))
        return found[str(length)] / plain[str(length)]

    yield {"removed": "nothing", "chosen_by": None, "latency": 1.0, **quality(model, [model.plain])}
    for share in shares:
        removed, count = f"{share:.0%} of {total} heads", round(share * total)
        for name, some in losses.items():
            graphs = [model.export(PruneHeads(groups=count).named_by(model.spec, loss)) for loss in some]
            yield {"removed": removed, "chosen_by": name, "latency": None, **quality(model, graphs)}
        method = PruneHeads(groups=count).named_by(model.spec, losses["measured"][0])
        graph = model.export(method, refitted=True)
        yield {
            "removed": removed,
            "chosen_by": "measured, refitted",
            "latency": latency(graph),
            **quality(model, [graph]),
        }
    for count in layers:
        removed = f"the attention of {count} of {model.spec.layers} layers"
        for name, some in losses.items():
            graphs = [model.export(without_layers(model, name, loss, count)) for loss in some]
            ratio = latency(graphs[0]) if name == "measured" else None
            yield {"removed": removed, "chosen_by": name, "latency": ratio, **quality(model, graphs)}


def losses_of(model: OpenEncoder, seeds: int) -> dict[str, list[Loss]]:
    """How heads are chosen, by name: the loss of removing some from a layer."""

    @cache
    def measured(layer: int, gone: Heads) -> float:
        return model.loss(PruneHeads(heads={layer: gone}))

    def fluctuation(layer: int, gone: Heads) -> float:
        return float(model.statistics.fluctuation[layer, list(gone)].sum())

    def random(seed: int) -> Loss:
        draws = np.random.default_rng(seed).random((model.spec.layers, model.spec.q_heads))
        return lambda layer, gone: float(draws[layer, list(gone)].mean())

    return {"measured": [measured], "fluctuation": [fluctuation], "random": [random(seed) for seed in range(seeds)]}


def without_layers(model: OpenEncoder, name: str, loss: Loss, count: int) -> PruneLayers:
    """The attention of the layers that are said to lose least; measured one by one."""
    every = tuple(range(model.spec.q_heads))

    def of_layers(gone: Mapping[int, Part]) -> float:
        if name == "measured":
            return model.loss(PruneLayers(layers=dict(gone)))
        return sum(loss(layer, every) for layer in gone)

    return PruneLayers(attention=count).named_by(model.spec, of_layers)


def quality(model: OpenEncoder, graphs: list[Path]) -> Values:
    """Of one graph the numbers, of several a tuple of them."""
    found = [compare(model.reference, answers(graph, model.held_out, BATCH)) for graph in graphs]
    keys = {"cosine": "embedding_cosine_mean", "correlation": "retrieval_rank_correlation"}
    values: Values = {name: tuple(one[key] for one in found) for name, key in keys.items()}
    values = {name: several if len(graphs) > 1 else several[0] for name, several in values.items()}
    size = np.mean([(graph / "model.onnx_data").stat().st_size for graph in graphs])
    return {**values, "mib": float(size) / 2**20}
