"""Whether timings can be trusted: what other programs took of the machine meanwhile, and how far turns differ."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import psutil

BUSY_SHARE = 0.2  # of all cores, in use by other programs
WIDE_SPREAD = 0.25  # between the quartiles, as a share of the median
IDLE = ("idle", "iowait", "guest", "guest_nice")  # guests are counted as users too


class _Clock(NamedTuple):
    """Seconds on the wall, of all cores in use, and of those that this process used."""

    wall: float
    busy: float
    own: float

    @classmethod
    def now(cls) -> _Clock:
        times = psutil.cpu_times()._asdict()
        busy = sum(seconds for kind, seconds in times.items() if kind not in IDLE)
        return cls(time.perf_counter(), busy, time.process_time())


class LoadWatch:
    """Counts the processor time of other programs from its making on."""

    def __init__(self) -> None:
        self._start = _Clock.now()

    def busy_cores(self) -> float:
        """Cores that other programs kept busy since then, on average."""
        wall, busy, own = np.subtract(_Clock.now(), self._start)
        return max(0.0, float(busy - own) / max(float(wall), 1e-9))


def doubt(times: Mapping[str, npt.NDArray[np.float64]], busy_cores: float, cores: int | None = None) -> str | None:
    """Why timings are uncertain; None where nothing speaks against them.

    Args:
        times: Milliseconds [repeats] of each point; its name says where it was taken.
        busy_cores: Cores that other programs used meanwhile.
        cores: Cores of the machine; by default of this one.
    """
    cores = cores or psutil.cpu_count() or 1
    if busy_cores > BUSY_SHARE * cores:
        return f"the machine was busy, other programs used {busy_cores:.1f} of its {cores} cores"
    spreads = {name: _spread(turns) for name, turns in times.items()}
    widest = max(spreads, key=lambda name: spreads[name], default=None)
    if widest is None or spreads[widest] <= WIDE_SPREAD:
        return None
    return f"the machine was busy or uneven, turns differ by {spreads[widest]:.0%} {widest}"


def _spread(times: npt.NDArray[np.float64]) -> float:
    """The distance of the quartiles, as a share of the median."""
    first, median, third = np.quantile(times, [0.25, 0.5, 0.75])
    return float((third - first) / median)
