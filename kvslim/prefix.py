"""What two token sequences begin with alike, which a cache or one run can serve for both."""

from __future__ import annotations

from collections.abc import Sequence


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))
