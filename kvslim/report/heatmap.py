"""A heat map of layers and their parts as an SVG file, without a plotting library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from math import log10
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvslim.planning.analyze import Analysis

CELL, LETTER, LEFT, TOP, GAP = 26, 7, 64, 52, 16
PALE, DARK = (236, 244, 250), (8, 48, 107)  # colours of the smallest and the largest value of a panel


class Panel(NamedTuple):
    """Columns of a heat map that share a colour scale.

    Attributes:
        kind: What a column is, such as "head"; shown before its name in a cell's tooltip.
        names: Names of the columns.
        rows: [layers][columns] values; values that are not positive get the palest colour.
    """

    kind: str
    names: Sequence[str]
    rows: Sequence[Sequence[float]]

    @property
    def width(self) -> int:
        """Pixels from one column to the next."""
        return max(CELL, LETTER * max(map(len, self.names)) + 6)


def analysis_panels(analysis: Analysis) -> tuple[Panel, Panel]:
    """How important each layer is for a text: parts by the KL without them, query heads by their contribution."""
    heads = [str(head) for head in range(len(analysis.layers[0].fluctuation))]
    return (
        Panel("KL without", ("attention", "MLP", "both"), [layer.part_kl for layer in analysis.layers]),
        Panel("head", heads, [layer.fluctuation for layer in analysis.layers]),
    )


def heatmap(title: str, panels: Sequence[Panel]) -> str:
    """An SVG with one row per layer, coloured by the logarithm of each value.

    Args:
        title: The title above it.
        panels: From left to right, each with its own scale.
    """
    layers = len(panels[0].rows)
    width = LEFT + sum(panel.width * len(panel.names) + GAP for panel in panels)
    width, height = max(width, 9 * len(title) + 16), TOP + CELL * layers + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="{escape(title, quote=True)}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="8" y="20" font-size="14">{escape(title)}</text>',
    ]
    for layer in range(layers):
        parts.append(f'<text x="{LEFT - 8}" y="{TOP + CELL * layer + 17}" text-anchor="end">layer {layer}</text>')
    left = LEFT
    for panel in panels:
        parts += _drawn(panel, left)
        left += panel.width * len(panel.names) + GAP
    return "\n".join([*parts, "</svg>", ""])


def _drawn(panel: Panel, left: int) -> Iterator[str]:
    """The names and cells of a panel that begins at `left`."""
    values = [value for row in panel.rows for value in row if value > 0]
    least, most = (log10(min(values)), log10(max(values))) if values else (0.0, 0.0)
    for column, name in enumerate(panel.names):
        x = left + panel.width * column
        yield f'<text x="{x + panel.width / 2}" y="{TOP - 8}" text-anchor="middle">{escape(name)}</text>'
        for layer, row in enumerate(panel.rows):
            colour = _colour(row[column], least, most)
            yield (
                f'<rect x="{x}" y="{TOP + CELL * layer}" width="{panel.width - 1}" height="{CELL - 1}" fill="{colour}">'
                f"<title>layer {layer}, {escape(f'{panel.kind} {name}')}: {row[column]:.3g}</title></rect>"
            )


def _colour(value: float, least: float, most: float) -> str:
    share = 0.0 if value <= 0 or most == least else (log10(value) - least) / (most - least)
    mixed = (round(pale + share * (dark - pale)) for pale, dark in zip(PALE, DARK, strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)
