"""Attention whose heads share weights: one head of each cluster attends, and all heads of it weigh values alike.

Agarwal et al., "CHAI: Clustered Head Attention for Efficient LLM Inference", 2024, in ONNX's own operators.
Past and present of such a layer have room for the whole text, and lie in one buffer: new tokens are written into their
rows. Which heads attend is fixed, or an input of the graph that the runtime fills in for each prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvslim.transform.clustering import Formed
from kvslim.transform.operators import ExportStep
from kvslim.transform.scoring import Scoring
from kvslim.types import FIRST_TOKENS

States = tuple[Tensor, Tensor, Tensor]


def clustered_attention(step: ExportStep, states: States, scoring: Scoring, membership: Tensor | None) -> Tensor:
    """Attention by stock operators.

    Args:
        step: Where it stands in the graph; takes the present cache.
        states: Query and key [batch, heads, length, dim], of representatives or, for clusters that are inputs of the
            graph, of all heads; and value [batch, kv_heads, length, dim].
        scoring: How scores become weights.
        membership: [q_heads] the representative of each query head, as its place among them; None: see `step.clusters`.

    Returns:
        [batch, length, q_heads, dim].
    """
    query, key, value = states
    if membership is None:
        assert step.clusters is not None
        representatives, membership = step.clusters
        query, key = (torch.index_select(states, 1, representatives) for states in (query, key))
    tokens = _tokens(step, query.shape[2])
    keys, values = (_written(past, tokens, new) for past, new in zip(step.past, (key, value), strict=True))
    step.present = (keys, values)
    scores = scoring.capped(_by_head(_grouped(query * scoring.scale, keys) @ keys.transpose(-1, -2), query))
    hidden = scoring.hidden(tokens, torch.arange(keys.shape[2]))
    own = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    if step.clusters is not None:
        step.attentions = own
    weights = torch.index_select(own, 1, membership)
    return _by_head(_grouped(weights, values) @ values, weights).transpose(1, 2)


def evaluated_clusters(states: States, scoring: Scoring, membership: Tensor | None, formed: Formed | None) -> Tensor:
    """What `clustered_attention` gives for whole texts, in torch.

    Args:
        states: As there, all of the text.
        scoring: As there.
        membership: As there.
        formed: How each text forms clusters where the membership is not fixed.

    Returns:
        [batch, q_heads, length, dim].
    """
    query, key, value = states
    own = scoring.weights(query, key.repeat_interleave(query.shape[1] // key.shape[1], 1))
    if membership is not None:
        weights = own[:, membership]
    else:
        assert formed is not None
        first, values = own[:, :, :FIRST_TOKENS, :FIRST_TOKENS], value[:, :, :FIRST_TOKENS]
        texts = zip(first.double().numpy(), values.double().numpy(), strict=True)
        chosen = torch.tensor([formed.clusters(*text) for text in texts])
        shared = torch.gather(own, 1, chosen[:, :, None, None].expand_as(own))
        weights = torch.cat([own[:, :, :FIRST_TOKENS], shared[:, :, FIRST_TOKENS:]], dim=2)
    return weights @ value.repeat_interleave(weights.shape[1] // value.shape[1], 1)


def _tokens(step: ExportStep, length: int) -> Tensor:
    """Positions of the new tokens, [batch, length]; padding of a first, unequal batch comes after its text."""
    start = (step.mask.sum(-1) - length).clamp(min=0)
    return start[:, None] + torch.arange(length)


def _written(past: Tensor, tokens: Tensor, new: Tensor) -> Tensor:
    """The cache with new rows in the place of their tokens."""
    rows = tokens[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return torch.scatter(past, 2, rows, new)


def _grouped(states: Tensor, cache: Tensor) -> Tensor:
    """[batch, heads, length, dim] as [batch, cache heads, group * length, dim]: the cache is not repeated."""
    batch, _, _, dim = states.shape
    return states.reshape(batch, cache.shape[1], -1, dim)


def _by_head(states: Tensor, like: Tensor) -> Tensor:
    """[batch, cache heads, group * length, dim] as [batch, heads, length, dim]."""
    return states.reshape(*like.shape[:3], states.shape[-1])
