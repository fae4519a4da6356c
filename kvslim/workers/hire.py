"""Who does the work, as a user asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvslim.workers.base import Workers
from kvslim.workers.cluster import Cluster
from kvslim.workers.ray_workers import RayWorkers


@contextmanager
def hired(count: int | None, address: str | None) -> Iterator[Workers]:
    """Workers for as long as the block runs; this process where none are asked for.

    Args:
        count: How many; None for one on each machine of the cluster.
        address: Of a Ray cluster; None for this machine.

    Raises:
        UnsupportedError, UsageError, NotFoundError: As for `Cluster`.
    """
    if count is None and address is None:
        yield Workers()
        return
    with Cluster(count, address) as cluster:
        yield RayWorkers(cluster)
