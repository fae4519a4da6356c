"""Attention over a ring of attention sinks and recent tokens.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023, section 3.2. A ring has rows for S sinks
and W recent tokens: token p < S lies in row p, a later one in row S + (p - S) mod W. Keys are cached after RoPE, so the
order of the rows does not matter; which token a row holds follows from the number of tokens so far.

onnxruntime's fused operator attends to a copy of the rows that hold a token, under a mask, and puts the new tokens
behind them. From there they go into the ring's own rows. Where past and present lie in one memory, onnxruntime writes
these rows and copies nothing else; so the write must come after every read of the ring, as it does, since it takes what
the operator gives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvslim.caches.attention.base import CacheAttention, States, attended
from kvslim.transform.operators import ExportStep, gathered, masked_attention, scattered
from kvslim.transform.scoring import Scoring

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


class RingAttention(CacheAttention):
    """Attention whose exact tokens are those of a ring."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring

    def scoring(self, scoring: Scoring) -> Scoring:
        """The model's own scoring, with the tokens hidden that have left the ring."""
        return replace(scoring, recent=self.ring.window, sinks=self.ring.sinks)


class WindowAttention(RingAttention):
    """Attention over the ring and the new tokens, by one fused operator."""

    def evaluated(self, slim: SlimAttention, states: States, scoring: Scoring) -> Tensor:
        """Attention over what the ring gives back."""
        query, key, value = states
        key, value = slim.rounded(key, slim.key_scale), slim.rounded(value, slim.value_scale)
        return attended(query, key, value, scoring)

    def exported(self, slim: SlimAttention, step: ExportStep, states: States, scoring: Scoring) -> Tensor:
        """Reads the rows that hold a token, then writes the new ones into the ring's own rows."""
        span, length = span_of(step, states[0]), states[0].shape[2]
        rows, hidden = self._seen(step, span, length, scoring)
        past = step.past[0].index_select(2, rows), step.past[1].index_select(2, rows)
        found, present = masked_attention(
            states,
            past,
            hidden,
            scoring,
            cache=slim.stored,
            scales=slim.kernel_scales(),
            residuals=slim.kernel_residuals(),
        )
        step.present = write_rows(step, self.ring, span, present, length)
        return found

    def _seen(self, step: ExportStep, span: Span, length: int, scoring: Scoring) -> tuple[Tensor, Tensor]:
        """Rows of the ring that hold a token, and the mask over them and the new tokens: the same in many layers."""
        ring = self.ring
        rows = step.once(("rows", ring), lambda: _held(ring, span))
        return rows, step.once(("mask", ring, scoring.window), lambda: _mask(ring, span, length, scoring, rows))


def _held(ring: Ring, span: Span) -> Tensor:
    """Rows that hold a token of any sequence."""
    every = torch.arange(ring.sinks + ring.window)
    return every[every < span[0].max()]


def _mask(ring: Ring, span: Span, length: int, scoring: Scoring, rows: Tensor) -> Tensor:
    """[batch, 1, length, rows + length]: 0, or -inf where a new token does not see a row or another new token."""
    new = span[0][:, None] + torch.arange(length)
    held = ring.positions(span[0]).index_select(1, rows)
    hidden = torch.cat([scoring.hidden(new, tokens) for tokens in (held, new)], dim=-1)
    return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None]


def span_of(step: ExportStep, query: Tensor) -> Span:
    """Tokens before this step and after it, [batch] each; padding of a first, unequal batch is not counted."""
    total = step.mask.sum(-1)
    return (total - query.shape[2]).clamp(min=0), total


def write_rows(
    step: ExportStep,
    ring: Ring,
    span: Span,
    new: tuple[Tensor, Tensor],
    length: int,
    after: Tensor | int = 0,
) -> tuple[Tensor, Tensor]:
    """The rings with the new tokens in their rows.

    Args:
        step: Where the layer stands in the graph.
        ring: Which of its first two tensors so far are.
        span: Tokens before it and after it.
        new: Keys and values [batch, heads, any, columns], the last `length` of which are of new tokens.
        length: New tokens.
        after: A zero, [1]; the rows are written once it is known.
    """
    heads = new[0].shape[1]
    survivors = step.once(("survivors", ring), lambda: ring.survivors(*span, length))
    taken = step.once(("taken", ring, heads), lambda: places(survivors - length, heads))
    written = step.once(("written", ring, heads), lambda: places(ring.row(span[0][:, None] + survivors), heads))
    key, value = (
        scattered(held, written + after, gathered(rows, taken))
        for held, rows in zip(step.past, new, strict=False)  # codes may follow the ring
    )
    return key, value


def places(rows: Tensor, heads: int) -> Tensor:
    """Batch, head and row [batch, heads, length, 3] of rows [batch, length] of every head."""
    shape = rows.shape[0], heads, rows.shape[1]
    batch, by_head = torch.arange(shape[0])[:, None, None], torch.arange(heads)[None, :, None]
    return torch.stack([part.expand(shape) for part in (batch, by_head, rows[:, None])], dim=-1)
