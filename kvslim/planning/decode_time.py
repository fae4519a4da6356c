"""How long a plan's decode step takes, counted in multiply-accumulates of the float32 attention kernel.

A step reads every weight once and, in every layer, a key and a value of every cached token for each of its query heads:
the fused kernel's time follows query heads times head size (kv heads change what it reads, hardly how long it takes),
and the softmax takes some for each query head and token, however small the head is. What one multiply-accumulate costs
depends on how weights and cache are stored; the benchmark `weight-cost` measures it, and `plan-speed` compares the
ratios that follow with measured ones. What a ring costs besides is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvslim.caches import CodedCache
from kvslim.contract import CacheType, ModelSpec, WeightType
from kvslim.types import LayerPlan

OF_WEIGHTS: dict[WeightType, float] = {"int4": 0.31, "int8": 0.47, "fp32": 1.15}
OF_CACHE: dict[CacheType, float] = {"float32": 0.87, "int8": 0.45, "int4": 0.8}
OF_SCORE = 17.0  # one query head's score of one cached token


@dataclass(frozen=True)
class DecodeTime:
    """Counts the work of a layer.

    Attributes:
        spec: The model's shape.
        context: Cached tokens.
        weights: How they are stored.
        attention: Numbers in the matrices of each layer's attention.
        others: Numbers in the other matrices of each layer, those of its feed-forward part.
        width: Channels of a feed-forward part.
        head: Numbers in the output head.
    """

    spec: ModelSpec
    context: int
    weights: WeightType
    attention: tuple[int, ...]
    others: tuple[int, ...]
    head: int
    width: int = 0

    def of_layer(self, layer: LayerPlan, source: LayerPlan | None = None) -> float:
        """The work of one layer for one token, over its own cache or that of a source layer."""
        share = layer.mlp if layer.mlp_width is None else layer.mlp_width / self.width
        others = OF_WEIGHTS[self.weights] * self.others[layer.layer] * share
        return others if layer.heads == () else others + self._attention(layer, source or layer)

    def of_plan(self, layers: Sequence[LayerPlan]) -> float:
        """The work of a whole plan for one token."""
        sources = (None if layer.source is None else layers[layer.source] for layer in layers)
        return OF_WEIGHTS[self.weights] * self.head + sum(map(self.of_layer, layers, sources))

    def _attention(self, layer: LayerPlan, cached: LayerPlan) -> float:
        spec, kv_heads = self.spec, len(layer.kv_heads(self.spec)) if layer.source is None else 0
        heads = spec.q_heads if layer.heads is None else len(layer.heads)
        kept = (heads + kv_heads) / (spec.q_heads + spec.kv_heads)
        coding = (heads + kv_heads) * spec.head_dim * (_rank(cached) or spec.head_dim * (layer.source is not None))
        seen = min((limit for limit in self._limits(layer) if limit is not None), default=self.context)
        scoring = OF_CACHE[cached.cache.dtype] * sum(cached.cache.widths(spec.head_dim)) + OF_SCORE
        reading = heads * scoring * min(seen, self.context)
        return OF_WEIGHTS[self.weights] * kept * self.attention[layer.layer] + coding + reading

    def _limits(self, layer: LayerPlan) -> tuple[int | None, int | None]:
        """Tokens that the model's own window leaves, and those of a ring."""
        ring = None if layer.cache.kept is None else sum(layer.cache.kept)
        return self.spec.windows[layer.layer], ring


def _rank(layer: LayerPlan) -> int:
    """Coordinates of a code; 0 where there is none."""
    return (layer.cache.rank or 0) if isinstance(layer.cache, CodedCache) else 0
