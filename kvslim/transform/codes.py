"""What the slim attention of one layer computes: the numbers that methods fit and surgery installs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvslim.types import CacheType

Array = np.ndarray
REFINEMENT = 16  # how many times finer the second copy of a refined coordinate is stored


@dataclass(frozen=True, eq=False)
class LayerCodes:
    """Linear codes and quantisation scales of one layer's cache; None leaves that part of the layer as it is.

    Keys and queries are coded after norm and RoPE, so a cached token costs no work later.

    Attributes:
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
    """

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

    @property
    def is_empty(self) -> bool:
        """Whether the layer stays as it is."""
        parts = (self.key_encoder, self.value_encoder, self.key_offset, self.key_scale, self.value_scale)
        return all(part is None for part in (*parts, self.window, self.output_weight))
