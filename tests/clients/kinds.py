"""One artifact of every shape of cache that a client may meet."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from models import open_workshop, recipe_of
from onnx import helper, numpy_helper

from kvslim.load.source import read_spec, resolve
from kvslim.methods import KvHdc, KvPca, KvQuant, KvWindow, Method
from kvslim.pipeline import decide
from kvslim.types import KVLayout, LayerPlan, Layout, ModelSpec, Plan, Weights

PRESENT = "present.{}.key"


@dataclass(frozen=True)
class Kind:
    """How an artifact is made: methods, weights, whether every layer has a rank of its own,
    how many coordinates are stored twice, and its operators.
    """

    methods: tuple[Method, ...] = ()
    weights: Weights = "fp32"
    rank_per_layer: bool = False
    refined: int = 0
    layout: Layout = "gqa"


HALF = KvPca(rank_ratio=0.5)
RING = KvWindow(window=16, sinks=2)
GAP = "a layer without cache"
KINDS: dict[str, Kind] = {
    "plain": Kind(),
    "kv_pca": Kind((HALF,)),
    "kv_quant": Kind((KvQuant(),)),
    "kv_quant, int4": Kind((KvQuant(bits=4),)),
    "kv_hdc, int4, refined": Kind((KvHdc(bits=4, granularity="per_channel"),), refined=8),
    "kv_pca + kv_quant": Kind((HALF, KvQuant())),
    "kv_window": Kind((RING,)),
    "kv_pca + kv_window + kv_quant": Kind((HALF, RING, KvQuant())),
    "int4 weights": Kind(weights="int4"),
    "a rank per layer": Kind((HALF,), rank_per_layer=True),
}
STANDARD = "layout attention24"
OTHER_LAYOUT = {STANDARD: Kind((KvPca(rank=8, value_rank=16),), layout="attention24")}


def make_artifact(model: Path | str, kind: Kind, folder: Path) -> Path:
    """All that a client reads of an artifact, made by the pipeline's stages without the measuring."""
    recipe = recipe_of(kind.methods, kind.weights).model_copy(update={"layout": kind.layout})
    workshop = open_workshop(model, recipe)
    statistics = workshop.statistics()
    plan = _rank_per_layer(workshop.spec) if kind.rank_per_layer else decide(workshop.recipe, workshop.spec, statistics)
    if kind.refined:
        sizes = {"rank": workshop.spec.head_dim - kind.refined, "refined": kind.refined}
        plan = plan.model_copy(update={"layers": tuple(layer.model_copy(update=sizes) for layer in plan.layers)})
    workshop.install(workshop.codes(statistics, plan))
    folder.mkdir()
    inputs = workshop.export(plan, folder)
    workshop.write_companions(folder, KVLayout.of(workshop.spec, plan), inputs)
    return folder


def _rank_per_layer(spec: ModelSpec) -> Plan:
    ranks = [8 * (1 + layer % (spec.head_dim // 8)) for layer in range(spec.layers)]
    return Plan(layers=tuple(LayerPlan(layer=layer, rank=rank) for layer, rank in enumerate(ranks)))


def drop_attention(plain: Path, folder: Path) -> None:
    """A copy of a plain artifact whose middle layer attends to nothing and has no cache.

    No method makes such a layer yet, so the graph is edited: the attention's output becomes 0. The gap stays in the
    numbers of the layers, and no other file needs a change.
    """
    spec = read_spec(resolve(str(plain)))
    shutil.copytree(plain, folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    _silence(model.graph, spec.layers // 2, spec.q_heads * spec.head_dim)
    onnx.save(model, folder / "model.onnx")


def _silence(graph: onnx.GraphProto, layer: int, width: int) -> None:
    node = next(node for node in graph.node if PRESENT.format(layer) in node.output)
    bounds = {"start": [0], "end": [width], "axis": [-1]}
    for name, value in bounds.items():
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), f"silent.{name}"))
    made = [
        helper.make_node("Slice", [node.input[0], *(f"silent.{name}" for name in bounds)], ["silent.query"]),
        helper.make_node("Sub", ["silent.query", "silent.query"], [node.output[0]]),
    ]
    place = list(graph.node).index(node)
    graph.node.remove(node)
    for offset, new in enumerate(made):
        graph.node.insert(place + offset, new)
    for values in (graph.input, graph.output):
        for value in [value for value in values if value.name.split(".")[1:2] == [str(layer)]]:
            values.remove(value)
