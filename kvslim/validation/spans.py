"""How much of a model's positions recall questions take that are made of hidden spans; see `repeated_spans`."""

from __future__ import annotations

SPAN = 16  # tokens of a span
SPANS, FAR_SPANS = 12, 48  # spans of one text, and of a long one, at most
LEAST_DISTANCE = 16  # tokens


def spans_of(distance: int, most: int = SPANS) -> int:
    """Spans that a text hides in its first half."""
    return min(most, 1 + distance // 2 // SPAN)


def positions_of(distance: int) -> int:
    """Positions of a text and its questions: a start token, the spans and what is between, the second copies behind."""
    return 1 + SPAN + distance + spans_of(distance) * SPAN


def longest_distance(positions: int) -> int:
    """The longest distance whose questions fit into so many positions; 0 where none does."""
    return next((distance for distance in range(positions, 0, -1) if positions_of(distance) <= positions), 0)
