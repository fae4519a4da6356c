"""The one slim attention: evaluated in torch, exported as the operators of `operators`.

transformers calls it through its `AttentionInterface` with q, k and v after norms, and with RoPE taken over (see
`rotary`) before RoPE, for every family alike, so no family's modelling code is repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface

from kvslim.transform.clustered import clustered_attention, evaluated_clusters
from kvslim.transform.clustering import Formed
from kvslim.transform.operators import (
    ExportStep,
    Scales,
    group_query_attention,
    rotary_embedding,
    shared_attention,
    standard_attention,
    standard_shared_attention,
)
from kvslim.transform.rotary import Rotary
from kvslim.transform.scoring import Scoring
from kvslim.transform.storage import Integers, Levels
from kvslim.transform.streaming import (
    Codebooks,
    Ring,
    Stores,
    evaluated_packed_attention,
    packed_attention,
    ring_attention,
)
from kvslim.types import BITS, CODES, CacheType

NAME = "kvslim"
FUSED_ROTARY_STEP = 16  # the fused operator rotates heads and coordinates in multiples of this


class Observed(NamedTuple):
    """What calibration sees of one layer.

    Attributes:
        query, key, value: [batch, heads, length, head_dim] as attention uses them, after RoPE.
        bare_query, bare_key: The same before RoPE, times RoPE's scale.
        scoring: How they become weights.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bare_query: Tensor
    bare_key: Tensor
    scoring: Scoring


Observer = Callable[[Observed], None]


@dataclass
class Lent:
    """The cache of a layer that others read.

    Attributes:
        layer: The layer that has it.
        states: Keys and values [batch, kv_heads, length, rank] as it gives them back; while exporting, the present
            cache; None before the layer ran.
    """

    layer: int
    states: tuple[Tensor, Tensor] | None = None


class SlimAttention(nn.Module):
    """Codes, folded weights and scales of one layer; lives at `attention.kvslim`.

    Attributes:
        query_weight, key_weight, value_weight: [heads * dim, hidden], projections that replace the model's own.
        query_bias, key_bias, value_bias: [heads * dim], or None.
        heads: Query, key and value heads that are kept, by side; None for all.
        membership: [q_heads] the place among the kept query heads of the one whose attention each takes, or None.
        formed: How clusters are formed from each text's first tokens, or None.
        query_encoder: [q_heads, head_dim, rank], or None; applied after RoPE.
        key_encoder: [kv_heads, head_dim, rank], or None.
        refined, value_refined: Leading coordinates of keys and values that the cache holds twice.
        key_offset: [kv_heads, 1, rank], subtracted from coded keys, or None.
        cache: How keys and values are stored.
        key_scale, value_scale: [kv_heads, rank + refined] steps of an integer cache, or None for a float32 one.
        key_levels, value_levels: [2 ** bits] levels of packed codes in units of the scales, or None.
        lent: Its cache, where other layers read it, or None.
        borrowed: Another layer's cache that this one reads in place of its own, or None.
        ring: Sinks and recent tokens of a layer that keeps no more exactly, or None.
        rotary: RoPE of this layer, or None.
        window: Tokens that a query of this layer sees in the model, or None for all.
        hidden: Input of the model's projections, caught by a hook, [batch, length, hidden].
        observer: Hears of q, k, v and the scoring when calibrating.
        step: Set while exporting.
    """

    query_weight: Tensor | None
    membership: Tensor | None
    query_encoder: Tensor | None
    key_encoder: Tensor | None
    key_offset: Tensor | None
    key_scale: Tensor | None
    value_scale: Tensor | None
    key_levels: Tensor | None
    value_levels: Tensor | None

    def __init__(self, rotary: Rotary | None, window: int | None) -> None:
        super().__init__()
        for side in ("query", "key", "value"):
            self.register_buffer(f"{side}_weight", None)
            self.register_buffer(f"{side}_bias", None)
        for name in ("membership", "query_encoder", "key_encoder", "key_offset"):
            self.register_buffer(name, None)
        for name in ("key_scale", "value_scale", "key_levels", "value_levels"):
            self.register_buffer(name, None)
        self.heads: dict[str, tuple[int, ...]] | None = None
        self.formed: Formed | None = None
        self.cache: CacheType = "float32"
        self.refined = self.value_refined = 0
        self.lent: Lent | None = None
        self.borrowed: Lent | None = None
        self.ring: Ring | None = None
        self.per_tensor = False
        self.rotary, self.window = rotary, window
        self.hidden: Tensor | None = None
        self.observer: Observer | None = None
        self.step: ExportStep | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Attention over the coded cache.

        Args:
            query: [batch, q_heads, length, head_dim] before RoPE; key and value alike with kv_heads.
            key: See query.
            value: See query.
            scoring: How scores become weights.

        Returns:
            [batch, length, q_heads, dim], dim being the rank of the value code; one zero where no head is kept.
        """
        if self.is_dropped:
            return query.new_zeros(query.shape[0], query.shape[2], 1, 1)
        if self.borrowed is not None:
            return self._borrowing(self.borrowed, self.projected("query", query), scoring)
        query, key, value = (
            self.projected(side, states) for side, states in (("query", query), ("key", key), ("value", value))
        )
        if self.step is not None:
            return self._exported(self.step, query, key, value, scoring)
        bare_query, bare_key = query, key
        if self.rotary is not None:
            bare_query, bare_key = self.rotary.scaled(query), self.rotary.scaled(key)
            query, key = self.rotary.rotated(query), self.rotary.rotated(key)
        if self.observer is not None:
            self.observer(Observed(query, key, value, bare_query, bare_key, scoring))
        return self._evaluated(*self._coded(query, key, value), scoring)

    @property
    def is_dropped(self) -> bool:
        """Whether no head is kept, and so no cache either."""
        return self.heads is not None and not self.heads["query"]

    @property
    def is_clustered(self) -> bool:
        """Whether heads share attention."""
        return self.membership is not None or self.formed is not None

    def scoring(self, scale: float, softcap: float | None) -> Scoring:
        """How this layer's scores become weights; packed codes hide no token."""
        if self.ring is None or self.cache in CODES:
            return Scoring(scale, self.window, softcap)
        return Scoring(scale, self.window, softcap, self.ring.window, self.ring.sinks)

    def _evaluated(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        if self.ring is not None and self.cache in CODES:
            attended = evaluated_packed_attention((query, key, value), scoring, self.ring, self._codebooks())
            return attended.transpose(1, 2)
        if self.is_clustered:
            return evaluated_clusters((query, key, value), scoring, self.membership, self.formed).transpose(1, 2)
        key, value = self._rounded(key, self.key_scale), self._rounded(value, self.value_scale)
        if self.lent is not None:
            self.lent.states = key, value
        return self._attended(query, key, value, scoring)

    def _borrowing(self, borrowed: Lent, query: Tensor, scoring: Scoring) -> Tensor:
        """Attention of queries before RoPE over another layer's cache."""
        assert borrowed.states is not None  # donors are earlier layers
        if self.rotary is not None and self.step is not None:
            query = rotary_embedding(query, self.step.positions, self.rotary)
        elif self.rotary is not None:
            query = self.rotary.rotated(query)
        query = self._coded_query(query)
        if self.step is None:
            return self._attended(query, *borrowed.states, scoring)
        if self.step.layout == "attention24":
            return standard_shared_attention(self.step, query, borrowed.states, scoring)
        scales = self._kernel_scales()
        return shared_attention(self.step, query, borrowed.states, scoring, cache=self.cache, scales=scales)

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        if scoring.window is None and scoring.softcap is None and scoring.recent is None:
            attended = nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scoring.scale, enable_gqa=True
            )
        else:
            group = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
            attended = scoring.weights(query, key) @ value
        return attended.transpose(1, 2)

    def projected(self, side: str, states: Tensor) -> Tensor:
        """One side's states by the layer's own projection of the hidden states where it has one, else the model's.

        Args:
            side: "query", "key" or "value".
            states: [batch, heads, length, head_dim] as the model computes them.

        Returns:
            The same with the kept heads alone.
        """
        weight: Tensor | None = getattr(self, f"{side}_weight")
        heads = range(states.shape[1]) if self.heads is None else self.heads[side]
        if weight is None:
            return states if len(heads) == states.shape[1] else states[:, list(heads)]
        assert self.hidden is not None  # the hook runs before attention does
        flat = nn.functional.linear(self.hidden, weight, getattr(self, f"{side}_bias"))
        return flat.unflatten(-1, (len(heads), -1)).transpose(1, 2)

    def _exported(self, step: ExportStep, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        fused = step.layout == "gqa" and self.ring is None and not self.is_clustered
        inside = fused and self._rotates_inside(query.shape[-1])
        if self.rotary is not None and not inside:
            query, key = (rotary_embedding(states, step.positions, self.rotary) for states in (query, key))
        states = self._coded(query, key, value)
        if self.is_clustered:
            return clustered_attention(step, states, scoring, self.membership)
        if self.ring is not None and self.cache in CODES:
            return packed_attention(step, states, scoring, self.ring, self._codebooks())
        if self.ring is not None:
            return ring_attention(step, states, scoring, self.ring, self._stores())
        if step.layout == "attention24":
            attended = standard_attention(step, states, scoring)
        else:
            rotary, scales = self.rotary if inside else None, self._kernel_scales()
            attended = group_query_attention(step, states, scoring, rotary=rotary, cache=self.cache, scales=scales)
        if self.lent is not None and step.present is not None:
            self.lent.states = step.present[0], step.present[1]
        return attended

    def _coded(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value as the cache knows them."""
        if self.key_encoder is not None:
            key = key @ self.key_encoder
        if self.key_offset is not None:
            key = key - self.key_offset
        return (
            self._coded_query(query),
            self._refined(key, self.key_scale, self.refined),
            self._refined(value, self.value_scale, self.value_refined),
        )

    def _coded_query(self, query: Tensor) -> Tensor:
        return query if self.query_encoder is None else query @ self.query_encoder

    def _refined(self, states: Tensor, scale: Tensor | None, count: int) -> Tensor:
        """The states, and behind them what rounding leaves of their first `count` coordinates."""
        if not count or scale is None:
            return states
        top = states[..., :count]
        return torch.cat([states, top - self._rounded(top, scale[:, :count])], dim=-1)

    def _rounded(self, states: Tensor, scale: Tensor | None) -> Tensor:
        """What the cache gives back of keys or values."""
        if scale is None:
            return states
        step, most = scale[:, None], 1 << (BITS[self.cache] - 1)
        return (states / step).round().clamp(-most, most - 1) * step

    def _rotates_inside(self, head_dim: int) -> bool:
        """Whether the fused operator applies RoPE: not where a code comes after it, or sizes do not fit."""
        if self.rotary is None or self.key_encoder is not None or self.key_offset is not None:
            return False
        return head_dim % FUSED_ROTARY_STEP == 0 and self.rotary.dim % FUSED_ROTARY_STEP == 0

    def _stores(self) -> Stores:
        if self.key_scale is None or self.value_scale is None:
            return None
        return Integers(self.cache, self.key_scale), Integers(self.cache, self.value_scale)

    def _codebooks(self) -> Codebooks:
        parts = (self.key_levels, self.key_scale), (self.value_levels, self.value_scale)
        key, value = (Levels(levels, scale) for levels, scale in parts if levels is not None and scale is not None)
        return key, value

    def _kernel_scales(self) -> Scales:
        if self.key_scale is None or self.value_scale is None:
            return None
        if self.per_tensor:
            return self.key_scale.flatten()[:1], self.value_scale.flatten()[:1]
        return self.key_scale[None, :, None, :], self.value_scale[None, :, None, :]


def _slim_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    slim: SlimAttention = module.kvslim  # type: ignore[assignment]
    return slim(query, key, value, slim.scoring(scaling, softcap)), None


def _no_mask(*_: Any, **__: Any) -> None:
    """The fused operator is causal by itself."""


def register() -> None:
    """Makes the slim attention known to transformers under `NAME`."""
    AttentionInterface.register(NAME, _slim_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


class PassThroughCache(Cache):
    """A cache that hands keys and values on untouched: the fused operator keeps them itself."""

    def __init__(self, past: Sequence[Sequence[Tensor]]) -> None:
        super().__init__(layers=[])
        self.past = past

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values alone."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Past length in tokens."""
        return self.past[layer_idx][0].shape[2]
