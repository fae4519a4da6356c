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
BLOCK = 256  # queries


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
    if scoring.softcap is None and scoring.window is None and scoring.recent is None:
        found = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scoring.scale, enable_gqa=True
        )
    else:
        found = _attended_by_blocks(query, key, value, scoring)
    return found.transpose(1, 2)


def _attended_by_blocks(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Attention to the tokens that blocks of queries reach: over a whole text, scores take much time or memory."""
    found = []
    for start in range(0, query.shape[2], BLOCK):
        stop = min(start + BLOCK, query.shape[2])
        keys = scoring.reach(start, stop)
        hidden = scoring.hidden(torch.arange(start, stop), keys)
        block = query[:, :, start:stop], key[:, :, keys], value[:, :, keys]
        if scoring.softcap is None:
            part = nn.functional.scaled_dot_product_attention(
                *block, attn_mask=~hidden, scale=scoring.scale, enable_gqa=True
            )
        else:
            part = _attended_softly(*block, hidden, scoring)
        found.append(part)
    return torch.cat(found, dim=2)


def _attended_softly(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scoring: Scoring) -> Tensor:
    """Attention with a softcap, which torch's operator does not have."""
    scores = scoring.scores(query.unflatten(1, (key.shape[1], -1)), key[:, :, None])
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ value[:, :, None]).flatten(1, 2)
