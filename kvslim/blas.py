"""Threads of numpy's linear algebra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within the block numpy computes products in one thread; also a decorator.

    Its matrices are those of heads here. Where other processes have the cores, threads wait for each other: beside two
    of them, the codes of a size of SmolLM2 took 50 to 98 seconds to fit, and 7 to 12 with one thread.
    """
    from threadpoolctl import threadpool_limits  # no part of the small install, which fits nothing

    with threadpool_limits(1, user_api="blas"):
        yield
