"""What the slim attention of one layer computes: the numbers that methods fit and surgery installs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kvslim.transform.clustering import Formed
from kvslim.types import CacheType

Array = np.ndarray
OF_QUERY_HEADS = ("query_encoder", "value_decoder", "value_offset")
OF_KV_HEADS = ("key_encoder", "value_encoder", "key_offset", "key_scale", "value_scale")
REFINEMENT = 16  # how many times finer the second copy of a refined coordinate is stored


@dataclass(frozen=True, eq=False)
class LayerCodes:
    """Linear codes and quantisation scales of one layer's cache; None leaves that part of the layer as it is.

    Keys and queries are coded after norm and RoPE, so a cached token costs no work later.

    Heads are counted as the model has them; what stands here of heads that are not kept has no effect.

    Attributes:
        heads: Query heads that are kept, or None for all; with none the layer has no attention.
        kv_heads: The kv heads that those read.
        donor: The layer whose cache this one reads; what is said here of kv heads and storage is then the donor's, and
            the query heads stand in the order in which they read it.
        mean_output: [q_heads, head_dim]; the mean attention output, which stands for heads that are not kept.
        clusters: For each query head the one whose attention it takes, or None.
        formed_clusters: How clusters are formed from each text's first tokens, or None.
        key_encoder: [kv_heads, head_dim, rank]; the cached key is `k @ key_encoder`.
        query_encoder: [q_heads, head_dim, rank]; scores are `(q @ query_encoder) . (k @ key_encoder)`.
        value_encoder: [kv_heads, head_dim, rank]; folded into the value projection.
        value_decoder: [q_heads, rank, head_dim]; folded into the output projection.
        value_offset: [q_heads, head_dim]; added to each decoded head output (a bias, since softmax weights sum to 1).
        refined: Leading coordinates of the cached key that are stored twice: rounded, and what rounding left of them.
        value_refined: The same for values.
        key_offset: [kv_heads, rank], subtracted from each coded key: the same for all keys, so no softmax sees it.
        cache: How the codes are stored.
        key_scale: [kv_heads, rank], the step of the cached integers.
        value_scale: [kv_heads, rank], likewise.
        key_levels: [2 ** bits] ascending levels of packed codes, in units of the key_scale.
        value_levels: [2 ** bits], likewise.
        window: Recent tokens that are kept, or with packed codes kept exact; None for all.
        sinks: First tokens kept beside the window.
        per_tensor: Whether all entries of each scale are equal and the kernel may use one.
        output_weight: [hidden, q_heads * rank] an output projection fitted to the codes, decoders included.
        output_bias: [hidden], its bias.
        attention_mean: [hidden], added to the hidden states where the layer has no attention.
        mlp_mean: [hidden], added to them in place of what the feed-forward part gives; None: that part stays.
        down_weight: [hidden, inner], a down projection fitted to what is left around it.
        down_bias: [hidden], its bias.
    """

    heads: tuple[int, ...] | None = None
    kv_heads: tuple[int, ...] = ()
    donor: int | None = None
    mean_output: Array | None = None
    clusters: tuple[int, ...] | None = None
    formed_clusters: Formed | None = None
    key_encoder: Array | None = None
    query_encoder: Array | None = None
    value_encoder: Array | None = None
    value_decoder: Array | None = None
    value_offset: Array | None = None
    refined: int = 0
    value_refined: int = 0
    key_offset: Array | None = None
    cache: CacheType = "float32"
    key_scale: Array | None = None
    value_scale: Array | None = None
    key_levels: Array | None = None
    value_levels: Array | None = None
    window: int | None = None
    sinks: int = 0
    per_tensor: bool = False
    output_weight: Array | None = None
    output_bias: Array | None = None
    attention_mean: Array | None = None
    mlp_mean: Array | None = None
    down_weight: Array | None = None
    down_bias: Array | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the layer stays as it is."""
        parts = (self.key_encoder, self.value_encoder, self.key_offset, self.key_scale, self.value_scale)
        refitted = (self.output_weight, self.down_weight)
        removed = (self.heads, self.clusters, self.formed_clusters, self.window, self.mlp_mean)
        return all(part is None for part in (*parts, *refitted, *removed))

    @property
    def is_dropped(self) -> bool:
        """Whether the layer has neither attention nor feed-forward part."""
        return self.heads == () and self.mlp_mean is not None

    def of_kept_heads(self) -> LayerCodes:
        """The same with the kept heads alone in every array."""
        if self.heads is None:
            return self
        heads = {**dict.fromkeys(OF_QUERY_HEADS, self.heads), **dict.fromkeys(OF_KV_HEADS, self.kv_heads)}
        arrays = {name: getattr(self, name) for name in heads}
        kept = {name: array[list(heads[name])] for name, array in arrays.items() if array is not None}
        return replace(self, **kept)
