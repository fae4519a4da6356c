"""The one slim attention: evaluated in torch, exported as onnxruntime's fused GroupQueryAttention.

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

from kvslim.transform.rotary import Rotary
from kvslim.transform.scoring import Scoring

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
class ExportStep:
    """The graph inputs that one layer's fused attention reads, and the cache tensors that it returns.

    Attributes:
        past: Key and value cache, [batch, kv_heads, past_length, dim] each.
        last: [batch] int32, index of the last attended token of each sequence.
        total: [] int32, past length and new tokens together.
        positions: [batch, length] int64, of the new tokens.
        present: Key and value cache with the new tokens, once attention has run.
    """

    past: tuple[Tensor, Tensor]
    last: Tensor
    total: Tensor
    positions: Tensor
    present: tuple[Tensor, Tensor] | None = None


class SlimAttention(nn.Module):
    """Codes, folded weights and scales of one layer; lives at `attention.kvslim`.

    Attributes:
        query_weight, key_weight, value_weight: [heads * dim, hidden], projections that replace the model's own.
        query_bias, key_bias, value_bias: [heads * dim], or None.
        query_encoder: [q_heads, head_dim, rank], or None; applied after RoPE.
        key_encoder: [kv_heads, head_dim, rank], or None.
        key_scale, value_scale: [kv_heads, rank] steps of an int8 cache, or None for a float32 one.
        rotary: RoPE of this layer, or None.
        window: Tokens that a query of this layer sees, or None for all.
        window_cache: Whether a layer with a window keeps a cache of the window's size.
        hidden: Input of the model's projections, caught by a hook, [batch, length, hidden].
        observer: Hears of q, k, v and the scoring when calibrating.
        step: Set while exporting.
    """

    query_weight: Tensor | None
    query_encoder: Tensor | None
    key_encoder: Tensor | None
    key_scale: Tensor | None
    value_scale: Tensor | None

    def __init__(self, rotary: Rotary | None, window: int | None, window_cache: bool) -> None:
        super().__init__()
        for side in ("query", "key", "value"):
            self.register_buffer(f"{side}_weight", None)
            self.register_buffer(f"{side}_bias", None)
        for name in ("query_encoder", "key_encoder", "key_scale", "value_scale"):
            self.register_buffer(name, None)
        self.per_tensor = False
        self.rotary, self.window, self.window_cache = rotary, window, window_cache
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
            [batch, length, q_heads, dim], dim being the rank of the value code.
        """
        query, key, value = (
            self._projected(side, states) for side, states in (("query", query), ("key", key), ("value", value))
        )
        if self.step is not None:
            return self._exported(self.step, query, key, value, scoring)
        bare_query, bare_key = query, key
        if self.rotary is not None:
            bare_query, bare_key = self.rotary.scaled(query), self.rotary.scaled(key)
            query, key = self.rotary.rotated(query), self.rotary.rotated(key)
        if self.observer is not None:
            self.observer(Observed(query, key, value, bare_query, bare_key, scoring))
        query, key = _coded(query, self.query_encoder), _coded(key, self.key_encoder)
        return self._evaluated(query, key, value, scoring)

    def _evaluated(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        key, value = _through_int8(key, self.key_scale), _through_int8(value, self.value_scale)
        if scoring.window is None and scoring.softcap is None:
            attended = nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scoring.scale, enable_gqa=True
            )
        else:
            group = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
            attended = scoring.weights(query, key) @ value
        return attended.transpose(1, 2)

    def _projected(self, side: str, states: Tensor) -> Tensor:
        """The layer's own projection of the hidden states where it has one, else the model's."""
        weight: Tensor | None = getattr(self, f"{side}_weight")
        if weight is None:
            return states
        assert self.hidden is not None  # the hook runs before attention does
        flat = nn.functional.linear(self.hidden, weight, getattr(self, f"{side}_bias"))
        return flat.unflatten(-1, (states.shape[1], -1)).transpose(1, 2)

    def _exported(self, step: ExportStep, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        fused = self._rotates_inside(query.shape[-1])
        if self.rotary is not None and not fused:
            query, key = _rotary_embedding(query, step, self.rotary), _rotary_embedding(key, step, self.rotary)
        query, key = _coded(query, self.query_encoder), _coded(key, self.key_encoder)
        return self._fused(step, query, key, value, scoring, self.rotary if fused else None)

    def _rotates_inside(self, head_dim: int) -> bool:
        """Whether the fused operator applies RoPE: not where a code comes after it, or sizes do not fit."""
        if self.rotary is None or self.key_encoder is not None:
            return False
        return head_dim % FUSED_ROTARY_STEP == 0 and self.rotary.dim % FUSED_ROTARY_STEP == 0

    def _fused(
        self, step: ExportStep, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, rotary: Rotary | None
    ) -> Tensor:
        batch, q_heads, length, dim = query.shape
        kv_heads = key.shape[1]
        past_key, past_value = step.past
        inputs: list[Tensor | None] = [*map(_merged, (query, key, value)), *step.past, step.last, step.total]
        inputs += [None, None] if rotary is None else [rotary.cos, rotary.sin]
        attributes = self._attributes(q_heads, kv_heads, scoring) | {"do_rotary": int(rotary is not None)}
        if self.key_scale is not None and self.value_scale is not None:
            kind = "PER_TENSOR" if self.per_tensor else "PER_CHANNEL"
            attributes |= {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": 8}
            inputs += [None] * 3 + [self._kernel_scale(self.key_scale), self._kernel_scale(self.value_scale)]
        rows = past_key.shape[2] if "sliding_window_cache" in attributes else past_key.shape[2] + length
        attended, *present = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            attrs=attributes,
            dtypes=[query.dtype, past_key.dtype, past_value.dtype],
            shapes=[(batch, length, q_heads * dim), (batch, kv_heads, rows, dim), (batch, kv_heads, rows, dim)],
            version=1,
        )
        step.present = (present[0], present[1])
        return attended.reshape(batch, length, q_heads, dim)

    def _attributes(self, q_heads: int, kv_heads: int, scoring: Scoring) -> dict[str, Any]:
        attributes: dict[str, Any] = {"num_heads": q_heads, "kv_num_heads": kv_heads, "scale": float(scoring.scale)}
        if scoring.softcap is not None:
            attributes["softcap"] = float(scoring.softcap)
        if scoring.window is not None:
            attributes["local_window_size"] = scoring.window
            if self.window_cache:
                attributes["sliding_window_cache"] = 1
        return attributes

    def _kernel_scale(self, scale: Tensor) -> Tensor:
        return scale.flatten()[:1] if self.per_tensor else scale[None, :, None, :]


def _merged(states: Tensor) -> Tensor:
    """[batch, heads, length, dim] as the [batch, length, heads * dim] that the fused operators read."""
    return states.transpose(1, 2).flatten(2)


def _coded(states: Tensor, encoder: Tensor | None) -> Tensor:
    return states if encoder is None else states @ encoder


def _rotary_embedding(states: Tensor, step: ExportStep, rotary: Rotary) -> Tensor:
    """onnxruntime's operator for RoPE on [batch, heads, length, head_dim]."""
    heads, head_dim = states.shape[1], states.shape[3]
    partial = {} if rotary.dim == head_dim else {"rotary_embedding_dim": rotary.dim}
    flat = _merged(states)
    rotated: Tensor = torch.onnx.ops.symbolic(
        "com.microsoft::RotaryEmbedding",
        [flat, step.positions, rotary.cos, rotary.sin],
        attrs={"num_heads": heads, **partial},
        dtype=flat.dtype,
        shape=flat.shape,
        version=1,
    )
    return rotated.unflatten(-1, (heads, head_dim)).transpose(1, 2)


def _through_int8(states: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return states
    step = scale[None, :, None, :]
    return (states / step).round().clamp(-128, 127) * step


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
    return slim(query, key, value, Scoring(scaling, slim.window, softcap)), None


def _no_mask(*_: Any, **__: Any) -> None:
    """The fused operator is causal by itself."""


def register() -> None:
    """Makes the slim attention known to transformers under `NAME`."""
    AttentionInterface.register(NAME, _slim_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


class PassThroughCache(Cache):
    """A cache that hands keys and values on untouched: the fused operator keeps them itself."""

    def __init__(self, past: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__(layers=[])
        self.past = past

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values alone."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Past length in tokens."""
        return self.past[layer_idx][0].shape[2]
