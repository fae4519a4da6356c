"""Attention over a kind of cache: evaluated in torch, exported as operators; the two must agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kvslim.transform.operators import ExportStep
from kvslim.transform.scoring import Scoring

if TYPE_CHECKING:
    from kvslim.transform.attention import SlimAttention

States = tuple[Tensor, Tensor, Tensor]


class CacheAttention:
    """One per layer. The numbers (encoders, scales, levels) are buffers of the layer's `SlimAttention`.

    A subclass says what attention over its cache gives for a whole text (`evaluated`), and which operators do the same
    in a graph that holds a cache (`exported`).
    """

    def attend(self, slim: SlimAttention, states: States, scoring: Scoring) -> Tensor:
        """Attention of a layer.

        Args:
            slim: The layer's numbers.
            states: Query, key and value, [batch, heads, length, head_dim] before RoPE, as the model projects them.
            scoring: How scores become weights.

        Returns:
            [batch, length, q_heads, dim], dim being the rank of the value code.
        """
        query, key, value = map(slim.projected, ("query", "key", "value"), states)
        if slim.step is None:
            query, key = slim.rotated(query, key, value, scoring)
            return self.evaluated(slim, slim.coded(query, key, value), scoring)
        if self.rotates_inside(slim, slim.step, query.shape[-1]):
            return self.exported(slim, slim.step, slim.coded(query, key, value), scoring)
        return self.exported(slim, slim.step, slim.coded_in_graph(slim.step, query, key, value), scoring)

    def evaluated(self, slim: SlimAttention, states: States, scoring: Scoring) -> Tensor:
        """Attention over a whole text, [batch, length, q_heads, dim].

        Args:
            slim: The layer's numbers.
            states: Query, key and value, [batch, heads, length, dim], after RoPE and codes.
            scoring: How scores become weights.
        """
        raise NotImplementedError

    def exported(self, slim: SlimAttention, step: ExportStep, states: States, scoring: Scoring) -> Tensor:
        """Operators of a graph, and `step.present`; arguments and result as for `evaluated`."""
        raise NotImplementedError

    def rotates_inside(self, slim: SlimAttention, step: ExportStep, head_dim: int) -> bool:
        """Whether the operator applies RoPE by itself."""
        return False

    def scoring(self, scoring: Scoring) -> Scoring:
        """The model's own scoring, with what this kind of cache hides."""
        return scoring

    def note(self) -> object:
        """What the graph's metadata are to say of this layer."""
        return None


def attended(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Causal attention in torch, [batch, length, q_heads, dim]."""
    if scoring.softcap is None:
        mask = None
        if scoring.window is not None or scoring.recent is not None:
            places = torch.arange(query.shape[-2])
            mask = ~scoring.hidden(places, places)
        found = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scoring.scale, enable_gqa=True
        )
    else:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        found = scoring.weights(query, key) @ value
    return found.transpose(1, 2)
