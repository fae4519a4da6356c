"""Pieces of work by workers of Ray: the same to the last bit as alone, also where a worker dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from support.models import open_prepared, recipe_of
from support.tiny_graph import write_tiny

from kvslim import pipeline
from kvslim.errors import ModelError, NotFoundError, UnsupportedError, UsageError
from kvslim.methods.kv_quant import KvQuant
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.progress import Progress, Silent
from kvslim.settings import Budget
from kvslim.validation.quality import Comparison, summed_up
from kvslim.validation.recall import Questions, capacity_for, compare_recall, repeated_spans, texts_of
from kvslim.workers import ray_workers
from kvslim.workers.cluster import RETRIES, Cluster
from kvslim.workers.ray_workers import RayWorkers, Worker

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray about itself

RECIPE = recipe_of([KvQuant()])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(2) as found:
        yield found


@pytest.fixture(scope="module")
def workers(cluster: Cluster) -> RayWorkers:
    return RayWorkers(cluster)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As many threads as each worker has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts the cache elsewhere, so that everything is measured again."""
    return lambda name: monkeypatch.setenv("KVSLIM_CACHE", str(tmp_path / name))


@dataclass(frozen=True)
class Deadly:
    """Doubles numbers; the process that gets the number 3 kills itself, `times` times over all."""

    folder: Path
    times: int

    def open(self, prepared: PreparedDecoder) -> Callable[[int], int]:
        def doubled(number: int) -> int:
            died = len(list(self.folder.iterdir()))
            if number == 3 and died < self.times:
                (self.folder / str(died)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return 2 * number

        return doubled


@dataclass(frozen=True)
class Refusing:
    """Refuses all work."""

    def open(self, prepared: PreparedDecoder) -> Callable[[int], int]:
        raise UsageError("no", where="here", fix="ask another")


def test_plan_is_the_same_to_the_last_bit(
    tiny_llama: Path, workers: RayWorkers, no_cache: Callable[[str], None]
) -> None:
    """With what was measured at other sizes, and of other tools' caches."""
    recipe = recipe_of().within(Budget(kv_ratio=8))
    no_cache("alone")
    alone = pipeline.plan(str(tiny_llama), recipe)
    no_cache("together")
    assert pipeline.plan(str(tiny_llama), recipe, workers=workers) == alone
    assert alone.peers


def test_analysis_is_the_same_to_the_last_bit(
    tiny_llama: Path, workers: RayWorkers, no_cache: Callable[[str], None]
) -> None:
    no_cache("alone")
    alone = pipeline.analyze(str(tiny_llama), RECIPE)
    no_cache("together")
    assert pipeline.analyze(str(tiny_llama), RECIPE, workers=workers) == alone


def test_statistics_and_losses_are_the_same_to_the_last_bit(
    tiny_llama: Path, workers: RayWorkers, no_cache: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_cache("alone")
    alone = open_prepared(tiny_llama, RECIPE)
    changes = [KvQuant(bits=bits) for bits in (8, 4)]
    losses = list(alone.trials().divergences(changes))
    no_cache("together")
    together = open_prepared(tiny_llama, RECIPE)
    together.workers = workers
    together.recipe = recipe_of([KvQuant()], "int4")  # as where a limit of memory is split before weights are rounded
    for name, array in alone.statistics.arrays().items():
        np.testing.assert_array_equal(getattr(together.statistics, name), array, err_msg=name)
    trials = together.trials()
    monkeypatch.setattr(trials, "loss", None)  # nothing is measured here
    assert list(trials.divergences(changes)) == losses
    assert 0 < losses[0] < losses[1]


def test_validation_is_the_same_to_the_last_bit(tmp_path: Path, cluster: Cluster, workers: RayWorkers) -> None:
    folders = tmp_path / "plain", tmp_path / "artifact"
    for folder, noise in zip(folders, (0.0, 0.05), strict=True):
        folder.mkdir()
        write_tiny(folder / "model.onnx", noise=noise)
    random = np.random.default_rng(0)
    windows = [random.integers(24, size=size) for size in (37, 12, 80)]
    comparison = Comparison(folders, windows, within=50)
    alone = summed_up(comparison.open(Silent(), cluster.threads)(windows))
    assert alone.artifact.kl_mean > 1e-3
    assert alone.artifact.kl_beyond is not None
    assert summed_up(workers.measure(comparison, windows, Silent())) == alone
    items = repeated_spans(random.integers(24, size=(2, 60)), count=60, distance=40)
    questions = Questions(folders, capacity_for(items))
    recall = compare_recall(questions.open(Silent(), cluster.threads)(texts_of(items)), items)
    assert 0 < recall.teacher != recall.student
    assert compare_recall(workers.measure(questions, texts_of(items), Silent()), items) == recall


@dataclass(frozen=True)
class Elsewhere:
    """Tells who measures graphs that no worker finds."""

    folders: tuple[Path, ...]
    label: str = "numbers"

    def open(self, progress: Progress, threads: int | None) -> Callable[[Sequence[int]], Iterator[tuple[int, int]]]:
        return lambda numbers: ((number, os.getpid()) for number in numbers)


def test_graphs_that_workers_do_not_find_are_measured_here(tmp_path: Path, workers: RayWorkers) -> None:
    absent = Elsewhere((tmp_path / "absent",))
    assert list(workers.measure(absent, [1, 2], Silent())) == [(1, os.getpid()), (2, os.getpid())]
    there = list(workers.measure(Elsewhere((tmp_path,)), [1, 2, 3], Silent()))
    assert [number for number, _ in there] == [1, 2, 3]
    assert {process for _, process in there} <= set(workers.processes)


def test_worker_that_dies_is_replaced_and_its_piece_done_again(
    tiny_llama: Path, workers: RayWorkers, tmp_path: Path
) -> None:
    before = set(workers.processes)
    found = list(workers.map(open_prepared(tiny_llama, RECIPE), Deadly(tmp_path, 1), range(8)))
    assert found == [2 * number for number in range(8)]
    after = set(workers.processes)
    assert len(after) == 2
    assert len(after - before) == 1


def test_piece_that_kills_every_worker_is_given_up(tiny_llama: Path, workers: RayWorkers, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"a worker died {RETRIES + 1} times"):
        list(workers.map(open_prepared(tiny_llama, RECIPE), Deadly(tmp_path, RETRIES + 1), range(4)))
    assert list(workers.map(open_prepared(tiny_llama, RECIPE), Deadly(tmp_path, 0), [1])) == [2]


def test_error_of_a_worker_is_raised_here(tiny_llama: Path, workers: RayWorkers) -> None:
    with pytest.raises(UsageError, match="no") as caught:
        list(workers.map(open_prepared(tiny_llama, RECIPE), Refusing(), [1, 2]))
    assert (caught.value.where, caught.value.fix) == ("here", "ask another")


def test_worker_that_finds_another_model_says_so(tiny_llama: Path, workers: RayWorkers, tmp_path: Path) -> None:
    prepared = open_prepared(tiny_llama, RECIPE)
    prepared.digest = "0" * 64
    with pytest.raises(ModelError, match="a worker finds another model"):
        list(workers.map(prepared, Deadly(tmp_path, 0), [1]))


def test_address_of_something_else_is_refused() -> None:
    """As of Ray's dashboard, which speaks another protocol."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 505 HTTP Version Not Supported\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with (
            pytest.raises(NotFoundError, match="is not Ray's head"),
            Cluster(1, f"127.0.0.1:{server.getsockname()[1]}"),
        ):
            pass
        thread.join()


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvslim.workers.cluster.find_spec", lambda _: None)
    with pytest.raises(UnsupportedError) as caught:
        Cluster(2)
    assert caught.value.fix == "pip install 'kvslim[ray]'"


def test_number_of_workers_is_at_least_one() -> None:
    with pytest.raises(UsageError, match="0 workers"):
        Cluster(0)


def test_cluster_that_is_not_there_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """In a process of its own: Ray is in use in this one."""
    code = (
        "import sys; from kvslim.cli.app import run; "
        f"sys.exit(run(['plan', {str(tiny_llama)!r}, '-r', 'lossless', '--ray', '127.0.0.1:1']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == NotFoundError.exit_code
    assert "error: no Ray cluster" in done.stderr
    assert "--ray 127.0.0.1:1" in done.stderr


def doubled_by(workers: RayWorkers, prepared: PreparedDecoder, folder: Path) -> bool:
    """Whether workers do eight pieces."""
    return list(workers.map(prepared, Deadly(folder, 0), range(8))) == list(range(0, 16, 2))


def test_worker_that_is_gone_for_good_is_replaced(tiny_llama: Path, tmp_path: Path, workers: RayWorkers) -> None:
    before = workers.processes
    ray.kill(workers._actors[0])
    assert doubled_by(workers, open_prepared(tiny_llama, RECIPE), tmp_path)
    after = workers.processes
    assert len(after) == 2
    assert set(after) & set(before) == {before[1]}


def test_nobody_waits_for_a_worker_that_has_no_room(
    tiny_llama: Path, tmp_path: Path, cluster: Cluster, workers: RayWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test here: the workers are shared, and others take their cores for good."""
    prepared = open_prepared(tiny_llama, RECIPE)
    first, second = workers._actors
    others = [seized(cluster, first)]
    assert doubled_by(workers, prepared, tmp_path)
    ray.kill(workers._actors[-1])  # it waits for the core that the next one has
    others.append(seized(cluster, second))
    monkeypatch.setattr(ray_workers, "PATIENCE", 1.0)
    with pytest.raises(UnsupportedError, match="no worker has answered for 1 seconds"):
        doubled_by(workers, prepared, tmp_path)
    for actor in (*others, *workers._actors):
        ray.kill(actor)
    workers._replacements = 0
    with pytest.raises(UnsupportedError, match="all workers are gone"):
        doubled_by(workers, prepared, tmp_path)


def seized(cluster: Cluster, worker: Any) -> Any:
    """Another one that has the cores of a worker, which is gone for good."""
    ray.kill(worker)
    other = cluster.actor(Worker)
    ray.get(other.process.remote())
    return other
