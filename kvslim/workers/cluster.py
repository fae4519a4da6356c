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
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvslim.errors import NotFoundError, UnsupportedError, UsageError

RETRIES = 2  # of a piece whose process dies
AUTH_MODE = "RAY_AUTH_MODE"
SETTINGS = b"\4"  # the type of the frame that both sides of HTTP/2 send first (RFC 9113, section 3.4)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + SETTINGS + bytes(5)


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
        UsageError: There are to be no workers.
        NotFoundError: No cluster is there, or it has fewer cores than workers.
    """

    def __init__(self, count: int | None = None, address: str | None = None) -> None:
        if find_spec("ray") is None:
            raise UnsupportedError("workers need the package ray", where="--workers", fix="pip install 'kvslim[ray]'")
        if count is not None and count < 1:
            raise UsageError(f"{count} workers", where="--workers", fix="ask for one or more")
        self.count, self.address = count, address
        self.workers = self.threads = 0
        self._mode = os.environ.get(AUTH_MODE)

    def __enter__(self) -> Cluster:
        self._join()
        self._share_out()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def start(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Starts a function in a process of its own, here or elsewhere; a reference to what it returns."""
        import ray

        made = ray.remote(_called).options(max_retries=RETRIES, **self._options)
        return made.remote(str(Path.cwd()), self.threads, function, *arguments)

    def actor(self, kind: type) -> Any:
        """An object in a process of its own, here or elsewhere, which lives as long as the block."""
        import ray

        made = ray.remote(kind).options(max_restarts=-1, max_task_retries=RETRIES, **self._options)
        return made.remote(str(Path.cwd()), self.threads)

    def _join(self) -> None:
        """Joins the cluster, or starts one on this machine."""
        import ray

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        os.environ.setdefault("RAY_worker_niceness", "0")  # beside other work, nice workers are slower than none
        cores = max(self.count or 1, os.cpu_count() or 1)
        here = {} if self.address else {"num_cpus": cores, "include_dashboard": False}
        try:
            _check_answers(self.address)
            ray.init(address=self.address or "local", logging_level=logging.ERROR, log_to_driver=False, **here)
        except (OSError, ValueError) as error:
            fix = "give the address that `ray start --head` prints; where it enables tokens, set RAY_AUTH_MODE=token"
            raise NotFoundError(f"no Ray cluster: {error}", where=f"--ray {self.address}", fix=fix) from error

    def _share_out(self) -> None:
        """Gives each worker its cores."""
        import ray

        cores = int(ray.cluster_resources().get("CPU", 0))
        self.workers = self.count or sum(node["Alive"] for node in ray.nodes())
        self.threads = cores // self.workers
        if self.threads < 1:
            self._leave()
            raise NotFoundError(
                f"the cluster has {cores} cores, too few for {self.workers} workers",
                where="--workers",
                fix=f"take {cores} workers at most",
            )

    def _leave(self) -> None:
        """Leaves the cluster, or ends it."""
        import ray

        ray.shutdown()
        _forget_token(self._mode)

    @property
    def _options(self) -> dict[str, Any]:
        variables = {"OMP_NUM_THREADS": str(self.threads)}
        if self.address is None:  # on other machines, packages lie elsewhere
            variables["PYTHONPATH"] = os.pathsep.join(sys.path)
        return {"num_cpus": self.threads, "runtime_env": {"env_vars": variables}}


def _forget_token(mode: str | None) -> None:
    """Makes the process one that asks nobody for a token, unless it was told to by its environment.

    Where Ray starts a cluster, the process asks all who call it for that cluster's token from then on. Another cluster,
    which has none, cannot call it: it takes the process for dead, and ends all actors that it started as those to which
    no references are left.

    Args:
        mode: `RAY_AUTH_MODE`, as it was before; None where it was not set.
    """
    os.environ.pop(AUTH_MODE, None)
    if mode is not None:
        os.environ[AUTH_MODE] = mode
    with suppress(ImportError):  # older versions know no tokens
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


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
    """Refuses an address where nothing listens, or something else, such as Ray's dashboard: Ray tries for minutes.

    Raises:
        OSError: No server of HTTP/2, as Ray's head is, does.
    """
    host, colon, port = (address or "").rpartition(":")
    if not colon or not port.isdecimal():
        return
    with socket.create_connection((host.rpartition("/")[2], int(port)), timeout=10) as connection:
        if os.environ.get("RAY_USE_TLS") == "1":
            return
        connection.sendall(PREFACE)
        if connection.recv(9, socket.MSG_WAITALL)[3:4] != SETTINGS:
            raise ConnectionError("what listens there is not Ray's head")
