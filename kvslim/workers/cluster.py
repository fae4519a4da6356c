"""A Ray cluster that workers run on: one that is there, or this machine alone for as long as a command runs.

Ray starts processes that die again, and gives them their piece again (Moritz et al., "Ray: A Distributed Framework for
Emerging AI Applications", OSDI 2018).
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvslim.errors import NotFoundError, UnsupportedError

RETRIES = 2  # of a piece whose process dies


class Cluster:
    """A cluster, joined within the `with` block.

    Args:
        count: How many workers there will be; None for one on each machine.
        address: Of a running cluster, such as `auto` or `10.0.0.1:6379`; None for this machine alone.

    Attributes:
        workers: How many there will be.
        threads: Cores of each.

    Raises:
        UnsupportedError: Ray is not installed.
        NotFoundError: No cluster is there, or it has fewer cores than workers.
    """

    def __init__(self, count: int | None = None, address: str | None = None) -> None:
        if find_spec("ray") is None:
            raise UnsupportedError("workers need the package ray", where="--workers", fix="pip install 'kvslim[ray]'")
        self.count, self.address = count, address
        self.workers = self.threads = 0

    def __enter__(self) -> Cluster:
        self._join()
        self._share_out()
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()

    def start(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Starts a function in a process of its own, here or elsewhere; a reference to what it returns."""
        import ray

        made = ray.remote(_called).options(max_retries=RETRIES, **self._options)
        return made.remote(str(Path.cwd()), self.threads, function, *arguments)

    def actors(self, kind: type, *arguments: Any) -> list[Any]:
        """One object in each worker, which lives as long as the block."""
        import ray

        made = ray.remote(kind).options(max_restarts=-1, max_task_retries=RETRIES, **self._options)
        return [made.remote(str(Path.cwd()), self.threads, *arguments) for _ in range(self.workers)]

    def _join(self) -> None:
        """Joins the cluster, or starts one on this machine."""
        import ray

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        cores = max(self.count or 1, os.cpu_count() or 1)
        here = {} if self.address else {"num_cpus": cores, "include_dashboard": False}
        try:
            _check_answers(self.address)
            ray.init(address=self.address or "local", logging_level=logging.ERROR, log_to_driver=False, **here)
        except (OSError, ValueError) as error:
            where, fix = f"--ray {self.address}", "start one with `ray start --head` and give the address it prints"
            raise NotFoundError(f"no Ray cluster: {error}", where=where, fix=fix) from error

    def _share_out(self) -> None:
        """Gives each worker its cores."""
        import ray

        cores = int(ray.cluster_resources().get("CPU", 0))
        self.workers = self.count or sum(node["Alive"] for node in ray.nodes())
        self.threads = cores // self.workers
        if self.threads < 1:
            ray.shutdown()
            raise NotFoundError(
                f"the cluster has {cores} cores, too few for {self.workers} workers",
                where="--workers",
                fix=f"take {cores} workers at most",
            )

    @property
    def _options(self) -> dict[str, Any]:
        variables = {"OMP_NUM_THREADS": str(self.threads)}
        if self.address is None:  # on other machines, packages lie elsewhere
            variables["PYTHONPATH"] = os.pathsep.join(sys.path)
        return {"num_cpus": self.threads, "runtime_env": {"env_vars": variables}}


def settle(folder: str, threads: int) -> None:
    """Makes a new process one like that which started it: relative paths mean the same, torch has its threads.

    Args:
        folder: The other's working folder; left alone on a machine that has no such folder.
        threads: Of one operator.
    """
    import torch

    torch.set_num_threads(threads)
    if Path(folder).is_dir():
        os.chdir(folder)


def _called(folder: str, threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    settle(folder, threads)
    return function(*arguments)


def _check_answers(address: str | None) -> None:
    """Refuses an address where nothing listens, which Ray would try for minutes.

    Raises:
        OSError: Nothing does.
    """
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.rpartition("/")[2], int(port)), timeout=10).close()
