"""Attention over a ring of attention sinks and recent tokens, and over packed codes of what left it.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023, section 3.2, in ONNX's own operators. A
ring has rows for S sinks and W recent tokens: token p < S lies in row p, a later one in row S + (p - S) mod W. Keys are
cached after RoPE, so the order of the rows does not matter; which token a row holds follows from the number of tokens
so far.

New tokens are written into the ring's own rows. Where past and present lie in one memory, onnxruntime writes these rows
and copies nothing; so the write must come after every read of the ring, and says so by taking a nothing from each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvslim.transform.operators import ExportStep
from kvslim.transform.scoring import Scoring
from kvslim.transform.storage import Integers, Levels

EVALUATION_CHUNK = 16  # tokens of a step, as quality is measured
_EMPTY = 1 << 40  # the position of what a row holds before a token comes: after every query

Stores = tuple[Integers, Integers] | None
Codebooks = tuple[Levels, Levels] | None
States = tuple[Tensor, Tensor, Tensor]
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
        kept = (held <= last) & ((rows < self.sinks) | (held >= self.sinks))
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


def ring_attention(step: ExportStep, states: States, scoring: Scoring, ring: Ring, stores: Stores) -> Tensor:
    """Attention over the ring and the new tokens, by stock operators.

    Args:
        step: Where it stands in the graph; takes the present ring.
        states: Query, key and value, [batch, heads, length, dim] each; key and value after the codes.
        scoring: How scores become weights.
        ring: Its rows.
        stores: How it stores keys and values; None for float32.

    Returns:
        [batch, length, q_heads, dim].
    """
    query, key, value = states
    span, grouped = _span(step, query), _grouped(query, key.shape[1]) * scoring.scale
    hidden = _hidden(ring, span, scoring, query, key)
    if stores is None:
        attended = _attend(scoring, [grouped] * 2, [step.past[0], key], [step.past[1], value], hidden)
        step.present = _written(ring, span, step.past, (key, value), after=attended[:1])
        return _ungrouped(attended[0] + attended[1], query)
    new = stores[0].stored(key), stores[1].stored(value)
    keys, values = ([store.read(rows) for rows in pair] for store, *pair in zip(stores, step.past, new, strict=True))
    attended = _attend(scoring, [grouped * stores[0].step[:, None]] * 2, keys, values, hidden)
    step.present = _written(ring, span, step.past, new, after=attended[:1])
    return _ungrouped((attended[0] + attended[1]) * stores[1].step[:, None], query)


def packed_attention(step: ExportStep, states: States, scoring: Scoring, ring: Ring, books: Codebooks) -> Tensor:
    """Attention over packed codes, the exact ring and the new tokens; returns the codes of what leaves the ring.

    All sequences of a batch have one length. Arguments and result as for `ring_attention`, but `step.past` goes on
    with codes of keys and of values, uint8 [batch, rows, heads, bytes], and `step.present` with the new rows of them.
    """
    assert books is not None
    query, key, value = states
    past, codes = step.past[:2], step.past[2:]
    span, grouped = _span(step, query), _grouped(query, key.shape[1]) * scoring.scale
    if ring not in step.shared:  # its length is known to no one before it runs, and dear to trace in every layer
        step.shared[ring] = _leaving(ring, span, query.shape[2])
    left = [_left(ring, span, step.shared[ring], held, new) for held, new in zip(past, (key, value), strict=True)]
    read = [book.read(rows.transpose(1, 2)) for book, rows in zip(books, codes, strict=True)]
    hidden = [_hidden_codes(ring, span, scoring, query, key, codes[0]), *_hidden(ring, span, scoring, query, key)]
    queries = [grouped * books[0].scale[:, None], grouped, grouped]
    attended = _attend(scoring, queries, [read[0], past[0], key], [read[1], past[1], value], hidden)
    rings = _written(ring, span, past, (key, value), after=[attended[1], *left])
    step.present = (*rings, *(book.stored(rows) for book, rows in zip(books, left, strict=True)))
    return _ungrouped(attended[0] * books[1].scale[:, None] + attended[1] + attended[2], query)


def evaluated_packed_attention(states: States, scoring: Scoring, ring: Ring, books: Codebooks) -> Tensor:
    """What `packed_attention` gives for a whole text that comes in chunks of 16, in torch; arguments as there.

    Returns:
        [batch, q_heads, length, dim].
    """
    assert books is not None
    query, key, value = states
    group, tokens = query.shape[1] // key.shape[1], torch.arange(query.shape[2])
    read = [
        book.read(book.stored(exact.transpose(1, 2))).transpose(1, 2) * book.scale[:, None]
        for book, exact in zip(books, (key, value), strict=True)
    ]
    key, value, coded_key, coded_value = (part.repeat_interleave(group, 1) for part in (key, value, *read))
    oldest = tokens // EVALUATION_CHUNK * EVALUATION_CHUNK - ring.window
    exact = (tokens < ring.sinks) | (tokens >= oldest[:, None])
    scores = torch.where(exact, scoring.scores(query, key), scoring.scores(query, coded_key))
    weights = scores.masked_fill(scoring.hidden(tokens, tokens), -torch.inf).softmax(-1)
    return (weights * exact) @ value + (weights * ~exact) @ coded_value


def _span(step: ExportStep, query: Tensor) -> Span:
    """Tokens before this step and after it, [batch] each; padding of a first, unequal batch is not counted."""
    total = step.mask.sum(-1)
    return (total - query.shape[2]).clamp(min=0), total


def _grouped(query: Tensor, kv_heads: int) -> Tensor:
    """[batch, q_heads, length, dim] as [batch, kv_heads, group * length, dim]: keys and values are not repeated."""
    batch, q_heads, length, dim = query.shape
    return query.reshape(batch, kv_heads, q_heads // kv_heads * length, dim)


def _ungrouped(attended: Tensor, query: Tensor) -> Tensor:
    """[batch, kv_heads, group * length, dim] as [batch, length, q_heads, dim]."""
    batch, q_heads, length, _ = query.shape
    return attended.reshape(batch, q_heads, length, attended.shape[-1]).transpose(1, 2)


def _attend(
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


def _hidden(ring: Ring, span: Span, scoring: Scoring, query: Tensor, key: Tensor) -> list[Tensor | None]:
    """Rows of the ring, and new tokens, that a query is not to see: bool [batch, 1, group * length, rows] each."""
    new = span[0][:, None] + torch.arange(query.shape[2])
    group = query.shape[1] // key.shape[1]
    return [_by_group(scoring.hidden(new, tokens), group) for tokens in (ring.positions(span[0]), new)]


def _hidden_codes(ring: Ring, span: Span, scoring: Scoring, query: Tensor, key: Tensor, codes: Tensor) -> Tensor | None:
    """The same for packed codes, whose tokens are S, S + 1 and so on; None where every query sees all."""
    if scoring.window is None:
        return None
    new = span[0][:, None] + torch.arange(query.shape[2])
    tokens = ring.sinks + torch.arange(codes.shape[1])
    return _by_group(scoring.hidden(new, tokens[None]), query.shape[1] // key.shape[1])


def _by_group(hidden: Tensor, group: int) -> Tensor:
    return hidden[:, None].repeat(1, 1, group, 1)


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


def _written(
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
