"""How a long function reports its progress without depending on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Receives the stages of a long function and the steps within a stage."""

    def expect(self, stages: Mapping[str, float]) -> None:
        """The stages to come in order, and the share of the time that each is expected to take.

        A stage is left out when its result is known from an earlier run.
        """

    def stage(self, name: str) -> None:
        """A new stage begins; `name` describes it in a few words."""

    def track(
        self, items: Iterable[T], label: str, total: int | None = None, weights: Sequence[float] | None = None
    ) -> Iterator[T]:
        """Yields `items` unchanged and follows how many are done.

        Args:
            items: The items to work through.
            label: What one step does, in a few words.
            total: Number of items, if `items` has no length.
            weights: How long each item is expected to take, in any unit; None where all take as long.
        """
        ...

    def tell(self, words: str) -> None:
        """What is known by now, in a few words, such as a loss; it stands behind the step until the stage ends."""


class Silent:
    """Ignores all progress: for tests and for callers who need no output."""

    def expect(self, stages: Mapping[str, float]) -> None:
        """Does nothing."""

    def stage(self, name: str) -> None:
        """Does nothing."""

    def track(
        self, items: Iterable[T], label: str, total: int | None = None, weights: Sequence[float] | None = None
    ) -> Iterator[T]:
        """Yields `items` unchanged."""
        yield from items

    def tell(self, words: str) -> None:
        """Does nothing."""


class WithinStage(Silent):
    """Follows steps of a progress within the stage that it is in: for functions that have stages of their own.

    Args:
        progress: Receives the steps.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def track(
        self, items: Iterable[T], label: str, total: int | None = None, weights: Sequence[float] | None = None
    ) -> Iterator[T]:
        """Yields `items` unchanged, and follows them."""
        yield from self._progress.track(items, label, total, weights)

    def tell(self, words: str) -> None:
        """Passes them on."""
        self._progress.tell(words)
