"""How a graph is timed on the cores that this process may use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import onnxruntime

REPEATS = 9


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def session_of(model: bytes) -> onnxruntime.InferenceSession:
    """A session with a thread for each of these cores; by default onnxruntime takes those of the machine."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def best_seconds(action: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs, after one to warm up."""
    action()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
