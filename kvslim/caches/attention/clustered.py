"""Attention whose heads share weights: one head of each cluster attends, and all heads of it weigh values alike.

Agarwal et al., "CHAI: Clustered Head Attention for Efficient LLM Inference", 2024, in ONNX's own operators.
Past and present of such a layer have room for the whole text, and lie in one buffer: new tokens are written into their
rows. Which heads attend is fixed, or an input of the graph that the runtime fills in for each prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvslim.caches.attention.base import CacheAttention, States
from kvslim.caches.clustering import FIRST_TOKENS, Formed
from kvslim.transform.operators import ExportStep
from kvslim.transform.scoring import Scoring

if TYPE_CHECKING:
    from kvslim.transform.attention import SlimAttention


class ClusteredAttention(CacheAttention):
    """One softmax for each cluster of query heads.

    Attributes:
        formed: How clusters are formed from each text's first tokens; None where `slim.membership` fixes them.
    """

    def __init__(self, formed: Formed | None) -> None:
        self.formed = formed

    def evaluated(self, slim: SlimAttention, states: States, scoring: Scoring) -> Tensor:
        """Attention of representatives; with dynamic clusters of all heads over the first tokens."""
        query, key, value = states
        own = scoring.weights(query, key.repeat_interleave(query.shape[1] // key.shape[1], 1))
        weights = own[:, slim.membership] if slim.membership is not None else self._shared(own, value)
        return (weights @ value.repeat_interleave(weights.shape[1] // value.shape[1], 1)).transpose(1, 2)

    def exported(self, slim: SlimAttention, step: ExportStep, states: States, scoring: Scoring) -> Tensor:
        """Stock operators; with dynamic clusters the graph's inputs say which heads attend, and the weights go out."""
        query, key, value = states
        membership = slim.membership
        if membership is None:
            representatives, membership = step.extra
            query, key = (torch.index_select(states, 1, representatives) for states in (query, key))
        tokens = _tokens(step, query.shape[2])
        keys, values = (_written(past, tokens, new) for past, new in zip(step.past, (key, value), strict=True))
        step.present = (keys, values)
        scores = scoring.capped(_by_head(_grouped(query * scoring.scale, keys) @ keys.transpose(-1, -2), query))
        hidden = scoring.hidden(tokens, torch.arange(keys.shape[2]))
        own = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
        if step.extra:
            step.extra_outputs = (own,)
        weights = torch.index_select(own, 1, membership)
        return _by_head(_grouped(weights, values) @ values, weights).transpose(1, 2)

    def note(self) -> object:
        """How clusters are formed, to four digits."""
        if self.formed is None:
            return None
        scale = self.formed.calibrated.max() or 1.0
        return {"count": self.formed.count, "calibrated": np.round(self.formed.calibrated / scale, 4).tolist()}

    def _shared(self, own: Tensor, value: Tensor) -> Tensor:
        """Weights [batch, heads, queries, keys] as each text's own clusters share them."""
        assert self.formed is not None
        first, values = own[:, :, :FIRST_TOKENS, :FIRST_TOKENS], value[:, :, :FIRST_TOKENS]
        texts = zip(*(states.detach().double().cpu().numpy() for states in (first, values)), strict=True)
        chosen = torch.tensor([self.formed.clusters(*text) for text in texts])
        shared = torch.gather(own, 1, chosen[:, :, None, None].expand_as(own))
        return torch.cat([own[:, :, :FIRST_TOKENS], shared[:, :, FIRST_TOKENS:]], dim=2)


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
