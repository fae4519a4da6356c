"""Statistics on disk, by the hash of everything that decides them: a second run on the same model starts at once."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from kvslim.calibrate.statistics import CalibrationStatistics

FORMAT = 7


def cache_folder() -> Path:
    """`$KVSLIM_CACHE`, else `kvslim` in the user's cache folder."""
    if folder := os.environ.get("KVSLIM_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvslim"


def content_key(*parts: Any) -> str:
    """SHA-256 of JSON-able parts: the model's digest, the calibration, the text's digest."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()


def load_statistics(key: str) -> CalibrationStatistics | None:
    """The stored statistics, or None when there are none or they cannot be read."""
    try:
        with _path(key).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return CalibrationStatistics(**dict(arrays))
    except (OSError, ValueError, TypeError, zipfile.BadZipFile):
        return None


def store_statistics(key: str, statistics: CalibrationStatistics) -> None:
    """Stores statistics whole or not at all; a cache that cannot be written is no reason to fail."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    except OSError:
        return
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, allow_pickle=False, **statistics.arrays())
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _path(key: str) -> Path:
    return cache_folder() / "statistics" / f"{key}.npz"
