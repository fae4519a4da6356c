"""One artifact of every shape of cache that a client may meet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from support.models import open_prepared, recipe_of

from kvslim.caches import FullCache
from kvslim.contract import Layout, ModelSpec
from kvslim.methods import KvHdc, KvPca, KvQuant, KvWindow, Method, PruneHeads, ShareKv
from kvslim.planning.decide import decide
from kvslim.types import KVLayout, LayerPlan, Plan
from kvslim.weight_format import Weights


@dataclass(frozen=True)
class Kind:
    """How an artifact is made: methods, weights, whether every layer has a rank of its own,
    how many coordinates are stored twice, and its operators.
    """

    methods: tuple[Method, ...] = ()
    weights: Weights = "fp32"
    rank_per_layer: bool = False
    residual: int = 0
    layout: Layout = "gqa"


HALF = KvPca(rank_ratio=0.5)
RING = KvWindow(window=16, sinks=2)
KINDS: dict[str, Kind] = {
    "plain": Kind(),
    "kv_pca": Kind((HALF,)),
    "kv_quant": Kind((KvQuant(),)),
    "kv_quant, int4": Kind((KvQuant(bits=4),)),
    "kv_hdc, int4, residual": Kind((KvHdc(bits=4, granularity="per_channel"),), residual=8),
    "kv_pca + kv_quant": Kind((HALF, KvQuant())),
    "kv_window": Kind((RING,)),
    "kv_pca + kv_window + kv_quant": Kind((HALF, RING, KvQuant())),
    "int4 weights": Kind(weights="int4"),
    "a rank per layer": Kind((HALF,), rank_per_layer=True),
    "prune_heads": Kind((PruneHeads(groups=1, score="fluctuation"),)),
    "share_kv + kv_quant": Kind((ShareKv(sources={1: 0}), KvQuant())),
    "share_kv": Kind((ShareKv(sources={1: 0}),)),
    "a layer without cache": Kind((PruneHeads(heads={1: (0, 1, 2, 3)}),)),
}
STANDARD = "layout attention24"
OTHER_LAYOUT = {STANDARD: Kind((KvPca(rank=8, value_rank=16),), layout="attention24")}


def make_artifact(model: Path | str, kind: Kind, folder: Path) -> Path:
    """All that a client reads of an artifact, made by the pipeline's stages without the measuring."""
    recipe = recipe_of(kind.methods, kind.weights).model_copy(update={"layout": kind.layout})
    prepared = open_prepared(model, recipe)
    statistics = prepared.statistics
    plan = _rank_per_layer(prepared.spec) if kind.rank_per_layer else decide(prepared.recipe, prepared.spec, statistics)
    if kind.residual:
        sizes = {"rank": prepared.spec.head_dim - kind.residual, "residual": kind.residual}
        plan = plan.model_copy(update={"layers": tuple(layer.with_cache(**sizes) for layer in plan.layers)})
    prepared.install(prepared.codes(plan))
    folder.mkdir()
    inputs = prepared.export(plan, folder)
    prepared.write_companions(folder, KVLayout.of(prepared.spec, plan), inputs)
    return folder


def _rank_per_layer(spec: ModelSpec) -> Plan:
    ranks = [8 * (1 + layer % (spec.head_dim // 8)) for layer in range(spec.layers)]
    return Plan(layers=tuple(LayerPlan(layer=layer, cache=FullCache(rank=rank)) for layer, rank in enumerate(ranks)))
