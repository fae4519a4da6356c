"""The cache folder, and statistics and probes in it, by the hash of everything that decides them.

A second run on the same model starts at once, and a second budget plans without a measurement. Each kind of what is
kept has a folder, of `LIMIT` bytes at most; what was used least lately goes first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np

from kvslim.calibrate.statistics import CalibrationStatistics
from kvslim.replacing import replacing

if TYPE_CHECKING:
    from kvslim.planning.matrices import ProbedMatrices
    from kvslim.planning.probes import Probes

FORMAT = 12
LIMIT = 16 * 2**30
Probed = TypeVar("Probed", "Probes", "ProbedMatrices")


def cache_folder() -> Path:
    """`$KVSLIM_CACHE`, else `kvslim` in the user's cache folder."""
    if folder := os.environ.get("KVSLIM_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvslim"


def used(entry: Path) -> Path:
    """A file or folder of a kind, which is now the one that was used last."""
    with suppress(OSError):
        os.utime(entry)
    return entry


def evict(kind: str) -> None:
    """Removes what was used least lately until the rest fits, and so what a killed process left; the last one stays."""
    with suppress(OSError):
        entries = sorted((cache_folder() / kind).iterdir(), key=lambda entry: entry.stat().st_mtime, reverse=True)
        taken = 0
        for entry in entries:
            taken += size_of(entry)
            if taken <= LIMIT or entry == entries[0]:
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()


def size_of(entry: Path) -> int:
    """Bytes of a file, or of those in a folder."""
    return sum(file.stat().st_size for file in (entry.iterdir() if entry.is_dir() else [entry]))


def content_key(*parts: Any) -> str:
    """SHA-256 of JSON-able parts: the model's digest, the calibration, the text's digest."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()


def load_statistics(key: str) -> CalibrationStatistics | None:
    """The stored statistics, or None when there are none or they cannot be read."""
    try:
        with used(_path("statistics", f"{key}.npz")).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return CalibrationStatistics(**dict(arrays))
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def store_statistics(key: str, statistics: CalibrationStatistics) -> None:
    """Stores statistics whole or not at all; a cache that cannot be written is no reason to fail."""
    arrays: dict[str, Any] = {**statistics.arrays()}
    _store(_path("statistics", f"{key}.npz"), lambda file: np.savez(file, **arrays))


def load_probes(key: str, kind: type[Probed]) -> Probed | None:
    """What was probed and stored under a key, or None when there is nothing or it cannot be read."""
    try:
        probes = kind.model_validate_json(used(_path("probes", f"{key}.json")).read_bytes())
    except (OSError, ValueError):
        return None
    return probes if probes.key == key else None


def store_probes(probes: Probes | ProbedMatrices) -> None:
    """Stores them under their key, whole or not at all; a cache that cannot be written is no reason to fail."""
    _store(_path("probes", f"{probes.key}.json"), lambda file: file.write(probes.model_dump_json().encode()))


def load_windows(key: str) -> np.ndarray | None:
    """Stored token ids [n, length], or None when there are none or they cannot be read."""
    try:
        windows: np.ndarray = np.load(used(_path("texts", f"{key}.npy")), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return windows


def store_windows(key: str, windows: np.ndarray) -> None:
    """Stores token ids, whole or not at all; a cache that cannot be written is no reason to fail."""
    _store(_path("texts", f"{key}.npy"), lambda file: np.save(file, windows, allow_pickle=False))


def _store(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, partial.open("wb") as file:
            write(file)
        evict(path.parent.name)


def _path(kind: str, name: str) -> Path:
    return cache_folder() / kind / name
