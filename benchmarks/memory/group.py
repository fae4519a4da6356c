"""A hard limit of memory for a command: a control group of Linux, under that of this process."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.rows import ROOT

HIERARCHY = Path("/sys/fs/cgroup/memory")  # version 1; with version 2 a process may not limit its own children


def missing() -> str | None:
    """Why there can be no limit here; None where there can."""
    try:
        with _group():
            return None
    except (OSError, StopIteration):
        return "no memory can be limited here: that takes Linux, control groups of version 1, and root"


def answers_within(mib: float, command: Sequence[str], seconds: float) -> bool:
    """Whether a command ends well with that much memory, its pages of files included, within a time.

    Memory that is full of what cannot be given up ends it. One that must read its files again and again ends by time.
    """
    found = run_within(mib, command, seconds)
    return found is not None and found.returncode == 0


def run_within(mib: float, command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str] | None:
    """What a command printed with so much memory, as for `answers_within`; None if it took longer."""
    with _group() as group:
        for name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):
            if (group / name).exists():
                (group / name).write_text(str(int(mib * 2**20)))
        inside = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *command]
        try:
            return subprocess.run(inside, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return None


@contextmanager
def _group() -> Iterator[Path]:
    """A new group without a limit."""
    lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    own = next(line.split(":", 2)[2] for line in lines if line.split(":", 2)[1] == "memory")
    group = HIERARCHY / own.lstrip("/") / f"kvslim-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        group.rmdir()
