"""Measures the profile of this machine, in a few seconds."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime

from kvslim import onnx_format as onnx
from kvslim.devices.profile import Device, Quantity, Share
from kvslim.memory import usable_memory

PART_BYTES = 256 * 2**20  # per thread: much larger than a processor's caches
SIDE = 1024
REPEATS = 7


def measure_device() -> Device:
    """Memory as the system reports it; bandwidth and FLOP/s as the best of several runs on all cores.

    The best, not the median, because a limit must not be below what an idle machine can do.
    """
    import psutil

    memory, cores = psutil.virtual_memory(), usable_cores()
    return Device(
        name=f"{platform.machine()}, {cores} cores",
        ram_gib=Quantity(value=_rounded(memory.total / 2**30), source="psutil"),
        usable_share=Share(value=_rounded(usable_memory() / memory.total), source="measured: left to this process"),
        bandwidth_gb_s=Quantity(
            value=_rounded(read_bandwidth(cores) / 1e9),
            source=f"measured: {cores} threads, each a numpy dot product of {PART_BYTES // 2**20} MiB with itself",
        ),
        gflops=Quantity(
            value=_rounded(matmul_rate() / 1e9),
            source=f"measured: onnxruntime, product of float32 matrices of {SIDE} x {SIDE}",
        ),
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads read together.

    A dot product of a vector with itself needs hardly any arithmetic per byte; numpy's sum and maximum are slower than
    the memory.
    """
    parts = [np.ones(PART_BYTES // 4, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = _best(lambda: list(pool.map(lambda part: np.dot(part, part), parts)))
    return threads * PART_BYTES / seconds


def matmul_rate() -> float:
    """FLOPs per second of onnxruntime's float32 product, on as many threads as it chooses."""
    session = onnxruntime.InferenceSession(_product(), providers=["CPUExecutionProvider"])
    matrix = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32)
    seconds = _best(lambda: session.run(None, {"left": matrix, "right": matrix}))
    return 2 * SIDE**3 / seconds


def _best(action: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs, after one to warm up."""
    action()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _product() -> bytes:
    left, right, product = (onnx.value(name, onnx.FLOAT, [SIDE, SIDE]) for name in ("left", "right", "product"))
    return onnx.model_bytes([onnx.node("MatMul", ["left", "right"], ["product"])], [left, right], [product])


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
