"""Attention over a ring of attention sinks and recent tokens.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023, section 3.2, in ONNX's own operators. A
ring has rows for S sinks and W recent tokens: token p < S lies in row p, a later one in row S + (p - S) mod W. Keys are
cached after RoPE, so the order of the rows does not matter; which token a row holds follows from the number of tokens
so far.

New tokens are written into the ring's own rows. Where past and present lie in one memory, onnxruntime writes these rows
and copies nothing; so the write must come after every read of the ring, and says so by taking a nothing from each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvslim.caches.attention.base import CacheAttention, States, attended
from kvslim.transform.operators import ExportStep
from kvslim.transform.scoring import Scoring
from kvslim.transform.storage import Integers

if TYPE_CHECKING:
    from kvslim.transform.attention import SlimAttention

_EMPTY = 1 << 40  # the position of what a row holds before a token comes: after every query

Span = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Ring:
    """Which tokens a ring holds, and where.

    Attributes:
        window: W, rows of recent tokens.
        sinks: S, rows of first tokens.
    """

    window: int
    sinks: int

    def positions(self, total: Tensor) -> Tensor:
        """Position of the token in each row after `total` [batch] tokens: [batch, S + W], beyond all where empty."""
        rows, last = torch.arange(self.sinks + self.window), total[:, None] - 1
        recent = last - torch.remainder(last - rows, self.window)
        held = torch.where(rows < self.sinks, rows, recent)
        in_place = torch.logical_or(rows < self.sinks, held >= self.sinks)
        kept = torch.logical_and(held <= last, in_place)
        return torch.where(kept, held, _EMPTY)

    def survivors(self, start: Tensor, total: Tensor, length: int) -> Tensor:
        """For each of `length` new tokens from `start` on, the one that its row holds in the end: [batch, length].

        That is the last of those that share the row. Tokens at `total` [batch] or beyond only fill up a batch: the last
        true one stands for them.
        """
        last, start = total[:, None] - 1, start[:, None]
        tokens = torch.minimum(start + torch.arange(length), last)
        later = tokens + torch.div(last - tokens, self.window, rounding_mode="floor") * self.window
        return torch.where(tokens < self.sinks, tokens, later) - start

    def row(self, positions: Tensor) -> Tensor:
        """Row of each position."""
        return torch.where(
            positions < self.sinks, positions, self.sinks + torch.remainder(positions - self.sinks, self.window)
        )


class WindowAttention(CacheAttention):
    """Attention over the ring and the new tokens, by stock operators."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring

    def scoring(self, scoring: Scoring) -> Scoring:
        """The model's own scoring, with the tokens hidden that the ring has dropped."""
        return replace(scoring, recent=self.ring.window, sinks=self.ring.sinks)

    def evaluated(self, slim: SlimAttention, states: States, scoring: Scoring) -> Tensor:
        """Attention over what the ring gives back."""
        query, key, value = states
        key, value = slim.rounded(key, slim.key_scale), slim.rounded(value, slim.value_scale)
        return attended(query, key, value, scoring)

    def exported(self, slim: SlimAttention, step: ExportStep, states: States, scoring: Scoring) -> Tensor:
        """Reads the ring, then writes the new tokens into its rows."""
        ring, stores = self.ring, _stores(slim)
        query, key, value = states
        span, grouped = span_of(step, query), by_kv_head(query, key.shape[1]) * scoring.scale
        hidden = hidden_rows(ring, span, scoring, query, key)
        if stores is None:
            blocks = attend_blocks(scoring, [grouped] * 2, [step.past[0], key], [step.past[1], value], hidden)
            step.present = write_rows(ring, span, step.past, (key, value), after=blocks[:1])
            return by_query_head(blocks[0] + blocks[1], query)
        new = stores[0].stored(key), stores[1].stored(value)
        keys, values = (
            [store.read(rows) for rows in pair] for store, *pair in zip(stores, step.past, new, strict=True)
        )
        blocks = attend_blocks(scoring, [grouped * stores[0].step[:, None]] * 2, keys, values, hidden)
        step.present = write_rows(ring, span, step.past, new, after=blocks[:1])
        return by_query_head((blocks[0] + blocks[1]) * stores[1].step[:, None], query)


def _stores(slim: SlimAttention) -> tuple[Integers, Integers] | None:
    """How the ring stores keys and values; None for float32."""
    if slim.key_scale is None or slim.value_scale is None:
        return None
    return Integers(slim.stored, slim.key_scale), Integers(slim.stored, slim.value_scale)


def span_of(step: ExportStep, query: Tensor) -> Span:
    """Tokens before this step and after it, [batch] each; padding of a first, unequal batch is not counted."""
    total = step.mask.sum(-1)
    return (total - query.shape[2]).clamp(min=0), total


def by_kv_head(query: Tensor, kv_heads: int) -> Tensor:
    """[batch, q_heads, length, dim] as [batch, kv_heads, group * length, dim]: keys and values are not repeated."""
    batch, q_heads, length, dim = query.shape
    return query.reshape(batch, kv_heads, q_heads // kv_heads * length, dim)


def by_query_head(attended: Tensor, query: Tensor) -> Tensor:
    """[batch, kv_heads, group * length, dim] as [batch, length, q_heads, dim]."""
    batch, q_heads, length, _ = query.shape
    return attended.reshape(batch, q_heads, length, attended.shape[-1]).transpose(1, 2)


def attend_blocks(
    scoring: Scoring, queries: list[Tensor], keys: list[Tensor], values: list[Tensor], hidden: list[Tensor | None]
) -> list[Tensor]:
    """What one softmax over blocks of rows gives of each block: weights times values, to be scaled and summed.

    The scores are put together and not the rows: they are fewer numbers. Hidden rows are not added to the scores as a
    bias, which the exporter would take for another operator's attention.
    """
    scores = [scoring.capped(query @ rows.transpose(-1, -2)) for query, rows in zip(queries, keys, strict=True)]
    seen = [
        block if mask is None else block.masked_fill(mask, -torch.inf)
        for block, mask in zip(scores, hidden, strict=True)
    ]
    weights = torch.cat(seen, dim=-1).softmax(-1).split([rows.shape[2] for rows in keys], dim=-1)
    return [weight @ rows for weight, rows in zip(weights, values, strict=True)]


def hidden_rows(ring: Ring, span: Span, scoring: Scoring, query: Tensor, key: Tensor) -> list[Tensor | None]:
    """Rows of the ring, and new tokens, that a query is not to see: bool [batch, 1, group * length, rows] each."""
    new = span[0][:, None] + torch.arange(query.shape[2])
    group = query.shape[1] // key.shape[1]
    return [by_group(scoring.hidden(new, tokens), group) for tokens in (ring.positions(span[0]), new)]


def by_group(hidden: Tensor, group: int) -> Tensor:
    """The same rows hidden from every query head of a kv head."""
    return hidden[:, None].repeat(1, 1, group, 1)


def write_rows(
    ring: Ring, span: Span, past: Sequence[Tensor], new: tuple[Tensor, Tensor], after: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The rings with the new tokens in their rows, written once the tensors `after` are there."""
    length, columns = new[0].shape[2:]
    survivors = ring.survivors(*span, length)
    rows = ring.row(span[0][:, None] + survivors) + _nothing(after)
    rows, chosen = (index[:, None, :, None].expand(-1, past[0].shape[1], -1, columns) for index in (rows, survivors))
    key, value = (
        torch.scatter(held, 2, rows, torch.gather(rows_new, 2, chosen))
        for held, rows_new in zip(past, new, strict=True)
    )
    return key, value


def _nothing(after: Sequence[Tensor]) -> Tensor:
    """Zero, [1], that cannot be had before the tensors `after`, the first of which is not empty.

    Their shapes would not do: exporter and runtime know them beforehand.
    """
    first = torch.cat([tensor.reshape(-1) for tensor in after])[:1]
    return (first > torch.inf).long()
