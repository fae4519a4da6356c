"""Numbers in as many digits as say something."""

from __future__ import annotations


def three_digits(value: float) -> str:
    """A number in three digits, or more if there are more before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
