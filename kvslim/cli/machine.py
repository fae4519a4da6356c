"""Whether this machine can make and run artifacts: packages, kernels, CPU, memory and disk."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from kvslim.contract import Frozen
from kvslim.errors import one_line
from kvslim.memory import usable_memory
from kvslim.packages import beyond_small, is_installed, required

if TYPE_CHECKING:
    from packaging.requirements import Requirement

TELLS_SMALL = "torch"  # which nobody who compresses does without
MIN_PYTHON = (3, 11)
MIN_MEMORY_GIB = 2.0
MIN_DISK_GIB = 2.0
SC_LEVEL2_CACHE_SIZE = 191  # sysconf number on Linux; Python has no name for it
TOLERANCE = 0.05  # int8 keys and values are off by up to half a step of 1/32
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve")
FLASH_HINT = (
    "the system reports no L2 cache size: if prefill is slow, set ORT_GQA_DISABLE_FLASH_ATTENTION=1 and compare"
)


class Check(Frozen):
    """One finding; `fix` says what to do if something is wrong or may be slow."""

    name: str
    ok: bool
    found: str
    fix: str = ""


def _check(name: str, ok: bool, found: str, fix: str) -> Check:
    return Check(name=name, ok=ok, found=found, fix="" if ok else fix)


def examine() -> tuple[Check, ...]:
    """All checks, in the order in which problems are best fixed."""
    return (_python(), *_packages(), *_kernels(), _cpu(), _l2(), _memory(), _disk())


def _python() -> Check:
    needed = ".".join(map(str, MIN_PYTHON))
    return _check("python", sys.version_info >= MIN_PYTHON, platform.python_version(), f"use {needed} or newer")


def _packages() -> Iterator[Check]:
    """The installed versions, compared with those that KVSlim requires."""
    if not is_installed("kvslim"):
        yield _check("kvslim", False, "not installed", "pip install -c constraints.txt -e .")
        return
    left_out = [] if is_installed(TELLS_SMALL) else beyond_small()
    for requirement in required():
        if requirement not in left_out:
            yield _package(requirement)
    if left_out:
        found = f"without {len(left_out)} packages: runs artifacts, and makes none"
        yield Check(name="small install", ok=True, found=found, fix="to compress here: pip install kvslim")


def _package(requirement: Requirement) -> Check:
    fix = f"pip install '{requirement}'"
    if not is_installed(requirement.name):
        return _check(requirement.name, False, "missing", fix)
    found = metadata.version(requirement.name)
    return _check(requirement.name, requirement.specifier.contains(found, prereleases=True), found, fix)


def _kernels() -> Iterator[Check]:
    from kvslim.cli.kernel import CACHES, attention_error

    for cache in CACHES:
        try:
            difference = attention_error(cache)
            ok, found = difference < TOLERANCE, f"in place, largest error {difference:.1e}"
        except Exception as error:  # any exception of onnxruntime or onnx means that the kernel does not work here
            ok, found = False, one_line(error)[:200]
        yield _check(f"attention, {cache} cache", ok, found, "update onnxruntime")


def _cpu() -> Check:
    import psutil

    flags = _cpu_flags()
    features = ", ".join(name for name in CPU_FEATURES if name in flags) or "no known vector features"
    threads = f"{psutil.cpu_count(logical=False) or '?'} cores, {psutil.cpu_count()} threads"
    return Check(name="cpu", ok=True, found=f"{platform.machine()}, {threads}, {features}")


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    lines = (line.partition(":") for line in text.splitlines())
    return {flag for name, _, flags in lines if name.strip() in {"flags", "Features"} for flag in flags.split()}


def _l2() -> Check:
    """The L2 size that onnxruntime sees. It asks sysconf, which returns 0 on some systems."""
    try:
        size = os.sysconf(SC_LEVEL2_CACHE_SIZE) if sys.platform == "linux" else 0
    except (OSError, ValueError):
        size = 0
    if size <= 0:
        return Check(name="L2 cache", ok=True, found="unknown", fix=FLASH_HINT)
    return Check(name="L2 cache", ok=True, found=f"{size // 1024} KiB")


def _memory() -> Check:
    free = usable_memory() / 2**30
    return _check("memory", free >= MIN_MEMORY_GIB, f"{free:.1f} GiB free", f"free {MIN_MEMORY_GIB} GiB")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return _check("disk", free >= MIN_DISK_GIB, f"{free:.1f} GiB free here", f"free {MIN_DISK_GIB} GiB")
