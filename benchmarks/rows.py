"""What a benchmark leaves behind: one JSON object a line, each with what it takes to run it again."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from kvslim.contract import Frozen

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "benchmarks"
VERSIONED = ("kvslim", "onnxruntime", "torch", "transformers")
Value = None | bool | int | float | str | tuple[float, ...]


class Machine(Frozen):
    """Where a benchmark ran."""

    cpu: str
    cores: int
    memory_gib: float


class Row(Frozen):
    """One row of a benchmark.

    Attributes:
        benchmark: Its name.
        subject: The name of what was measured.
        settings: Of the run.
        values: What was measured, by name; a tuple has one number for each seed.
        run: When the run started, in UTC; rows of one run share it.
        commit: Of the checkout, with `+` where files differ from it.
        versions: Of packages, by name.
        machine: Where it ran.
    """

    benchmark: str
    subject: str
    settings: dict[str, Any]
    values: dict[str, Value]
    run: datetime
    commit: str
    versions: dict[str, str]
    machine: Machine


def row(benchmark: str, subject: str, settings: dict[str, Any], values: dict[str, Any], run: datetime) -> Row:
    """A row of this checkout on this machine."""
    return Row(
        benchmark=benchmark,
        subject=subject,
        settings=settings,
        values=values,
        run=run,
        commit=_commit(),
        versions=_versions(),
        machine=_machine(),
    )


def now() -> datetime:
    """The time in UTC."""
    return datetime.now(UTC)


def path_of(benchmark: str, *, quick: bool = False) -> Path:
    """Where a benchmark's rows are kept; those of quick runs apart."""
    return FOLDER / f"{benchmark}{'-quick' if quick else ''}.jsonl"


def append(path: Path, new: Row) -> None:
    """Adds a row to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(new.model_dump_json() + "\n")


def latest(path: Path) -> list[Row]:
    """The rows of each subject's last run."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [Row.model_validate_json(line) for line in lines]
    last = {one.subject: one.run for one in found}
    return [one for one in found if one.run == last[one.subject]]


@cache
def _commit() -> str:
    """Empty outside a checkout."""
    head, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip()


@cache
def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


@cache
def _machine() -> Machine:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return Machine(
        cpu=names[0] if names else platform.processor(),
        cores=os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
    )
