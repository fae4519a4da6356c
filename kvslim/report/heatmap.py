"""A heat map of layers and heads as an SVG file, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log10

CELL, LEFT, TOP = 26, 64, 52
PALE, DARK = (236, 244, 250), (8, 48, 107)  # of the least and the largest value


def heatmap(title: str, rows: Sequence[Sequence[float]]) -> str:
    """An SVG with one row per layer and one column per head, coloured by the logarithm of each value.

    Args:
        title: Written above.
        rows: [layers][heads] values; what is not positive has the palest colour.
    """
    values = [value for row in rows for value in row if value > 0]
    least, most = (log10(min(values)), log10(max(values))) if values else (0.0, 0.0)
    width, height = LEFT + CELL * max(map(len, rows)) + 16, TOP + CELL * len(rows) + 16
    width = max(width, 9 * len(title) + 16)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="{escape(title, quote=True)}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="8" y="20" font-size="14">{escape(title)}</text>',
        *(
            f'<text x="{LEFT + CELL * head + CELL / 2}" y="{TOP - 8}" text-anchor="middle">{head}</text>'
            for head in range(max(map(len, rows)))
        ),
    ]
    for layer, row in enumerate(rows):
        top = TOP + CELL * layer
        parts.append(f'<text x="{LEFT - 8}" y="{top + 17}" text-anchor="end">layer {layer}</text>')
        for head, value in enumerate(row):
            colour = _colour(value, least, most)
            parts.append(
                f'<rect x="{LEFT + CELL * head}" y="{top}" width="{CELL - 1}" height="{CELL - 1}" fill="{colour}">'
                f"<title>layer {layer}, head {head}: {value:.3g}</title></rect>"
            )
    return "\n".join([*parts, "</svg>", ""])


def _colour(value: float, least: float, most: float) -> str:
    share = 0.0 if value <= 0 or most == least else (log10(value) - least) / (most - least)
    mixed = (round(pale + share * (dark - pale)) for pale, dark in zip(PALE, DARK, strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)
