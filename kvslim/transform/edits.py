"""What a layer computes after compression: the numbers that methods fit and surgery installs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvslim.caches import Cache, FullCache, SharedCache
from kvslim.caches.clustering import Formed

if TYPE_CHECKING:
    from kvslim.types import Plan

Array = np.ndarray
OF_QUERY_HEADS = ("query_encoder", "value_decoder", "value_offset")
OF_KV_HEADS = ("key_encoder", "value_encoder", "key_offset", "value_centre")
ROUNDING_OF_KV_HEADS = ("key_scale", "value_scale", "key_feedback", "value_feedback")
RESIDUAL_STEPS = 16  # how many times finer the residual of a coordinate is stored than the coordinate


@dataclass(frozen=True, eq=False)
class LinearCode:
    """Linear maps around a layer's cache; None leaves that side as it is.

    Keys and queries are coded after norm and RoPE, so a cached token costs no work later. Heads are counted as the
    model has them; what stands here of heads that are not kept has no effect.

    Attributes:
        key_encoder: [kv_heads, head_dim, rank]; the cached key is `k @ key_encoder`.
        query_encoder: [q_heads, head_dim, rank]; scores are `(q @ query_encoder) . (k @ key_encoder)`.
        value_encoder: [kv_heads, head_dim, rank]; folded into the value projection.
        value_decoder: [q_heads, rank, head_dim]; folded into the output projection.
        value_offset: [q_heads, head_dim]; added to each decoded head output (a bias, since softmax weights sum to 1).
        key_offset: [kv_heads, rank], subtracted from each coded key: the same for all keys, so no softmax sees it.
        value_centre: [kv_heads, rank], subtracted from each coded value; attention weights sum to 1, so the output
            projection's bias gives it back.
    """

    key_encoder: Array | None = None
    query_encoder: Array | None = None
    value_encoder: Array | None = None
    value_decoder: Array | None = None
    value_offset: Array | None = None
    key_offset: Array | None = None
    value_centre: Array | None = None

    @property
    def is_empty(self) -> bool:
        """Whether keys and values stay as they are."""
        return all(part is None for part in (self.key_encoder, self.value_encoder, self.key_offset, self.value_centre))


@dataclass(frozen=True, eq=False)
class Rounding:
    """How cached coordinates are rounded; a side without a scale is not.

    Attributes:
        key_scale: [kv_heads, rank], the step of the cached integers.
        value_scale: [kv_heads, rank], likewise.
        key_levels: [2 ** bits] ascending levels of packed codes, in units of the key_scale.
        value_levels: [2 ** bits], likewise.
        key_feedback: [kv_heads, rank / 2, rank / 2]; what rounding leaves of the last half of a key's coordinates,
            times this, is taken up by the first half before that is rounded.
        value_feedback: [kv_heads, rank / 2, rank / 2], likewise.
    """

    key_scale: Array | None = None
    value_scale: Array | None = None
    key_levels: Array | None = None
    value_levels: Array | None = None
    key_feedback: Array | None = None
    value_feedback: Array | None = None


@dataclass(frozen=True, eq=False)
class Features:
    """Maps from keys and queries to the features of a linear cache: g(k) = softmax(A k + a), f(q) = exp(s B q + b).

    s is the scale of scores, so that row i of B is the key that feature i stands for.

    Attributes:
        key_weight: [kv_heads, features, head_dim], A.
        key_bias: [kv_heads, features], a.
        query_weight: [kv_heads, features, head_dim], B.
        query_bias: [kv_heads, features], b.
    """

    key_weight: Array
    key_bias: Array
    query_weight: Array
    query_bias: Array


@dataclass(frozen=True, eq=False)
class KeptHeads:
    """The heads that a layer keeps.

    Attributes:
        query: Query heads; of a layer that reads another's cache, in the order in which they read it.
        kv: The kv heads that those read; with a shared cache, the source's.
        mean_output: [q_heads, head_dim]; the mean attention output, which stands for heads that are not kept.
    """

    query: tuple[int, ...]
    kv: tuple[int, ...] = ()
    mean_output: Array | None = None


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels that a feed-forward part keeps.

    Attributes:
        kept: [width] which, in order.
        mean: [F] of all channels; what the others gave on average stays as a bias.
    """

    kept: Array
    mean: Array


@dataclass(frozen=True, eq=False)
class Affine:
    """A projection: weight [outputs, inputs] and bias [outputs]."""

    weight: Array
    bias: Array


@dataclass(frozen=True, eq=False)
class LayerEdit:
    """All that changes in one layer; the default changes nothing.

    Attributes:
        heads: The heads that are kept, or None for all; with none the layer has no attention.
        cache: How keys and values are kept.
        source_cache: How the source layer keeps what this one reads, for a shared cache.
        code: Linear maps around the cache.
        rounding: How cached coordinates are rounded.
        formed: How clusters are formed from each text's first tokens, or None.
        features: Of a linear cache, or None.
        output: An output projection fitted to the code, decoders included.
        attention_mean: [hidden], added to the hidden states where the layer has no attention.
        mlp_mean: [hidden], added to them in place of what the feed-forward part gives; None: that part stays.
        channels: The channels that the feed-forward part keeps, or None for all.
        down: A down projection fitted to what is left around it.
        weights: Trained weights by their names in the layer, as it is with all else of this edit; they replace its own.
    """

    heads: KeptHeads | None = None
    cache: Cache = field(default_factory=FullCache)
    source_cache: Cache | None = None
    code: LinearCode = field(default_factory=LinearCode)
    rounding: Rounding = field(default_factory=Rounding)
    formed: Formed | None = None
    features: Features | None = None
    output: Affine | None = None
    attention_mean: Array | None = None
    mlp_mean: Array | None = None
    channels: Channels | None = None
    down: Affine | None = None
    weights: Mapping[str, Array] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether the layer stays as it is."""
        rounded = self.rounding.key_scale is not None or self.rounding.value_scale is not None
        changed = (self.heads, self.formed, self.output, self.down, self.mlp_mean, self.channels)
        kept = self.code.is_empty and not rounded and not self.cache.replaces_attention
        return kept and not self.weights and all(part is None for part in changed)

    @property
    def has_attention(self) -> bool:
        """Whether any head is kept."""
        return self.heads is None or self.heads.query != ()

    @property
    def is_dropped(self) -> bool:
        """Whether the layer has neither attention nor feed-forward part."""
        return not self.has_attention and self.mlp_mean is not None

    @property
    def source(self) -> int | None:
        """The layer whose cache this one reads; None where it has its own."""
        return self.cache.source if isinstance(self.cache, SharedCache) else None

    @property
    def stored(self) -> Cache:
        """How what the layer reads is kept, by itself or by its source layer."""
        return self.source_cache or self.cache

    def coded(self, **update: Any) -> LayerEdit:
        """The edit with some maps of its code changed."""
        return replace(self, code=replace(self.code, **update))

    def rounded(self, **update: Any) -> LayerEdit:
        """The edit with some parts of its rounding changed."""
        return replace(self, rounding=replace(self.rounding, **update))

    def of_kept_heads(self) -> LayerEdit:
        """The same with the kept heads alone in every array; a shared cache's scales are the source's already."""
        if self.heads is None:
            return self
        kept = {**dict.fromkeys(OF_QUERY_HEADS, self.heads.query), **dict.fromkeys(OF_KV_HEADS, self.heads.kv)}
        edit = self.coded(**{name: _of(getattr(self.code, name), heads) for name, heads in kept.items()})
        per_head = {name: _of(getattr(self.rounding, name), self.heads.kv) for name in ROUNDING_OF_KV_HEADS}
        edit = edit.rounded(**per_head)
        if self.features is None:
            return edit
        parts = {each.name: getattr(self.features, each.name)[list(self.heads.kv)] for each in fields(Features)}
        return replace(edit, features=Features(**parts))


Codes = tuple[LayerEdit, ...]  # of a model, one of each layer


class FittedPlan(NamedTuple):
    """A plan with the numbers that carry it out.

    Attributes:
        plan: The decisions.
        codes: What they put into the model, one entry per layer.
        made_for: SHA-256 of the model's files and of how its weights are stored.
    """

    plan: Plan
    codes: Codes
    made_for: str


def _of(array: Array | None, heads: tuple[int, ...]) -> Array | None:
    return None if array is None else array[list(heads)]
