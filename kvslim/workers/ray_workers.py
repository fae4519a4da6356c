"""Workers as actors of Ray: each opens the model once, and does piece after piece."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from kvslim.errors import KvslimError, ModelError, UnsupportedError
from kvslim.progress import Progress, Silent
from kvslim.weight_format import WeightFormat
from kvslim.workers.base import Item, Measurement, Result, Task, Workers
from kvslim.workers.cluster import RETRIES, Cluster, settle

if TYPE_CHECKING:
    from kvslim.prepared.decoder import PreparedDecoder
    from kvslim.recipe import Recipe

REPLACEMENTS = 2  # for each worker
PATIENCE = 600.0  # seconds without any worker, while others may have the room

_names = count()


@dataclass(frozen=True)
class Opening:
    """The model that a worker opens.

    Attributes:
        model: Its path, or its id on the hub.
        digest: SHA-256 of its files.
        recipe: As the process that hires has it; it says how the weights are stored.
        is_quantised: Whether they are by now.
    """

    model: str
    digest: str
    recipe: Recipe
    is_quantised: bool

    @classmethod
    def of(cls, prepared: PreparedDecoder) -> Opening:
        """What opens a model as it is in this process."""
        return cls(_reference(prepared), prepared.digest, prepared.recipe, prepared.is_quantised)


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
            vars(self).pop("_do", None)
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
        self._cluster = cluster
        self._actors = [cluster.actor(Worker) for _ in range(cluster.workers)]
        self._replacements = REPLACEMENTS * cluster.workers
        self._last: tuple[Task[Any, Any], Opening, tuple[Any, ...]] | None = None

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
        items: Iterable[Item],
        here: Callable[[Item], Result] | None = None,
    ) -> Iterator[Result]:
        """Yields the results of all items, in their order; arguments as for `Workers.map`.

        Raises:
            KvslimError: What a worker could not do, as it would be raised here; or workers keep dying.
        """
        import ray

        opening = Opening.of(prepared)
        if self._last is None or self._last[0] is not task or self._last[1] != opening:
            self._last = task, opening, (ray.put(opening), _new_name(), ray.put(task))
        yield from self._in_order("do", self._last[2], items)

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
        found = self._in_order("measure", (_new_name(), ray.put(measurement)), items)
        for results, item in zip(progress.track(found, measurement.label, len(items)), items, strict=True):
            yield from here()([item]) if results is None else results

    def _in_order(self, method: str, common: tuple[Any, ...], items: Iterable[Any]) -> Iterator[Any]:
        """What a method of the workers gives for all items, in their order."""
        import ray

        early: dict[int, Any] = {}  # before others of earlier items
        following = 0
        try:
            for place, result in self._done(method, common, items):
                early[place] = result
                while following in early:
                    yield early.pop(following)
                    following += 1
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, KvslimError):
                raise error.cause from None
            raise

    def _done(self, method: str, common: tuple[Any, ...], items: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Places of items and their results as they come; a worker gets a piece whenever it answers.

        One that dies is started again where there is room, and answers then. Another one does its piece: with its
        machine the room may be gone too, and it never answers. One that is gone for good is replaced.
        """
        import ray

        left, free, deaths = enumerate(items), deque[Any](), Counter[int]()
        waiting = deque(islice(left, 1))
        busy, asked = dict[Any, tuple[Any, int, Any]](), {actor.process.remote(): actor for actor in self._actors}
        while waiting or busy:
            while waiting and free:
                actor, (place, item) = free.popleft(), waiting.popleft()
                called = getattr(actor, method).options(max_task_retries=0)
                busy[called.remote(*common, item)] = actor, place, item
                if not waiting:
                    waiting.extend(islice(left, 1))
            done = _first([*busy, *asked], None if busy else PATIENCE)
            if done in asked:
                actor = asked.pop(done)
                try:
                    ray.get(done)
                except ray.exceptions.RayActorError:
                    asked.update((hired.process.remote(), hired) for hired in self._hired_for(actor))
                else:
                    free.append(actor)
                continue
            actor, place, item = busy.pop(done)
            asked[actor.process.remote()] = actor
            try:
                result = ray.get(done)
            except ray.exceptions.RayActorError as error:
                deaths[place] += 1
                if deaths[place] > RETRIES:
                    raise _given_up(f"a worker died {RETRIES + 1} times over one piece") from error
                waiting.appendleft((place, item))
                continue
            yield place, result

    def _hired_for(self, gone: Any) -> Iterator[Any]:
        """A worker in place of one that is gone for good; none after so many that it must have a reason."""
        import ray

        self._actors.remove(gone)
        ray.kill(gone)  # where Ray has lost sight of it alone, its cores are free for the new one
        if self._replacements:
            self._replacements -= 1
            self._actors.append(self._cluster.actor(Worker))
            yield self._actors[-1]


def _new_name() -> str:
    """Of a task, as no other of any process has it."""
    return f"{os.getpid()}-{next(_names)}"


def _first(references: list[Any], patience: float | None) -> Any:
    """The first of some calls to the workers that ends.

    Raises:
        UnsupportedError: There are none, or none ends within so many seconds.
    """
    import ray

    if not references:
        raise _given_up("all workers are gone")
    found, _ = ray.wait(references, timeout=patience)
    if not found:
        fix = "see with `ray status` what has the cores, and take fewer workers or try again later"
        raise _given_up(f"no worker has answered for {PATIENCE:g} seconds", fix)
    return found[0]


def _given_up(why: str, fix: str | None = None) -> UnsupportedError:
    by_default = "take fewer workers: each holds the model in memory, and the system may have killed one for that"
    return UnsupportedError(why, where="--workers", fix=fix or by_default)


def _opened(opening: Opening) -> PreparedDecoder:
    from kvslim.loading.source import read_spec, resolve
    from kvslim.prepared.decoder import PreparedDecoder

    snapshot, recipe = resolve(opening.model), opening.recipe
    if snapshot.sha256 != opening.digest:
        raise ModelError(
            "a worker finds another model", where=opening.model, fix="put the same files there on every machine"
        )
    spec = recipe.fitted(read_spec(snapshot, recipe.calibration.context))
    stored = recipe if opening.is_quantised else recipe.model_copy(update={"weights": WeightFormat()})
    prepared = PreparedDecoder(snapshot, spec, stored, Silent())
    prepared.recipe = recipe
    return prepared


def _reference(prepared: PreparedDecoder) -> str:
    """What another process finds the model by."""
    snapshot = prepared.snapshot
    if snapshot.is_demo:
        return "demo"
    if snapshot.repository is None:
        return str(snapshot.path)
    return snapshot.model if snapshot.revision is None else f"{snapshot.model}@{snapshot.revision}"
