"""Attention over packed codes, the exact ring before them, and the new tokens, by stock operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvslim.caches.attention.base import CacheAttention, States
from kvslim.caches.attention.window import Ring, Span, span_of, write_rows
from kvslim.transform.operators import ExportStep
from kvslim.transform.scoring import Scoring
from kvslim.transform.storage import Levels
from kvslim.transform.straight_through import through

if TYPE_CHECKING:
    from kvslim.transform.attention import SlimAttention

EVALUATION_CHUNK = 16  # tokens of a step, as quality is measured


class PackedAttention(CacheAttention):
    """Sinks and recent tokens exact, all others as packed codes."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring

    def evaluated(self, slim: SlimAttention, states: States, scoring: Scoring) -> Tensor:
        """What a graph gives for a whole text that comes in chunks of 16."""
        books, ring = _codebooks(slim), self.ring
        query, key, value = states
        group, tokens = query.shape[1] // key.shape[1], torch.arange(query.shape[2])
        read = [
            through(exact, book.read(book.stored(exact.transpose(1, 2))).transpose(1, 2) * book.scale[:, None])
            for book, exact in zip(books, (key, value), strict=True)
        ]
        key, value, coded_key, coded_value = (part.repeat_interleave(group, 1) for part in (key, value, *read))
        oldest = tokens // EVALUATION_CHUNK * EVALUATION_CHUNK - ring.window
        exact = (tokens < ring.sinks) | (tokens >= oldest[:, None])
        scores = torch.where(exact, scoring.scores(query, key), scoring.scores(query, coded_key))
        weights = scores.masked_fill(scoring.hidden(tokens, tokens), -torch.inf).softmax(-1)
        return ((weights * exact) @ value + (weights * ~exact) @ coded_value).transpose(1, 2)

    def exported(self, slim: SlimAttention, step: ExportStep, states: States, scoring: Scoring) -> Tensor:
        """Reads codes and ring; gives the ring, and the codes of what leaves it.

        All sequences of a batch have one length. `step.past` is the ring's keys and values, then their codes, uint8
        [batch, rows, heads, bytes]; `step.present` has the new rows of codes alone.
        """
        books, ring = _codebooks(slim), self.ring
        query, key, value = states
        past, codes = step.past[:2], step.past[2:]
        span, grouped = span_of(step, query), by_kv_head(query, key.shape[1]) * scoring.scale
        # Its length is unknown before it runs, and costly to trace in every layer.
        leaving = step.once(("leaving", ring), lambda: _leaving(ring, span, query.shape[2]))
        left = [_left(ring, span, leaving, held, new) for held, new in zip(past, (key, value), strict=True)]
        read = [book.read(rows.transpose(1, 2)) for book, rows in zip(books, codes, strict=True)]
        coded = _hidden_codes(ring, span, scoring, query, key, codes[0])
        hidden = [coded, *hidden_rows(ring, span, scoring, query, key)]
        queries = [grouped * books[0].scale[:, None], grouped, grouped]
        blocks = _attend_blocks(scoring, queries, [read[0], past[0], key], [read[1], past[1], value], hidden)
        rings = write_rows(step, ring, span, (key, value), query.shape[2], nothing([blocks[1], *left]))
        step.present = (*rings, *(book.stored(rows) for book, rows in zip(books, left, strict=True)))
        return by_query_head(blocks[0] * books[1].scale[:, None] + blocks[1] + blocks[2], query)


def _codebooks(slim: SlimAttention) -> tuple[Levels, Levels]:
    """Levels and scales of keys and of values."""
    parts = (slim.key_levels, slim.key_scale), (slim.value_levels, slim.value_scale)
    key, value = (Levels(levels, scale) for levels, scale in parts if levels is not None and scale is not None)
    return key, value


def _hidden_codes(ring: Ring, span: Span, scoring: Scoring, query: Tensor, key: Tensor, codes: Tensor) -> Tensor | None:
    """Packed codes that a query is not to see, of tokens S, S + 1 and so on; None where every query sees all."""
    if scoring.window is None:
        return None
    new = span[0][:, None] + torch.arange(query.shape[2])
    tokens = ring.sinks + torch.arange(codes.shape[1])
    return by_group(scoring.hidden(new, tokens[None]), query.shape[1] // key.shape[1])


def _leaving(ring: Ring, span: Span, length: int) -> Tensor:
    """Positions of the tokens that leave the window in this step, oldest first."""
    tokens = (span[0][0] - ring.window).clamp(min=ring.sinks) + torch.arange(length)
    return tokens[tokens < span[1][0] - ring.window]


def _left(ring: Ring, span: Span, tokens: Tensor, held: Tensor, new: Tensor) -> Tensor:
    """Keys or values of tokens, from the ring or the new ones: [batch, tokens, heads, dim]."""
    start = span[0][0]
    arrived = torch.index_select(new, 2, (tokens - start).clamp(min=0))
    rows = torch.where((tokens < start)[:, None], torch.index_select(held, 2, ring.row(tokens)), arrived)
    return rows.transpose(1, 2)


def by_kv_head(query: Tensor, kv_heads: int) -> Tensor:
    """[batch, q_heads, length, dim] as [batch, kv_heads, group * length, dim]: keys and values are not repeated."""
    batch, q_heads, length, dim = query.shape
    return query.reshape(batch, kv_heads, q_heads // kv_heads * length, dim)


def by_query_head(attended: Tensor, query: Tensor) -> Tensor:
    """[batch, kv_heads, group * length, dim] as [batch, length, q_heads, dim]."""
    batch, q_heads, length, _ = query.shape
    return attended.reshape(batch, q_heads, length, attended.shape[-1]).transpose(1, 2)


def _attend_blocks(
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


def hidden_rows(ring: Ring, span: Span, scoring: Scoring, query: Tensor, key: Tensor) -> list[Tensor]:
    """Rows of the ring, and new tokens, that a query is not to see: bool [batch, 1, group * length, rows] each."""
    new = span[0][:, None] + torch.arange(query.shape[2])
    group = query.shape[1] // key.shape[1]
    return [by_group(scoring.hidden(new, tokens), group) for tokens in (ring.positions(span[0]), new)]


def by_group(hidden: Tensor, group: int) -> Tensor:
    """The same rows hidden from every query head of a kv head."""
    return hidden[:, None].repeat(1, 1, group, 1)


def nothing(after: Sequence[Tensor]) -> Tensor:
    """Zero, [1], that cannot be had before the tensors `after`, the first of which is not empty.

    It makes a write wait for every read of the ring, since onnxruntime writes into the ring's own memory. Shapes would
    not do: exporter and runtime know them beforehand.
    """
    first = torch.cat([tensor.reshape(-1) for tensor in after])[:1]
    return (first > torch.inf).long()
