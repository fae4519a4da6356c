"""How a long function tells what it is doing, without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """A listener for stages and for steps within a stage."""

    def stage(self, name: str) -> None:
        """Hears that a new stage begins, named in a few words."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yields `items` unchanged and hears how far they are.

        Args:
            items: What is worked through.
            label: What one step does, in a few words.
            total: Number of items, where `len(items)` cannot tell.
        """
        ...


class Silent:
    """The listener for tests and for callers who do not want to hear."""

    def stage(self, name: str) -> None:
        """Says nothing."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yields `items` unchanged."""
        yield from items
