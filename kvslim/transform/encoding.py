"""Attention of encoders: every token sees every other; heads that go leave the projections as they leave a decoder's.

Attention is the standard's own operator (ONNX 23): on CPU it is at every length as fast as or faster than onnxruntime's
MultiHeadAttention and than the single operators it stands for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kvslim.loading.architecture import Architecture
from kvslim.transform.attention import SlimAttention
from kvslim.transform.operators import merged
from kvslim.transform.surgery import attention_modules, catch_hidden

NAME = "kvslim_encoder"


def prepare_encoder(model: Any, architecture: Architecture) -> None:
    """Gives every layer of an encoder the slim attention, which until codes come computes what the original does.

    Args:
        model: The encoder, with or without a head; edited.
        architecture: Where its parts live, from the model without a head.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    caller = architecture.query.rpartition(".")[0]
    for attention in attention_modules(model.base_model, architecture):
        slim = SlimAttention(rotary=None, window=None)
        attention.kvslim = slim
        attention.get_submodule(caller).kvslim = slim
        attention.get_submodule(architecture.value).register_forward_pre_hook(catch_hidden(slim))


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention over [batch, heads, length, head_dim]; returns [batch, length, kept heads, head_dim].

    Where no head is kept it gives one zero a token, as a decoder's does.
    """
    slim: SlimAttention = module.kvslim  # type: ignore[assignment]
    if slim.is_dropped:
        return query.new_zeros(query.shape[0], query.shape[2], 1, 1), None
    sides = (("query", query), ("key", key), ("value", value))
    query, key, value = (slim.projected(side, states) for side, states in sides)
    if not torch.compiler.is_exporting():
        attended = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
        return attended.transpose(1, 2), None
    heads = query.shape[1]
    q, k, v = map(merged, (query, key, value))
    fused = torch.onnx.ops.attention(q, k, v, mask, q_num_heads=heads, kv_num_heads=heads, scale=scaling)[0]
    return fused.reshape(*fused.shape[:2], heads, -1), None


def _mask(*_: Any, attention_mask: Tensor | None, **__: Any) -> Tensor | None:
    """[batch, 1, length, length], true where a key may be seen; the operator broadcasts heads alone."""
    if attention_mask is None:
        return None
    batch, length = attention_mask.shape
    return attention_mask.to(torch.bool)[:, None, None, :].expand(batch, 1, length, length)
