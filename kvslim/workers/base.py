"""Independent pieces of a long measurement, done one after another in this process or by workers beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from kvslim.memory import give_back
from kvslim.progress import Progress

if TYPE_CHECKING:
    from kvslim.prepared.decoder import PreparedDecoder

Item = TypeVar("Item")
Result = TypeVar("Result")
Item_contra = TypeVar("Item_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)


class Task(Protocol[Item_contra, Result_co]):
    """What is done with each of many items, as a value that can be sent to another machine.

    A result may depend on nothing but the task, the item and the model, so that it does not matter who does a piece,
    or how often.
    """

    def open(self, prepared: PreparedDecoder) -> Callable[[Item_contra], Result_co]:
        """What does one item with a model in memory."""


class Measurement(Protocol[Item_contra, Result_co]):
    """What is measured of graphs on many items, as a value that can be sent to another process.

    As of a task, a result may depend on nothing but the measurement and the item.
    """

    @property
    def label(self) -> str:
        """What one item is, in a few words, for the progress."""

    @property
    def folders(self) -> Sequence[Path]:
        """Those of the graphs."""

    def open(self, progress: Progress, threads: int | None) -> Callable[[Sequence[Item_contra]], Iterable[Result_co]]:
        """What measures items one after another; `threads` are those of one operator, None for onnxruntime's choice."""


class Workers:
    """Who does the pieces: here this process, one after another.

    Attributes:
        are_apart: Whether other processes do them, each with a copy of the model.
    """

    are_apart = False

    def map(
        self,
        prepared: PreparedDecoder,
        task: Task[Item, Result],
        items: Iterable[Item],
        here: Callable[[Item], Result] | None = None,
    ) -> Iterator[Result]:
        """Yields the results of all items, in their order; who takes no more of them ends the work.

        Args:
            prepared: The model, as this process has it.
            task: What is done with each; where it is the same object as the last time, it stays open.
            items: The pieces; each is made when there is somebody to do it.
            here: The same as `task.open(prepared)`, where this process has it open already.
        """
        yield from map(here or task.open(prepared), items)

    def measure(
        self, measurement: Measurement[Item, Result], items: Sequence[Item], progress: Progress
    ) -> Iterator[Result]:
        """Yields what is measured on all items, in their order; who takes no more of it ends the work.

        Args:
            measurement: Of which graphs, and how. Their folders have names that no others have.
            items: What can be measured apart.
            progress: Receives the progress.
        """
        try:
            yield from measurement.open(progress, None)(items)
        finally:
            give_back()  # what the graphs took
