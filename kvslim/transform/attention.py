"""The one slim attention: evaluated in torch, exported as onnxruntime's fused GroupQueryAttention.

transformers calls it through its `AttentionInterface` with q, k and v after norms and RoPE, for every family alike,
so no family's modelling code is repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface

NAME = "kvslim"
Observer = Callable[[Tensor, Tensor, Tensor, float], None]


@dataclass
class ExportStep:
    """The graph inputs that one layer's fused attention reads, and the cache tensors that it returns.

    Attributes:
        past: Key and value cache, [batch, kv_heads, past_length, dim] each.
        last: [batch] int32, index of the last attended token of each sequence.
        total: [] int32, past length and new tokens together.
        present: Key and value cache with the new tokens, once attention has run.
    """

    past: tuple[Tensor, Tensor]
    last: Tensor
    total: Tensor
    present: tuple[Tensor, Tensor] | None = None


class SlimAttention(nn.Module):
    """Codes, folded weights and scales of one layer; lives at `attention.kvslim`.

    Attributes:
        query_weight, key_weight, value_weight: [heads * dim, hidden], projections that replace the model's own.
        query_bias, key_bias, value_bias: [heads * dim], or None.
        query_encoder: [q_heads, head_dim, rank], or None; applied after RoPE.
        key_encoder: [kv_heads, head_dim, rank], or None.
        key_scale, value_scale: [kv_heads, rank] steps of an int8 cache, or None for a float32 one.
        hidden: Input of the model's projections, caught by a hook, [batch, length, hidden].
        observer: Called with q, k, v and the score scale when calibrating.
        step: Set while exporting.
    """

    query_weight: Tensor | None
    query_encoder: Tensor | None
    key_encoder: Tensor | None
    key_scale: Tensor | None
    value_scale: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        for side in ("query", "key", "value"):
            self.register_buffer(f"{side}_weight", None)
            self.register_buffer(f"{side}_bias", None)
        for name in ("query_encoder", "key_encoder", "key_scale", "value_scale"):
            self.register_buffer(name, None)
        self.per_tensor = False
        self.hidden: Tensor | None = None
        self.observer: Observer | None = None
        self.step: ExportStep | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention over the coded cache.

        Args:
            query: [batch, q_heads, length, head_dim]; key and value alike with kv_heads.
            key: See query.
            value: See query.
            scaling: Factor of the scores, 1 / sqrt(head_dim) of the original model.

        Returns:
            [batch, length, q_heads, dim], dim being the rank of the value code.
        """
        if self.observer is not None:
            self.observer(query, key, value, scaling)
        query = self._projected("query", query, self.query_encoder)
        key = self._projected("key", key, self.key_encoder)
        value = self._projected("value", value, None)
        if self.step is not None:
            return self._fused(self.step, query, key, value, scaling)
        attended = nn.functional.scaled_dot_product_attention(
            query,
            _through_int8(key, self.key_scale),
            _through_int8(value, self.value_scale),
            is_causal=True,
            scale=scaling,
            enable_gqa=True,
        )
        return attended.transpose(1, 2)

    def _projected(self, side: str, states: Tensor, encoder: Tensor | None) -> Tensor:
        weight: Tensor | None = getattr(self, f"{side}_weight")
        if weight is not None:
            assert self.hidden is not None  # the hook runs before attention does
            flat = nn.functional.linear(self.hidden, weight, getattr(self, f"{side}_bias"))
            return flat.unflatten(-1, (states.shape[1], -1)).transpose(1, 2)
        return states if encoder is None else states @ encoder

    def _fused(self, step: ExportStep, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        batch, q_heads, length, dim = query.shape
        kv_heads = key.shape[1]
        attributes: dict[str, Any] = {"num_heads": q_heads, "kv_num_heads": kv_heads, "scale": float(scaling)}
        inputs: list[Tensor | None] = [*map(_packed, (query, key, value)), *step.past, step.last, step.total]
        if self.key_scale is not None and self.value_scale is not None:
            kind = "PER_TENSOR" if self.per_tensor else "PER_CHANNEL"
            attributes |= {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": 8}
            inputs += [None] * 5 + [self._kernel_scale(self.key_scale), self._kernel_scale(self.value_scale)]
        past_key, past_value = step.past
        total = past_key.shape[2] + length
        attended, *present = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            attrs=attributes,
            dtypes=[query.dtype, past_key.dtype, past_value.dtype],
            shapes=[(batch, length, q_heads * dim), (batch, kv_heads, total, dim), (batch, kv_heads, total, dim)],
            version=1,
        )
        step.present = (present[0], present[1])
        return attended.reshape(batch, length, q_heads, dim)

    def _kernel_scale(self, scale: Tensor) -> Tensor:
        return scale.flatten()[:1] if self.per_tensor else scale[None, :, None, :]


def _packed(states: Tensor) -> Tensor:
    """[batch, heads, length, dim] as the [batch, length, heads * dim] that the fused operator reads."""
    return states.transpose(1, 2).flatten(2)


def _through_int8(states: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return states
    step = scale[None, :, None, :]
    return (states / step).round().clamp(-128, 127) * step


def _slim_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    slim: SlimAttention = module.kvslim  # type: ignore[assignment]
    return slim(query, key, value, scaling), None


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
