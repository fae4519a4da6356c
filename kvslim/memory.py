"""The memory that this process may still take: what the machine has, or less where a control group limits it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

OWN = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
SHARE = 0.5  # of the memory, for weights; the rest is for what is computed with them


class _Files(NamedTuple):
    """What a version of control groups calls its files, and its counts of pages of files, which can be given up."""

    limit: str
    used: str
    reclaimable: tuple[str, ...]


UNIFIED = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))
FIRST = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def usable_memory() -> int:
    """Bytes that this process may still take.

    A container or a service may have less than its machine: the tightest of its control groups decides, of version 1
    or 2. Pages of files that a group has in memory count as free, since the system gives them up.
    """
    import psutil

    return max(0, min([int(psutil.virtual_memory().available), *_left_in_groups()]))


def is_too_large(weights: int) -> bool:
    """Whether so many bytes of weights leave too little memory for what is computed with them."""
    return weights > SHARE * usable_memory()


def give_back() -> None:
    """Returns memory that is free in this process to the system: glibc keeps it, often as much as was freed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other systems need none
    if trim is not None:
        trim(0)


def _left_in_groups() -> Iterator[int]:
    """Bytes that each control group of this process, or around it, leaves; nothing for one without a limit."""
    try:
        lines = OWN.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _left(GROUPS, path, UNIFIED)
        elif "memory" in controllers.split(","):
            yield from _left(GROUPS / "memory", path, FIRST)


def _left(root: Path, path: str, files: _Files) -> Iterator[int]:
    """Bytes that a group and those around it leave; a container may see its own group as the root."""
    own = PurePosixPath(path.lstrip("/"))
    for group in dict.fromkeys(root / each for each in (own, *own.parents)):
        try:
            limit = (group / files.limit).read_text(encoding="utf-8").strip()
            used = int((group / files.used).read_text(encoding="utf-8"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":  # version 1 has a huge number in its place
            yield int(limit) - used + sum(int(stat.get(name, 0)) for name in files.reclaimable)
