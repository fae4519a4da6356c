"""Attention over a full cache: onnxruntime's fused operator, or those of ONNX 24."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kvslim.caches.attention.base import CacheAttention, States, attended
from kvslim.transform.operators import ExportStep, group_query_attention, standard_attention
from kvslim.transform.scoring import Scoring

if TYPE_CHECKING:
    from kvslim.transform.attention import SlimAttention

FUSED_ROTARY_STEP = 16  # the fused operator rotates heads and coordinates in multiples of this


class FullAttention(CacheAttention):
    """Keys and values of all tokens, rounded as the cache stores them."""

    def evaluated(self, slim: SlimAttention, states: States, scoring: Scoring) -> Tensor:
        """Attention over what the cache gives back."""
        query, key, value = states
        key, value = slim.rounded(key, slim.key_scale), slim.rounded(value, slim.value_scale)
        if slim.shared is not None:
            slim.shared.states = key, value
        return attended(query, key, value, scoring)

    def exported(self, slim: SlimAttention, step: ExportStep, states: States, scoring: Scoring) -> Tensor:
        """One operator that rotates, appends and attends; two in layout attention24."""
        if step.layout == "attention24":
            result = standard_attention(step, states, scoring)
        else:
            rotary = slim.rotary if self.rotates_inside(slim, step, states[0].shape[-1]) else None
            result = group_query_attention(
                step,
                states,
                scoring,
                rotary=rotary,
                cache=slim.stored,
                scales=slim.kernel_scales(),
                residuals=slim.kernel_residuals(),
            )
        if slim.shared is not None and step.present is not None:
            slim.shared.states = step.present[0], step.present[1]
        return result

    def rotates_inside(self, slim: SlimAttention, step: ExportStep, head_dim: int) -> bool:
        """Whether the fused operator applies RoPE: not where a code comes after it, or sizes do not fit."""
        if step.layout != "gqa" or slim.rotary is None or slim.key_encoder is not None or slim.key_offset is not None:
            return False
        return head_dim % FUSED_ROTARY_STEP == 0 and slim.rotary.dim % FUSED_ROTARY_STEP == 0
