"""Independent pieces of a long measurement, done one after another in this process or by workers beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

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
        items: Sequence[Item],
        label: str,
        here: Callable[[Item], Result] | None = None,
    ) -> Iterator[Result]:
        """Yields the results of all items, in their order.

        Args:
            prepared: The model, as this process has it.
            task: What is done with each.
            items: The pieces.
            label: What one piece is, in a few words, for the progress.
            here: The same as `task.open(prepared)`, where this process has it open already.
        """
        yield from map(here or task.open(prepared), prepared.progress.track(items, label))
