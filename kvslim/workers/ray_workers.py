"""Workers as actors of Ray: each opens the model once, and does piece after piece."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any

from kvslim.errors import KvslimError, ModelError, UnsupportedError
from kvslim.progress import Progress, Silent
from kvslim.workers.base import Item, Measurement, Result, Task, Workers
from kvslim.workers.cluster import RETRIES, Cluster, settle

if TYPE_CHECKING:
    from kvslim.prepared.decoder import PreparedDecoder
    from kvslim.recipe import Recipe

_names = count()


@dataclass(frozen=True)
class Opening:
    """The model that a worker opens.

    Attributes:
        model: Its path, or its id on the hub.
        digest: SHA-256 of its files.
        recipe: As the process that hires has it; it says how the weights are stored.
    """

    model: str
    digest: str
    recipe: Recipe


class Worker:
    """One worker: opens the model once, and does pieces of one task after another.

    Args:
        folder: As for `settle`.
        threads: As for `settle`.
    """

    def __init__(self, folder: str, threads: int) -> None:
        settle(folder, threads)
        self._threads = threads
        self._opening: Opening | None = None
        self._task = ""

    def process(self) -> int:
        """The id of the worker's process."""
        return os.getpid()

    def do(self, opening: Opening, name: str, task: Task[Any, Any], item: Any) -> Any:
        """One piece.

        Args:
            opening: The model.
            name: Of the task, another one for each.
            task: What to do.
            item: With what.

        Raises:
            KvslimError: The model cannot be opened here, or is another one.
        """
        if self._opening != opening:
            self._release()
            self._prepared = _opened(opening)
            self._opening = opening
        if self._task != name:
            self._do = task.open(self._prepared)
            self._task = name
        return self._do(item)

    def measure(self, name: str, measurement: Measurement[Any, Any], item: Any) -> list[Any] | None:
        """What is measured on one item; None where the graphs are not to be found.

        Args:
            name: Of the measurement, another one for each.
            measurement: Of which graphs, and how.
            item: On what.
        """
        if not all(folder.is_dir() for folder in measurement.folders):
            return None
        if self._task != name:
            self._release()
            self._do = measurement.open(Silent(), self._threads)
            self._task = name
        return list(self._do([item]))

    def _release(self) -> None:
        """Frees a model, as there may be no room for it and what comes next."""
        for held in ("_do", "_prepared"):
            vars(self).pop(held, None)
        self._task, self._opening = "", None


class RayWorkers(Workers):
    """Workers on a cluster.

    Args:
        cluster: What they run on.
    """

    are_apart = True

    def __init__(self, cluster: Cluster) -> None:
        self._actors = cluster.actors(Worker)

    @property
    def processes(self) -> list[int]:
        """The ids of the workers' processes."""
        import ray

        found: list[int] = ray.get([actor.process.remote() for actor in self._actors])
        return found

    def map(
        self,
        prepared: PreparedDecoder,
        task: Task[Item, Result],
        items: Sequence[Item],
        label: str,
        here: Callable[[Item], Result] | None = None,
    ) -> Iterator[Result]:
        """Yields the results of all items, in their order; arguments as for `Workers.map`.

        Raises:
            KvslimError: What a worker could not do, as it would be raised here; or workers keep dying.
        """
        import ray

        opening = Opening(_reference(prepared), prepared.digest, prepared.recipe)
        common = ray.put(opening), _new_name(), ray.put(task)
        yield from self._in_order("do", common, items, label, prepared.progress)

    def measure(
        self, measurement: Measurement[Item, Result], items: Sequence[Item], progress: Progress
    ) -> Iterator[Result]:
        """Yields what is measured on all items, in their order; arguments as for `Workers.measure`.

        Workers measure what they find. On machines that do not share the folders of the graphs, this process does.

        Raises:
            KvslimError: As for `map`.
        """
        import ray

        here = cache(lambda: measurement.open(Silent(), None))
        common = _new_name(), ray.put(measurement)
        found = self._in_order("measure", common, items, measurement.label, progress)
        for results, item in zip(found, items, strict=True):
            yield from here()([item]) if results is None else results

    def _in_order(
        self, method: str, common: tuple[Any, ...], items: Sequence[Any], label: str, progress: Progress
    ) -> Iterator[Any]:
        """What a method of the workers gives for all items, in their order."""
        import ray

        early: dict[int, Any] = {}  # before others of earlier items
        following = 0
        try:
            for place, result in progress.track(self._done(method, common, items), label, len(items)):
                early[place] = result
                while following in early:
                    yield early.pop(following)
                    following += 1
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, KvslimError):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError as error:
            raise UnsupportedError(
                f"a worker died {RETRIES + 1} times over one piece, or all of them are gone",
                where=label,
                fix="take fewer workers: each holds the model in memory, and the system may have killed one for that",
            ) from error

    def _done(self, method: str, common: tuple[Any, ...], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Places of items and their results as they come; a worker gets a piece whenever it answers.

        One that dies is started again where there is room, and answers then. Another one does its piece: with its
        machine the room may be gone too, and it never answers, or is said to be gone.
        """
        import ray

        waiting, free, deaths = deque(enumerate(items)), deque[Any](), Counter[int]()
        busy, asked = dict[Any, tuple[Any, int]](), {actor.process.remote(): actor for actor in self._actors}
        while waiting or busy:
            while waiting and free:
                actor, (place, item) = free.popleft(), waiting.popleft()
                called = getattr(actor, method).options(max_task_retries=0)
                busy[called.remote(*common, item)] = actor, place
            (done, *_), _ = ray.wait([*busy, *asked])
            if done in asked:
                actor = asked.pop(done)
                try:
                    ray.get(done)
                except ray.exceptions.RayActorError:  # it is gone for good
                    if not (busy or asked or free):
                        raise
                else:
                    free.append(actor)
                continue
            actor, place = busy.pop(done)
            asked[actor.process.remote()] = actor
            try:
                result = ray.get(done)
            except ray.exceptions.RayActorError:
                deaths[place] += 1
                if deaths[place] > RETRIES:
                    raise
                waiting.appendleft((place, items[place]))
                continue
            yield place, result


def _new_name() -> str:
    """Of a task, as no other of any process has it."""
    return f"{os.getpid()}-{next(_names)}"


def _opened(opening: Opening) -> PreparedDecoder:
    from kvslim.loading.source import read_spec, resolve
    from kvslim.prepared.decoder import PreparedDecoder

    snapshot, recipe = resolve(opening.model), opening.recipe
    if snapshot.sha256 != opening.digest:
        raise ModelError(
            "a worker finds another model", where=opening.model, fix="put the same files there on every machine"
        )
    spec = recipe.fitted(read_spec(snapshot, recipe.calibration.context))
    return PreparedDecoder(snapshot, spec, recipe, Silent())


def _reference(prepared: PreparedDecoder) -> str:
    """What another process finds the model by."""
    snapshot = prepared.snapshot
    if snapshot.is_demo:
        return "demo"
    if snapshot.repository is None:
        return str(snapshot.path)
    return snapshot.model if snapshot.revision is None else f"{snapshot.model}@{snapshot.revision}"
