"""What every figure of a page is made of: the picture with its words, and the numbers and colours that they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvslim.measures import Report
from kvslim.types import Manifest

COLOURS = 6

T = TypeVar("T")
Named = Mapping[str, Manifest]
Limits = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Figure:
    """A picture with its caption.

    Attributes:
        name: The id of the element in the page.
        title: Headline.
        svg: The picture.
        caption: What it shows, and how it was measured.
        legend: (class in the style sheet, text) pairs.
    """

    name: str
    title: str
    svg: str
    caption: str
    legend: tuple[tuple[str, str], ...]


def reports(manifests: Named) -> dict[str, Report]:
    """What was measured, by the same names."""
    return {name: manifest.report for name, manifest in manifests.items() if manifest.report is not None}


def styled(items: Mapping[str, T]) -> Iterable[tuple[str, tuple[str, T]]]:
    """Each item with its name and the class of its colour."""
    return ((f"s{index % COLOURS}", item) for index, item in enumerate(items.items()))


def in_thousands(value: float) -> str:
    """A count or a size in bytes, in units of 1,024 from there on."""
    return f"{value / 1024:,.4g}k" if value >= 1024 else f"{value:g}"
