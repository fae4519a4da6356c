"""Attention over a ring of attention sinks and recent tokens, and over packed codes of what left it.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023, section 3.2, in ONNX's own operators. A
ring has rows for S sinks and W recent tokens: token p < S lies in row p, a later one in row S + (p - S) mod W. Keys are
cached after RoPE, so the order of the rows does not matter; which token a row holds follows from the number of tokens
so far.

Only one Concat reads a ring, and all else reads what it made: so past and present may lie in one memory.
"""

from __future__ import annotations

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

    def sources(self, start: Tensor, total: Tensor) -> Tensor:
        """Where each row's token lies in the ring and the tokens `start` to `total` [batch] behind it: [batch, S + W].

        Tokens at `total` or beyond fill up a batch and are not kept.
        """
        rows, held = torch.arange(self.sinks + self.window), self.positions(total)
        arrives = (held >= start[:, None]) & (held < _EMPTY)
        return torch.where(arrives, self.sinks + self.window + held - start[:, None], rows)

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
    total = step.mask.sum(-1)
    start = (total - query.shape[2]).clamp(min=0)
    grouped = _grouped(query, key.shape[1]) * scoring.scale
    if stores is not None:
        key, value = (store.stored(new) for store, new in zip(stores, (key, value), strict=True))
        grouped = grouped * stores[0].step[:, None]
    keys, values = (torch.cat([past, new], dim=2) for past, new in zip(step.past, (key, value), strict=True))
    step.present = _present((keys, values), ring.sources(start, total))
    if stores is not None:
        keys, values = (store.read(held) for store, held in zip(stores, (keys, values), strict=True))
    hidden = _hidden(start, query.shape[2], scoring, ring, query.shape[1] // key.shape[1])
    weights = scoring.capped(grouped @ keys.transpose(-1, -2)).masked_fill(hidden, -torch.inf).softmax(-1)
    attended = weights @ values
    return _ungrouped(attended if stores is None else attended * stores[1].step[:, None], query)


def packed_attention(step: ExportStep, states: States, scoring: Scoring, ring: Ring, books: Codebooks) -> Tensor:
    """Attention over packed codes, the exact ring and the new tokens; returns the codes of what leaves the ring.

    All sequences of a batch have one length. Arguments and result as for `ring_attention`, but `step.past` goes on
    with codes of keys and of values, uint8 [batch, rows, heads, bytes], and `step.present` with the new rows of them.
    """
    assert books is not None
    query, key, value = states
    total = step.mask.sum(-1)
    start = (total - query.shape[2]).clamp(min=0)
    grouped = _grouped(query, key.shape[1]) * scoring.scale
    rings = [torch.cat([past, new], dim=2) for past, new in zip(step.past[:2], (key, value), strict=True)]
    leaving = _leaving(ring, start[0], total[0], query.shape[2])
    new_codes = [
        book.stored(torch.index_select(held, 2, leaving).transpose(1, 2))
        for book, held in zip(books, rings, strict=True)
    ]
    step.present = (*_present((rings[0], rings[1]), ring.sources(start, total)), *new_codes)
    group = query.shape[1] // key.shape[1]
    coded_keys = books[0].read(step.past[2].transpose(1, 2))
    coded = scoring.capped((grouped * books[0].scale[:, None]) @ coded_keys.transpose(-1, -2))
    if scoring.window is not None:
        hidden = _hidden_codes(start, query.shape[2], step.past[2].shape[1], scoring, ring, group)
        coded = coded.masked_fill(hidden, -torch.inf)
    hidden = _hidden(start, query.shape[2], scoring, ring, group)
    exact = scoring.capped(grouped @ rings[0].transpose(-1, -2)).masked_fill(hidden, -torch.inf)
    weights = torch.cat([coded, exact], dim=-1).softmax(-1)
    of_codes, of_ring = weights.split([coded.shape[-1], exact.shape[-1]], dim=-1)
    decoded = of_codes @ books[1].read(step.past[3].transpose(1, 2)) * books[1].scale[:, None]
    return _ungrouped(decoded + of_ring @ rings[1], query)


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


def _grouped(query: Tensor, kv_heads: int) -> Tensor:
    """[batch, q_heads, length, dim] as [batch, kv_heads, group * length, dim]: keys and values are not repeated."""
    batch, q_heads, length, dim = query.shape
    return query.reshape(batch, kv_heads, q_heads // kv_heads * length, dim)


def _ungrouped(attended: Tensor, query: Tensor) -> Tensor:
    """[batch, kv_heads, group * length, dim] as [batch, length, q_heads, dim]."""
    batch, q_heads, length, _ = query.shape
    return attended.reshape(batch, q_heads, length, attended.shape[-1]).transpose(1, 2)


def _hidden(start: Tensor, length: int, scoring: Scoring, ring: Ring, group: int) -> Tensor:
    """Which rows and new tokens a query does not see, bool [batch, 1, group * length, S + W + length].

    It is not added to the scores as a bias, which the exporter would take for another operator's attention.
    """
    new = start[:, None] + torch.arange(length)
    return _by_group(scoring.hidden(new, torch.cat([ring.positions(start), new], dim=1)), group)


def _hidden_codes(start: Tensor, length: int, rows: int, scoring: Scoring, ring: Ring, group: int) -> Tensor:
    """The same for packed codes, [batch, 1, group * length, rows]: their tokens are S, S + 1 and so on."""
    new = start[:, None] + torch.arange(length)
    return _by_group(scoring.hidden(new, (ring.sinks + torch.arange(rows))[None]), group)


def _by_group(hidden: Tensor, group: int) -> Tensor:
    return hidden[:, None].repeat(1, 1, group, 1)


def _leaving(ring: Ring, start: Tensor, total: Tensor, length: int) -> Tensor:
    """Rows, in the ring and the new tokens behind it, of what leaves the window in this step, oldest first."""
    oldest = (start - ring.window).clamp(min=ring.sinks)
    tokens = oldest + torch.arange(length)
    tokens = tokens[tokens < total - ring.window]
    return torch.where(tokens < start, ring.row(tokens), ring.sinks + ring.window + tokens - start)


def _present(held: tuple[Tensor, Tensor], sources: Tensor) -> tuple[Tensor, Tensor]:
    """The rings after the step: of ring and new tokens, the row that each row's token lies in."""
    heads = held[0].shape[1]
    index = sources[:, None, :, None].expand(-1, heads, -1, -1)
    shape = (*held[0].shape[:2], sources.shape[1])
    return tuple(  # type: ignore[return-value]
        torch.onnx.ops.symbolic(
            "GatherND", [rows, index], attrs={"batch_dims": 2}, dtype=rows.dtype, shape=(*shape, rows.shape[3])
        )
        for rows in held
    )
