"""What a task needs least: what every layer, its parts and its heads are worth on the task's text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from kvslim import stages
from kvslim.blas import one_blas_thread
from kvslim.contract import Frozen, ModelSpec
from kvslim.methods.base import Method
from kvslim.methods.cluster_heads import ClusterHeads
from kvslim.methods.kv_pca import KvPca
from kvslim.methods.kv_window import kept_attention
from kvslim.methods.prune_heads import PruneHeads
from kvslim.methods.prune_layers import INFLUENCES, PruneLayers
from kvslim.methods.share_kv import distances, nearest
from kvslim.types import Plan

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics
    from kvslim.prepared.base import PreparedModel

ENERGY = 0.99
RECENT = 256


class SourceLayer(Frozen):
    """The earlier layer whose cache stands best for a layer's own, through linear maps."""

    layer: int
    key_distance: float = Field(description="mean squared error of the scores over their variance, 0 to 1")
    value_distance: float = Field(description="the same of what attention adds to the hidden states")


class LayerAnalysis(Frozen):
    """One layer. KL is in nats per token, to the model as it is, with nothing else removed."""

    layer: int
    attention_kl: float = Field(description="without the layer's attention, its mean output in its place")
    mlp_kl: float = Field(description="the same without its feed-forward part")
    block_kl: float = Field(description="the same without both")
    block_influence: float = Field(description="1 - mean cosine of the hidden states before and after the layer")
    kv_head_kl: tuple[float, ...] = Field(description="without each kv head and the query heads that read it")
    fluctuation: tuple[float, ...] = Field(
        description="of each query head: variance of what it adds to the hidden states, summed over these"
    )
    taylor: tuple[float, ...] = Field(
        description="of each query head: slope of the loss of next tokens as its output is scaled, nats per token"
    )
    clusters: int = Field(description="of query heads that attend alike; the elbow of what sharing attention costs")
    key_rank: int = Field(description="dimensions with which every kv head keeps 99 % of the score energy")
    value_rank: int = Field(description="the same for values")
    recent_attention: float = Field(description="least share of a kv head's attention on sinks and 256 recent tokens")
    source: SourceLayer | None = Field(
        description="what `share_kv` would have it read; None where no layer near it can be"
    )

    @property
    def part_kl(self) -> tuple[float, float, float]:
        """KL without the attention, without the feed-forward part, and without both."""
        return self.attention_kl, self.mlp_kl, self.block_kl


class Analysis(Frozen):
    """What a text needs of a model, layer by layer."""

    source: str = Field(description="the text: self, a file, or a hub data set")
    tokens: int = Field(description="tokens of it that statistics come from")
    length: int = Field(description="tokens of its longest piece, which no layer looks back beyond")
    head_dim: int = Field(description="dimensions of a head")
    layers: tuple[LayerAnalysis, ...]


@one_blas_thread()
def analyze(prepared: PreparedModel) -> Analysis:
    """Measures every layer's parts and kv heads, each alone, and reads the rest off the statistics."""
    trials = prepared.trials()
    prepared.progress.stage(stages.ANALYZE)
    spec, statistics, taylor = trials.spec, trials.statistics, trials.taylor
    groups = [
        tuple(range(first, first + spec.group_size))
        for first in range(0, spec.kv_heads * spec.group_size, spec.group_size)
    ]
    recent = kept_attention(statistics, RECENT).min(axis=1)
    sources = _source_layers(spec, statistics)
    clusters = ClusterHeads().numbers(spec, statistics)
    kls = trials.divergences(change for layer in range(spec.layers) for change in _removals(layer, groups))
    found = []
    for layer in trials.progress.track(range(spec.layers), "layers"):
        ranks = [
            int((basis.energy.min(0) < ENERGY).sum()) + 1 for basis in KvPca().bases(statistics, layer, "balanced")
        ]
        attention_kl, mlp_kl, block_kl = islice(kls, len(INFLUENCES))
        found.append(
            LayerAnalysis(
                layer=layer,
                attention_kl=attention_kl,
                mlp_kl=mlp_kl,
                block_kl=block_kl,
                block_influence=float(statistics.influence[layer, INFLUENCES.index("block")]),
                kv_head_kl=tuple(islice(kls, len(groups))),
                fluctuation=tuple(statistics.fluctuation[layer].tolist()),
                taylor=tuple(taylor[layer].tolist()),
                clusters=clusters.get(layer, spec.q_heads),
                key_rank=min(ranks[0], spec.head_dim),
                value_rank=min(ranks[1], spec.head_dim),
                recent_attention=float(np.clip(recent[layer], 0, 1)),
                source=sources.get(layer),
            )
        )
    windows = statistics.windows
    return Analysis(
        source=prepared.recipe.calibration.source,
        tokens=int(windows.size),
        length=int(windows.shape[1]),
        head_dim=spec.head_dim,
        layers=tuple(found),
    )


def _removals(layer: int, groups: Sequence[tuple[int, ...]]) -> Iterator[Method]:
    """What is tried of a layer: without its attention, its feed-forward part, both, and each kv head."""
    yield from (PruneLayers(layers={layer: part}) for part in INFLUENCES)
    yield from (PruneHeads(heads={layer: heads}) for heads in groups)


def _source_layers(spec: ModelSpec, statistics: CalibrationStatistics) -> dict[int, SourceLayer]:
    """The nearest source of each layer that has one."""
    near = distances(spec, statistics, Plan.identity(spec))
    return {
        layer: SourceLayer(layer=source, key_distance=near[layer, source].key, value_distance=near[layer, source].value)
        for layer, source in nearest(near).items()
    }
