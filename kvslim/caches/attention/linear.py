"""Attention over a ring of sinks and recent tokens, and a state that sums up all tokens that left it.

Features of keys and queries stand for the exponential of a score, exp(q.k) = f(q).g(k), so that what a query takes of
many tokens needs but two sums: that of g(k) v, and that of g(k) (Katharopoulos et al., "Transformers are RNNs", 2020,
section 3). Trained features come closest (Zhang et al., "The Hedgehog & the Porcupine", 2024, section 4), and recent
tokens stay exact, normalised together with the rest (Zhang et al., "LoLCATs", 2024, section 3.3):

    out_t = (sum_exact exp(q_t.k_j) v_j + f(q_t).S_t) / (sum_exact exp(q_t.k_j) + f(q_t).z_t)
    S_t = sum_far g(k_j) v_j,  z_t = sum_far g(k_j),  far: behind the sinks, and at least a window before t

with g(k) = softmax(A k + a) and f(q) = exp(B q + b). So row i of a state acts as one more cached token, whose score
is (B q + b)_i + log z_i and whose value is S_i / z_i: everything is one softmax, and no sum can overflow. Tokens that
leave the ring within a step are rows of their own, with the score log(f(q).g(k)), and join the state after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvslim.caches.attention.base import BLOCK, States
from kvslim.caches.attention.packed import by_group, by_kv_head, by_query_head, hidden_rows, nothing
from kvslim.caches.attention.window import Ring, RingAttention, Span, places, span_of, write_rows
from kvslim.transform.operators import ExportStep, gathered
from kvslim.transform.scoring import Scoring

if TYPE_CHECKING:
    from kvslim.transform.attention import SlimAttention

TINY = 1e-30  # a sum of weights that no token has added to


@dataclass(frozen=True)
class FeatureMaps:
    """The maps of a layer, A and a, B and b, for each kv head.

    Attributes:
        key_weight: [kv_heads, features, head_dim].
        key_bias: [kv_heads, features].
        query_weight: [kv_heads, features, head_dim], before the scale of scores.
        query_bias: [kv_heads, features].
    """

    key_weight: Tensor
    key_bias: Tensor
    query_weight: Tensor
    query_bias: Tensor

    @classmethod
    def of(cls, slim: SlimAttention, kv_heads: int) -> FeatureMaps:
        """Those of a layer, which has the rows of all heads as one matrix."""
        rows = (slim.key_features_weight, slim.key_features_bias, slim.query_features_weight, slim.query_features_bias)
        return cls(*(part.unflatten(0, (kv_heads, -1)) for part in rows if part is not None))

    def of_keys(self, key: Tensor) -> Tensor:
        """g(k) [batch, kv_heads, tokens, features] of keys [batch, kv_heads, tokens, head_dim]."""
        return (key @ self.key_weight.transpose(1, 2) + self.key_bias[:, None]).softmax(-1)

    def of_queries(self, query: Tensor, scale: float) -> Tensor:
        """log f(q) [batch, kv_heads, queries, features] of queries [batch, kv_heads, queries, head_dim]."""
        return query @ (self.query_weight * scale).transpose(1, 2) + self.query_bias[:, None]


@dataclass(frozen=True)
class Far:
    """What a query sees that is in no ring.

    Attributes:
        state: [batch, kv_heads, features, head_dim + 1], S and behind it z.
        features: [batch, kv_heads, tokens, features], g(k) of tokens that leave the ring.
        value: [batch, kv_heads, tokens, head_dim] of them.
        hidden: Those that a query does not see, bool [batch, 1, queries, tokens].
    """

    state: Tensor
    features: Tensor
    value: Tensor
    hidden: Tensor

    def scores(self, logs: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the state's rows and of the tokens, given log f(q)."""
        most = logs.amax(-1, keepdim=True)
        tokens = (torch.exp(logs - most) @ self.features.transpose(2, 3)).clamp(min=TINY).log() + most
        return logs + self._sums.log().transpose(2, 3), tokens.masked_fill(self.hidden, -torch.inf)

    @property
    def means(self) -> Tensor:
        """[batch, kv_heads, features, head_dim], the value that each row of the state stands for."""
        return self.state[..., :-1] / self._sums

    @property
    def _sums(self) -> Tensor:
        return self.state[..., -1:].clamp(min=TINY)


class StateAttention(RingAttention):
    """Ring and state, by stock operators."""

    def evaluated(self, slim: SlimAttention, states: States, scoring: Scoring) -> Tensor:
        """Attention over a whole text, by blocks of queries."""
        maps = FeatureMaps.of(slim, states[1].shape[1])
        return torch.cat(list(attended_blocks(states, maps, self.ring, scoring)), dim=1)

    def exported(self, slim: SlimAttention, step: ExportStep, states: States, scoring: Scoring) -> Tensor:
        """Reads ring and state, then writes the new tokens into the ring and adds those that left it to the state."""
        (query, key, value), ring, length = states, self.ring, states[0].shape[2]
        (*held, state), heads, group = step.past, key.shape[1], query.shape[1] // key.shape[1]
        span, maps = span_of(step, query), FeatureMaps.of(slim, heads)
        exact = [torch.cat(rows, dim=2) for rows in zip(held, (key, value), strict=True)]
        hidden = step.once(("hidden", ring, group), lambda: torch.cat(hidden_rows(ring, span, scoring, query, key), -1))
        left = step.once(("left", ring, heads), lambda: places(_rows_left(ring, span, length), heads))
        joins = step.once(("joins", ring), lambda: _joins(ring, span, length))
        late = step.once(("late", ring, group), lambda: by_group(_late(ring, span, length), group))
        left_key, left_value = (gathered(rows, left) for rows in exact)
        far = Far(state, maps.of_keys(left_key) * joins, left_value, late)
        found = _attended(by_kv_head(query, heads), (exact[0], exact[1]), hidden, far, maps, scoring)
        after = nothing([found])
        rings = write_rows(step, ring, span, (key, value), length, after)
        step.present = (*rings, state + (_sums(far.features, left_value) + after))
        return by_query_head(found, query)


def attended_blocks(
    states: States, maps: FeatureMaps, ring: Ring, scoring: Scoring, wanted: frozenset[int] | None = None
) -> Iterator[Tensor]:
    """What a graph gives for a whole text, [batch, block, q_heads, head_dim] for each block of queries.

    Args:
        states: Query, key and value, [batch, heads, length, head_dim] each, after RoPE.
        maps: Of the layer.
        ring: Of the layer.
        scoring: How scores become weights, with what the ring hides.
        wanted: First tokens of the blocks to give; None for all.
    """
    query, key, value = states
    group, features = query.shape[1] // key.shape[1], maps.of_keys(key)
    state = torch.zeros(*key.shape[:2], features.shape[3], value.shape[3] + 1)
    done = ring.sinks
    for start in range(0, query.shape[2], BLOCK):
        stop = min(start + BLOCK, query.shape[2])
        first = max(start - ring.window, ring.sinks)
        if first > done:
            state, done = state + _sums(features[:, :, done:first], value[:, :, done:first]), first
        if wanted is not None and start not in wanted:
            continue
        tokens, seen = torch.arange(start, stop), scoring.reach(start, stop)
        left = torch.arange(first, max(first, stop - ring.window))
        hidden, late = scoring.hidden(tokens, seen), tokens[:, None] - left < ring.window
        far = Far(state, features[:, :, left], value[:, :, left], by_group(late[None], group))
        queries = by_kv_head(query[:, :, start:stop], key.shape[1])
        exact = key[:, :, seen], value[:, :, seen]
        found = _attended(queries, exact, by_group(hidden[None], group), far, maps, scoring)
        yield by_query_head(found, query[:, :, start:stop])


def _attended(
    query: Tensor, exact: tuple[Tensor, Tensor], hidden: Tensor, far: Far, maps: FeatureMaps, scoring: Scoring
) -> Tensor:
    """One softmax over exact tokens, the state, and tokens that leave: [batch, kv_heads, group * length, head_dim]."""
    scores = scoring.scores(query, exact[0]).masked_fill(hidden, -torch.inf)
    parts = [scores, *far.scores(maps.of_queries(query, scoring.scale))]
    weights = torch.cat(parts, dim=-1).softmax(-1).split([part.shape[3] for part in parts], dim=-1)
    rows = exact[1], far.means, far.value
    near, summed, leaving = (weight @ each for weight, each in zip(weights, rows, strict=True))
    return near + summed + leaving


def _sums(features: Tensor, value: Tensor) -> Tensor:
    """What tokens add to a state: sums of g(k) v, and of g(k)."""
    return features.transpose(2, 3) @ torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)


def _leaving(ring: Ring, span: Span, length: int) -> Tensor:
    """Positions [batch, length] of the tokens that a window before each new token leaves behind; below 0 for none."""
    return span[0][:, None] - ring.window + torch.arange(length)


def _rows_left(ring: Ring, span: Span, length: int) -> Tensor:
    """Where these tokens stand among the rows of the ring and, behind them, the new ones."""
    tokens, start = _leaving(ring, span, length).clamp(min=0), span[0][:, None]
    return torch.where(tokens < start, ring.row(tokens), ring.sinks + ring.window + tokens - start)


def _joins(ring: Ring, span: Span, length: int) -> Tensor:
    """1 for those that join the state, [batch, 1, length, 1], else 0: sinks stay, and padding pushes nothing out."""
    tokens = _leaving(ring, span, length)
    joins = torch.logical_and(tokens >= ring.sinks, tokens < span[1][:, None] - ring.window)
    return joins[:, None, :, None].to(torch.float32)


def _late(ring: Ring, span: Span, length: int) -> Tensor:
    """Those of them that a new token does not see in this way, [batch, length, length]: it has them in its window."""
    tokens, new = _leaving(ring, span, length), span[0][:, None] + torch.arange(length)
    hidden = new[:, :, None] - tokens[:, None] < ring.window
    return torch.logical_or(hidden, (tokens < ring.sinks)[:, None])
