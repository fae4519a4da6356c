"""Measures the profile of this machine, in some ten seconds."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kvslim import onnx_format as onnx
from kvslim.devices.kernel_timing import kernel_rates
from kvslim.devices.profile import Device, Quantity, Share
from kvslim.devices.timing import best_seconds, session_of, usable_cores
from kvslim.memory import usable_memory

PART_BYTES = 256 * 2**20  # per thread: much larger than a processor's caches
SIDE = 1024


def measure_device() -> Device:
    """Memory as the system reports it; bandwidth, FLOP/s and kernels as the best of several runs on all cores.

    The best, not the median, because a limit must not be below what an idle machine can do.
    """
    import psutil

    memory, cores = psutil.virtual_memory(), usable_cores()
    return Device(
        name=f"{platform.machine()}, {cores} {'core' if cores == 1 else 'cores'}",
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
        kernels={
            timed.kernel: Quantity(value=_rounded(timed.rate), source=f"measured: {timed.source}")
            for timed in kernel_rates()
        },
    )


def read_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads read together.

    A dot product of a vector with itself needs hardly any arithmetic per byte; numpy's sum and maximum are slower than
    the memory.
    """
    parts = [np.ones(PART_BYTES // 4, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = best_seconds(lambda: list(pool.map(lambda part: np.dot(part, part), parts)))
    return threads * PART_BYTES / seconds


def matmul_rate() -> float:
    """FLOPs per second of onnxruntime's float32 product."""
    session = session_of(_product())
    matrix = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32)
    seconds = best_seconds(lambda: session.run(None, {"left": matrix, "right": matrix}))
    return 2 * SIDE**3 / seconds


def _product() -> bytes:
    left, right, product = (onnx.value(name, onnx.FLOAT, [SIDE, SIDE]) for name in ("left", "right", "product"))
    return onnx.model_bytes([onnx.node("MatMul", ["left", "right"], ["product"])], [left, right], [product])


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
