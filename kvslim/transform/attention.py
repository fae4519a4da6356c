"""The one slim attention: evaluated in torch, exported as operators.

transformers calls it through its `AttentionInterface` with q, k and v after norms, and with RoPE taken over (see
`rotary`) before RoPE, for every family alike, so no family's modelling code is repeated here. What attention over the
layer's kind of cache is, the `CacheAttention` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface

from kvslim.caches.attention.base import CacheAttention
from kvslim.caches.attention.full import FullAttention
from kvslim.caches.attention.shared import SharedStates
from kvslim.contract import BITS, CacheType
from kvslim.transform.operators import ExportStep, Residuals, Scales, by_head, merged, rotary_embedding
from kvslim.transform.rotary import Rotary
from kvslim.transform.scoring import Scoring
from kvslim.transform.straight_through import through

NAME = "kvslim"
FEATURE_SIDES = "key", "query"


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


class SlimAttention(nn.Module):
    """Codes, folded weights and scales of one layer; lives at `attention.kvslim`.

    Attributes:
        query_weight, key_weight, value_weight: [heads * dim, hidden], projections that replace the model's own.
        query_bias, key_bias, value_bias: [heads * dim], or None.
        heads: Query, key and value heads that are kept, by side; None for all.
        membership: [q_heads] the place among the kept query heads of the one whose attention each takes, or None.
        query_encoder: [q_heads, head_dim, rank], or None; applied after RoPE.
        key_encoder: [kv_heads, head_dim, rank], or None.
        key_offset: [kv_heads, 1, rank], subtracted from coded keys, or None.
        key_scale, value_scale: [kv_heads, rank + residual] steps of an integer cache, or None for a float32 one.
        key_levels, value_levels: [2 ** bits] levels of packed codes in units of the scales, or None.
        key_feedback, value_feedback: [kv_heads, rank / 2, rank / 2], or None; see `Rounding`.
        key_features_weight, query_features_weight: [kv_heads * features, head_dim], or None; see `Features`.
        key_features_bias, query_features_bias: [kv_heads * features], or None.
        residuals: Leading coordinates of keys and of values that the cache holds twice.
        value_sum: [rank + residual, rank], adds what is read of coordinates held twice, or None.
        stored: How keys and values are stored.
        per_tensor: Whether all entries of each scale are equal, and the kernel may use one.
        cache: What attention over this kind of cache is.
        shared: What this layer caches, where other layers read it, or None.
        is_normed: Whether the model norms queries and keys after it has projected them.
        rotary: RoPE of this layer, or None.
        window: Tokens that a query of this layer sees in the model, or None for all.
        hidden: Input of the model's projections, caught by a hook, [batch, length, hidden], until attention is done.
        observer: Called with q, k, v and the scoring while calibrating.
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
    key_feedback: Tensor | None
    value_feedback: Tensor | None
    value_sum: Tensor | None
    key_features_weight: Tensor | None
    key_features_bias: Tensor | None
    query_features_weight: Tensor | None
    query_features_bias: Tensor | None

    def __init__(self, rotary: Rotary | None, window: int | None) -> None:
        super().__init__()
        for side in ("query", "key", "value"):
            self.register_buffer(f"{side}_weight", None)
            self.register_buffer(f"{side}_bias", None)
        for name in ("membership", "query_encoder", "key_encoder", "key_offset", "value_sum"):
            self.register_buffer(name, None)
        for side in FEATURE_SIDES:
            self.register_buffer(f"{side}_features_weight", None)
            self.register_buffer(f"{side}_features_bias", None)
        for name in ("scale", "levels", "feedback"):
            self.register_buffer(f"key_{name}", None)
            self.register_buffer(f"value_{name}", None)
        self.heads: dict[str, tuple[int, ...]] | None = None
        self.residuals = 0, 0
        self.stored: CacheType = "float32"
        self.per_tensor = False
        self.cache: CacheAttention = FullAttention()
        self.shared: SharedStates | None = None
        self.is_normed = False
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
        attended = self.cache.attend(self, (query, key, value), scoring)
        return attended if self.value_sum is None else attended @ self.value_sum

    @property
    def is_dropped(self) -> bool:
        """Whether no head is kept, and so no cache either."""
        return self.heads is not None and not self.heads["query"]

    def scoring(self, scale: float, softcap: float | None) -> Scoring:
        """How this layer's scores become weights."""
        return self.cache.scoring(Scoring(scale, self.window, softcap))

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
        return flat.reshape(*flat.shape[:2], len(heads), -1).transpose(1, 2)

    def rotated(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
        """Query and key after RoPE; an observer sees them, before and after it."""
        bare_query, bare_key = query, key
        if self.rotary is not None:
            bare_query, bare_key = self.rotary.scaled(query), self.rotary.scaled(key)
            query, key = self.rotary.rotated(query), self.rotary.rotated(key)
        if self.observer is not None:
            self.observer(Observed(query, key, value, bare_query, bare_key, scoring))
        return query, key

    def rotated_in_graph(self, step: ExportStep, query: Tensor) -> Tensor:
        """Queries after RoPE, by an operator of its own."""
        if self.rotary is None:
            return query
        heads = query.shape[1]
        return by_head(rotary_embedding(merged(query), heads, step.positions, self.rotary), heads)

    def coded(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value as the cache knows them."""
        if self.key_encoder is not None:
            key = key @ self.key_encoder
        if self.key_offset is not None:
            key = key - self.key_offset
        return self.coded_query(query), *self._rounded_apart(key, value)

    def coded_in_graph(
        self, step: ExportStep, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of queries and keys before RoPE: both go through each operator as one, as far as they can.

        At one token per step, an operator costs about as much for twice the numbers.
        """
        if self.rotary is None:  # codes are folded into the projections, which may have different widths
            return self.coded(query, key, value)
        heads = query.shape[1], key.shape[1]
        flat = torch.cat([merged(query), merged(key)], dim=-1)
        both = rotary_embedding(flat, sum(heads), step.positions, self.rotary)
        if self.key_encoder is None and self.query_encoder is None:
            if self.key_offset is not None:
                both = both - nn.functional.pad(self.key_offset.flatten(), (heads[0] * query.shape[-1], 0))
            query, key = _heads_apart(both, heads)
            return query, *self._rounded_apart(key, value)
        encoders = [encoder for encoder in (self.query_encoder, self.key_encoder) if encoder is not None]
        if len({encoder.shape[1:] for encoder in encoders}) != 1 or len(encoders) != 2:
            query, key = _heads_apart(both, heads)
            return self.coded(query, key, value)
        query, key = (by_head(both, sum(heads)) @ torch.cat(encoders)).split(heads, dim=1)
        return query, *self._rounded_apart(key if self.key_offset is None else key - self.key_offset, value)

    def coded_query(self, query: Tensor) -> Tensor:
        """Queries as they meet coded keys."""
        return query if self.query_encoder is None else query @ self.query_encoder

    def rounded(self, states: Tensor, scale: Tensor | None) -> Tensor:
        """What the cache gives back of keys or values."""
        if scale is None:
            return states
        step, most = scale[:, None], 1 << (BITS[self.stored] - 1)
        exact = states / step
        return through(exact, exact.round()).clamp(-most, most - 1) * step

    def kernel_scales(self) -> Scales:
        """Scales in the shapes that onnxruntime's operator reads; None for a float32 cache."""
        if self.key_scale is None or self.value_scale is None:
            return None
        if self.per_tensor:
            return self.key_scale.flatten()[:1], self.value_scale.flatten()[:1]
        return self.key_scale[None, :, None, :], self.value_scale[None, :, None, :]

    def kernel_residuals(self) -> Residuals:
        """What attention may know of coordinates held twice.

        Nothing where rows of the projection of queries read them: once that is trained, it may read both otherwise.
        """
        return (0, 0) if self.query_encoder is None else self.residuals

    def _rounded_apart(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with what the cache holds besides, or in another way, against its own rounding.

        Both at once where they are alike, for fewer operators of a graph.
        """
        scales: Any = (self.key_scale, self.value_scale)
        feedbacks: Any = (self.key_feedback, self.value_feedback)
        (key_fed, value_fed), (count, value_count) = (part is not None for part in feedbacks), self.residuals
        alike = (key_fed, count) == (value_fed, value_count) and key.shape[1::2] == value.shape[1::2]
        if not alike or not (count or key_fed):
            key = self._apart(key, scales[0], feedbacks[0], count)
            return key, self._apart(value, scales[1], feedbacks[1], value_count)
        both, scale = torch.cat([key, value], dim=1), torch.cat(scales)  # what is held besides needs scales
        both = self._apart(both, scale, torch.cat(feedbacks) if key_fed else None, count)
        key, value = _heads_apart(merged(both), (key.shape[1], value.shape[1]))
        return key, value

    def _apart(self, states: Tensor, scale: Tensor | None, feedback: Tensor | None, count: int) -> Tensor:
        """Keys or values with feedback, and with what rounding leaves of their first `count` coordinates behind."""
        if scale is None:
            return states
        if feedback is not None:
            states = self._fed_back(states, scale, feedback)
        if not count:
            return states
        top = states[..., :count]
        return torch.cat([states, top - self.rounded(top, scale[:, :count])], dim=-1)

    def _fed_back(self, states: Tensor, scale: Tensor, feedback: Tensor) -> Tensor:
        """The states, their first half with what it takes up of the last half's rounding error."""
        half = feedback.shape[-1]
        first, last = states.split(half, dim=-1)
        error = last - self.rounded(last, scale[:, half : 2 * half])
        return torch.cat([first + error @ feedback.transpose(-1, -2), last], dim=-1)


def _heads_apart(flat: Tensor, heads: Sequence[int]) -> tuple[Tensor, ...]:
    """[batch, length, all heads * dim] as [batch, heads, length, dim] for each count of heads.

    Split in the layout that the operators of a graph read, so that nothing comes between it and them.
    """
    dim = flat.shape[-1] // sum(heads)
    return tuple(
        by_head(part, count) for part, count in zip(flat.split([n * dim for n in heads], -1), heads, strict=True)
    )


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
    attended = slim(query, key, value, slim.scoring(scaling, softcap))
    slim.hidden = None  # of all layers together it takes as much as what the layers give
    return attended, None


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
