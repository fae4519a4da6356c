"""Two machines of a Ray cluster, emulated: two nodes with stores of their own. One of them is lost in the middle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.models import SHORT, open_prepared, recipe_of
from support.paths import ROOT

from kvslim.methods.kv_quant import KvQuant
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.workers.cluster import Cluster
from kvslim.workers.ray_workers import RayWorkers, Worker

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # of Ray about itself


@dataclass(frozen=True)
class Slow:
    """Doubles numbers, and notes the node and the number of what it has begun."""

    folder: Path

    def open(self, prepared: PreparedDecoder) -> Callable[[int], int]:
        import ray

        node = ray.get_runtime_context().get_node_id()

        def doubled(number: int) -> int:
            (self.folder / f"{node}.{number}").touch()
            time.sleep(0.3)
            return 2 * number

        return doubled


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster as Nodes

    with pytest.MonkeyPatch.context() as patch:  # nodes start with what this process has
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("RAY_worker_niceness", "0")
        nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1})
        yield nodes
        ray.shutdown()
        nodes.shutdown()


def begun(folder: Path, node: Any) -> int:
    """Pieces that a node has begun."""
    return len(list(folder.glob(f"{node.node_id}.*")))


def test_cluster_is_joined_after_one_of_this_machine_alone(two_nodes: Any) -> None:
    """For its own Ray switches tokens on, which the nodes do not have."""
    import ray

    with Cluster(1):
        pass
    with Cluster(1, two_nodes.address) as cluster:
        worker = cluster.actor(Worker)
        assert ray.get(worker.process.remote()) != os.getpid()


def test_machine_that_is_lost_leaves_its_pieces_to_others(two_nodes: Any, tiny_llama: Path, tmp_path: Path) -> None:
    lost = two_nodes.add_node(num_cpus=1)
    prepared = open_prepared(tiny_llama, recipe_of([KvQuant()]))

    def lose() -> None:
        while not begun(tmp_path, lost):
            time.sleep(0.05)
        two_nodes.remove_node(lost, allow_graceful=False)

    with Cluster(2, two_nodes.address) as cluster:
        workers = RayWorkers(cluster)
        thread = threading.Thread(target=lose, daemon=True)
        thread.start()
        found = list(workers.map(prepared, Slow(tmp_path), range(40)))
        thread.join()
        again = list(workers.map(prepared, Slow(tmp_path), range(3)))
    assert found == [2 * number for number in range(40)]
    assert begun(tmp_path, lost) < 20  # it was lost in the middle
    assert again == [0, 2, 4]


@pytest.mark.thorough
def test_sweep_of_twelve_ends_although_a_machine_is_lost(two_nodes: Any, tiny_llama: Path, tmp_path: Path) -> None:
    lost = two_nodes.add_node(num_cpus=1)
    file, out = tmp_path / "sweep.yaml", tmp_path / "out"
    recipes, budgets = (
        ["lossless", "balanced", "small"],
        [{"kv_ratio": ratio} for ratio in (4, 5, 6, 7, 8, 9, 10, 12, 16)],
    )
    file.write_text(
        yaml.safe_dump({"models": [str(tiny_llama)], "recipes": recipes, "budgets": budgets, "set": list(SHORT)})
    )
    code = f"import sys; from kvslim.cli.app import run; sys.exit(run({asked(file, out, two_nodes.address)!r}))"
    sweep = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    while sweep.poll() is None and made(out) < 4:
        time.sleep(0.2)
    assert made(out) < 12
    two_nodes.remove_node(lost, allow_graceful=False)
    printed, _ = sweep.communicate(timeout=600)
    jobs = json.loads(printed)["jobs"]
    assert len(jobs) == 12
    assert all(outcome["failure"] is None for outcome in jobs.values())
    assert made(out) == 12


def asked(file: Path, out: Path, address: str) -> list[str]:
    return ["sweep", str(file), "-o", str(out), "--ray", address, "--json"]


def made(out: Path) -> int:
    """Artifacts that are there."""
    return len(list(out.glob("*/*/kvslim.json")))
